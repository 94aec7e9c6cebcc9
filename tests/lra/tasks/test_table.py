"""Texts and labels of one's own: every form of file gives the same data, and what is wrong in one is a line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schoenbat.errors import UserError
from schoenbat.lra.config import build_config
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.tasks import TASKS

Prepare = Callable[..., tuple[dict[str, Any], Dataset]]

TABLE = TASKS.get("table")
ROWS = [
    (f'Review {number}: "{kind}",\n caf\N{LATIN SMALL LETTER E WITH ACUTE}.', kind)
    for number in range(30)
    for kind in ("bad", "good")
]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Download and prepare the table that a section of params.yaml describes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()

    def run(**section: Any) -> tuple[dict[str, Any], Dataset]:
        task = TABLE(build_config(TABLE.Config, section, "params.yaml: task.table.data"))
        task.download(Path("raw"), None, None, None)
        meta = task.prepare(Path("raw"), Path("out"))
        return meta, Dataset(Path("out"))

    return run


def write(name: str, content: str | bytes) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def quoted(text: str) -> str:
    return '"{}"'.format(text.replace('"', '""'))


def write_rows(name: str, rows: list[tuple[str, str]]) -> None:
    kind = Path(name).suffix
    if kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = dict(zip(("text", "label"), map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), name)
    elif kind == ".jsonl":
        write(name, "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    else:
        mark = "\t" if kind == ".tsv" else ","
        write(name, f"text{mark}label\n" + "".join(f"{quoted(text)}{mark}{label}\n" for text, label in rows))


def texts(dataset: Dataset, split: str) -> list[str]:
    """The texts of a split whose tokens are bytes."""
    tokens = dataset.batch(split, np.arange(dataset.num_examples(split))).tokens
    return [bytes(row[row != 0].sub(1).tolist()).decode() for example in tokens for row in example]


def test_every_form_of_file_gives_the_same_arrays(prepare: Prepare) -> None:
    found = set()
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        write_rows(f"reviews.{kind}", ROWS)
        meta, dataset = prepare(path=f"reviews.{kind}")
        found.add(meta["fingerprint"])
        assert meta["class_names"] == ["bad", "good"]
        assert meta["splits"] == {"train": 48, "dev": 6, "test": 6}
    assert len(found) == 1
    every = [text for split in ("train", "dev", "test") for text in texts(dataset, split)]
    assert sorted(every) == sorted(text for text, _ in ROWS)
    for split in ("train", "dev", "test"):
        named = [meta["class_names"][label] for label in dataset.labels(split)]
        assert named == [dict(ROWS)[text] for text in texts(dataset, split)]


def test_the_draw_depends_on_the_seed_alone_and_keeps_the_shares_of_the_labels(prepare: Prepare) -> None:
    write_rows("reviews.csv", ROWS + [(f"rare {number}", "rare") for number in range(3)])
    first, dataset = prepare(path="reviews.csv", dev_share=0.2, test_share=0.3)
    assert {split: np.bincount(dataset.labels(split)).tolist() for split in ("train", "dev", "test")} == {
        "train": [15, 15, 1],
        "dev": [6, 6, 1],
        "test": [9, 9, 1],
    }
    assert prepare(path="reviews.csv", dev_share=0.2, test_share=0.3)[0] == first
    other = prepare(path="reviews.csv", dev_share=0.2, test_share=0.3, seed=1)[0]
    assert other["fingerprint"] != first["fingerprint"]


def test_characters_and_words_of_training_get_numbers_and_others_are_unknown(prepare: Prepare) -> None:
    write("t.csv", "text,label,part\nGood film!,1,train\nA bad film.,0,train\nGOOD grief,1,dev\nbad x,0,test\n")
    meta, dataset = prepare(path="t.csv", split="part", tokens="words")
    assert meta["vocabulary"] == ["film", "!", ".", "a", "bad", "good"]
    assert meta["vocab_size"] == 8
    assert dataset.batch("dev", np.array([0]), 1).tokens.tolist() == [[[7, 1]]]
    task = TABLE(TABLE.Config(path="t.csv", tokens="words"))
    assert task.encode("A good film, a bad ending.", meta).tolist() == [5, 7, 2, 1, 5, 6, 1, 4]
    assert prepare(path="t.csv", split="part", tokens="words", vocab_size=1)[0]["vocabulary"] == ["film"]
    meta, _ = prepare(path="t.csv", split="part", tokens="characters")
    assert set(meta["vocabulary"]) == set("Good film!A bad film.")


def test_two_columns_are_two_texts(prepare: Prepare) -> None:
    rows = "".join(f"p{number},h{number},{number % 2}\n" for number in range(20))
    write("pairs.csv", f"premise,hypothesis,entails\n{rows}")
    meta, dataset = prepare(path="pairs.csv", text="premise", other_text="hypothesis", label="entails")
    assert (meta["num_texts"], meta["class_names"]) == (2, ["0", "1"])
    pair = texts(dataset, "test")[:2]
    assert pair == [f"p{pair[0][1:]}", f"h{pair[0][1:]}"]


def test_files_of_their_own_are_dev_and_test_and_share_no_text_with_training(prepare: Prepare) -> None:
    write("train.csv", "text,label\na,0\nb,1\nc,0\nd,1\nc,0\n")
    write("dev.csv", "text,label\nb,1\ne,0\n")
    write("test.csv", "text,label\nc,1\nb,1\nf,0\n")
    meta, dataset = prepare(path="train.csv", dev_path="dev.csv", test_path="test.csv")
    assert {split: texts(dataset, split) for split in ("train", "dev", "test")} == {
        "train": ["a", "d"],
        "dev": ["e"],
        "test": ["c", "b", "f"],
    }
    assert meta["notes"] == ["4 rows dropped: another row has the same text", "1 of them with another label"]


def test_a_file_for_test_alone_leaves_dev_to_be_drawn(prepare: Prepare) -> None:
    write_rows("all.csv", ROWS)
    write("test.csv", "text,label\nnew,bad\n")
    meta, _ = prepare(path="all.csv", test_path="test.csv", dev_share=0.5)
    assert meta["splits"] == {"train": 30, "dev": 30, "test": 1}


def test_labels_are_numbered_as_they_are_listed_or_as_integers(prepare: Prepare) -> None:
    write_rows("stars.csv", [(f"text {number}", str(number % 12 + 1)) for number in range(60)])
    assert prepare(path="stars.csv")[0]["class_names"] == [str(star) for star in range(1, 13)]
    write_rows("reviews.csv", ROWS)
    meta, dataset = prepare(path="reviews.csv", labels=["good", "bad"])
    assert meta["class_names"] == ["good", "bad"]
    assert "good" in texts(dataset, "test")[list(dataset.labels("test")).index(0)]


def test_a_file_without_a_line_of_names_is_read_with_columns(prepare: Prepare) -> None:
    write("bare.tsv", "".join(f"{number % 2}\ttext {number}\n" for number in range(20)))
    assert prepare(path="bare.tsv", columns=["label", "text"])[0]["splits"]["train"] == 16


def test_a_mark_at_the_beginning_and_other_encodings_are_read(prepare: Prepare) -> None:
    write_rows("reviews.csv", ROWS)
    plain = prepare(path="reviews.csv")[0]["fingerprint"]
    content = Path("reviews.csv").read_text()
    write("marked.csv", content.encode("utf-8-sig"))
    write("latin.csv", content.encode("latin-1"))
    assert prepare(path="marked.csv")[0]["fingerprint"] == plain
    assert prepare(path="latin.csv", encoding="latin-1")[0]["fingerprint"] == plain


GOOD = "text,label\n" + "".join(f"text {number},{'ab'[number % 2]}\n" for number in range(10))


@pytest.mark.parametrize(
    ("name", "content", "section", "message"),
    [
        ("t.csv", "", {}, "t.csv is empty"),
        ("t.csv", "text,label\n", {}, "t.csv has no rows"),
        ("t.jsonl", "\n\n", {}, "t.jsonl has no rows"),
        ("t.csv", GOOD, {"text": "txt"}, "t.csv, line 1: no column 'txt'; there are: text, label"),
        ("t.csv", GOOD, {"label": "Label"}, "t.csv, line 1: no column 'Label'; there are: label, text"),
        ("t.csv", GOOD + '"two\nlines",a\none,a,b\n', {}, "t.csv, line 14: the row has 3 of 2 fields"),
        ("t.csv", GOOD + "lonely\n", {}, "t.csv, line 12: the row has 1 of 2 fields"),
        ("t.csv", GOOD + '"never closed,a\n', {}, "t.csv, line 12: unexpected end of data"),
        ("t.csv", GOOD + " ,a\n", {}, "t.csv, line 12, text: the text is empty"),
        ("t.csv", GOOD + "a text,\n", {}, "t.csv, line 12, label: there is no label"),
        ("t.csv", GOOD + "x,aa\n", {"labels": ["a", "b"]}, "t.csv, line 12: unknown label 'aa'; choose one of: a, b"),
        ("t.csv", GOOD + "x,c\n", {}, "t.csv, line 12: label 'c' has too few different texts, 1; one "),
        ("t.csv", "text,label\nx,a\ny,a\n", {}, "t.csv: all rows have the label 'a'; two are needed"),
        ("t.csv", GOOD.encode() + b"caf\xe9,a\n", {}, "t.csv, line 12: not utf-8 (byte 0xe9); name the file's own"),
        ("t.csv", GOOD, {"split": "label"}, "t.csv, line 2: unknown label 'a'; choose one of: train, dev, test"),
        ("t.csv", "text,label,s\nx,a,train\ny,b,test\n", {"split": "s"}, "t.csv: no row is left for dev"),
        ("t.jsonl", '{"text": "x", "label": 1}\n{"text": "y"}\n', {}, "t.jsonl, line 2: no column 'label'; there are"),
        ("t.jsonl", '{"text": "x", "label": 1}\n{oops\n', {}, "t.jsonl, line 2: no JSON: Expecting property name"),
        ("t.jsonl", "[1, 2]\n", {}, "t.jsonl, line 1: an object is expected, such as"),
        ("t.jsonl", '{"text": 3, "label": 1}\n', {}, "t.jsonl, line 1, text: a text is expected, not 3"),
        ("t.jsonl", '{"text": "x", "label": 0.5}\n', {}, "t.jsonl, line 1, label: a text or an integer is expected"),
        ("t.jsonl", '{"text": "x", "label": null}\n', {}, "t.jsonl, line 1, label: there is no label"),
        ("t.parquet", "text,label\n", {}, "t.parquet is no parquet file: "),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_its_place(
    prepare: Prepare, name: str, content: str | bytes, section: dict[str, Any], message: str
) -> None:
    write(name, content)
    with pytest.raises(UserError) as raised:
        prepare(path=name, **section)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "task.table.data.path is not set: name a file"),
        ({"path": "nowhere.csv"}, "task.table.data: there is no file nowhere.csv"),
        ({"path": "t.xlsx"}, "params.yaml: task.table.data: t.xlsx is no .csv, .tsv, .jsonl or .parquet file"),
        ({"path": "t.csv", "tokens": "word"}, "params.yaml: task.table.data.tokens must be one of: bytes, characters"),
        ({"path": "t.csv", "encoding": "utf9"}, "params.yaml: task.table.data: unknown encoding 'utf9'"),
        ({"path": "t.csv", "dev_share": 1.5}, "params.yaml: task.table.data: dev_share must lie between 0 and 1"),
        ({"path": "t.csv", "dev_share": 0.5, "test_share": 0.5}, "params.yaml: task.table.data: dev_share and test_sh"),
        ({"path": "t.csv", "split": "s", "test_path": "u.csv"}, "params.yaml: task.table.data: split goes with one"),
    ],
)
def test_what_is_wrong_in_the_settings_is_one_line(prepare: Prepare, section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        prepare(**section)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_folder_of_texts_is_a_table_by_the_lines_of_the_document(prepare: Prepare) -> None:
    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for number in range(30):
        for label in ("bad", "good"):
            Path("reviews", label).mkdir(parents=True, exist_ok=True)
            Path("reviews", label, f"{number}.txt").write_text(f"Review {number},\n{label}.", encoding="utf-8")
    exec(compile(lines, "docs/data.md", "exec"), {})
    meta, _ = prepare(path="reviews.jsonl")
    assert sum(meta["splits"].values()) == 60
    assert meta["class_names"] == ["bad", "good"]
