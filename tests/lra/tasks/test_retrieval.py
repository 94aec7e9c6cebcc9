"""Retrieval: pairs follow the recipe, and both raw forms are read."""

import gzip
import importlib
import io
import lzma
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schoenbat.errors import DataUnavailable, UserError
from schoenbat.lra.data.arrays import SPLITS, Dataset
from schoenbat.lra.tasks import TASKS

Retrieval: Any = TASKS.get("lra-retrieval")
module: Any = importlib.import_module("schoenbat.lra.tasks.lra-retrieval")
MIRROR = os.environ.get("SCHOENBAT_DATA_MIRROR")
needs_mirror = pytest.mark.skipif(
    not MIRROR or not (Path(MIRROR) / "aan/aan_docs.jsonl.xz").is_file(),
    reason="SCHOENBAT_DATA_MIRROR names no folder with aan/aan_docs.jsonl.xz",
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    Retrieval.sample(tmp_path / "raw")
    return tmp_path / "raw"


def prepare(raw: Path, out: Path, **options: Any) -> Dataset:
    Retrieval(Retrieval.Config(**options)).prepare(raw, out)
    return Dataset(out)


def pairs(dataset: Dataset, split: str) -> list[tuple[bytes, bytes, int]]:
    batch = dataset.batch(split, np.arange(dataset.num_examples(split)))
    rows = [[bytes(token - 1 for token in text if token) for text in row] for row in batch.tokens.tolist()]
    return [(first, second, label) for (first, second), label in zip(rows, batch.labels.tolist(), strict=True)]


def number(text: bytes) -> int:
    """The sample's papers are titled "On NUMBER"."""
    return int(text.split(b"\n")[0].removeprefix(b"On "))


def test_positives_are_citations_and_negatives_are_unlinked_and_no_later(raw: Path, tmp_path: Path) -> None:
    dataset = prepare(raw, tmp_path / "a")
    for split, years in (("train", range(2004, 2010)), ("dev", [2010]), ("test", [2011])):
        for first, second, label in pairs(dataset, split):
            step = number(first) - number(second)
            year = 2004 + number(first) // 5
            assert year in years
            assert (step in (1, 5)) == label
            assert step not in (0, -1, -5)
            assert 2004 + number(second) // 5 <= year
            assert number(second) < 39, "nobody cites the last paper"


def test_every_positive_has_its_negative_and_no_pair_comes_twice(raw: Path, tmp_path: Path) -> None:
    dataset = prepare(raw, tmp_path / "a")
    seen: set[frozenset[bytes]] = set()
    for split in SPLITS:
        found = pairs(dataset, split)
        for positive, negative in zip(found[::2], found[1::2], strict=True):
            assert positive[0] == negative[0]
            assert (positive[2], negative[2]) == (1, 0)
            seen |= {frozenset(positive[:2]), frozenset(negative[:2])}
    assert len(seen) == sum(dataset.meta["splits"].values())


def test_a_link_known_to_the_whole_network_only_is_no_negative(raw: Path, tmp_path: Path) -> None:
    links = [f"P39 , P{other:02}\n" for other in range(39) if other not in (3, 4, 34, 38)]
    with lzma.open(raw / "acl.txt.xz", "at", encoding="latin-1") as file:
        file.writelines(links)
    found = pairs(prepare(raw, tmp_path / "a"), "test")
    assert {number(second) for first, second, label in found if number(first) == 39 and not label} == {3, 4}


def test_a_mutual_citation_is_one_pair_of_the_later_paper(raw: Path, tmp_path: Path) -> None:
    before = prepare(raw, tmp_path / "a").meta
    with open(raw / "aan_edges_within.tsv", "a") as file:
        file.write("P34\tP39\n")
    dataset = prepare(raw, tmp_path / "b")
    assert dataset.meta["splits"] == before["splits"]
    assert "1 of these mutual" in dataset.meta["notes"][0]
    assert (39, 34) in {(number(first), number(second)) for first, second, label in pairs(dataset, "test") if label}


def test_negatives_follow_the_seed(raw: Path, tmp_path: Path) -> None:
    one, other = prepare(raw, tmp_path / "a"), prepare(raw, tmp_path / "b", seed=1)
    assert pairs(one, "train")[::2] == pairs(other, "train")[::2]
    assert pairs(one, "train") != pairs(other, "train")


def test_a_subset_says_so_and_stores_only_its_texts(raw: Path, tmp_path: Path) -> None:
    dataset = prepare(raw, tmp_path / "a", train_size=4, dev_size=2, test_size=2)
    assert dataset.meta["label"] == "AAN subset, subset of pairs"
    assert dataset.meta["splits"] == {"train": 4, "dev": 2, "test": 2}
    assert sum(label for _, _, label in pairs(dataset, "train")) == 2
    assert len(np.load(tmp_path / "a" / "offsets.npy")) - 1 <= 16
    assert prepare(raw, tmp_path / "b").meta["label"] == "AAN subset"
    with pytest.raises(UserError, match="lra-retrieval: dev_size 900 needs 450 examples of each label"):
        prepare(raw, tmp_path / "c", dev_size=900)


def write_release(path: Path, rows: dict[str, list[tuple[str, str, str, str, str]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        members = {f"lra_release/tsv_data/new_aan_pairs.{split}.tsv": table for split, table in rows.items()}
        for name, table in {**members, "lra_release/listops-1000/basic_train.tsv": []}.items():
            content = "".join("\t".join(row) + "\n" for row in table).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


RELEASE = {
    "train": [("1.0", "A", "B", "text a", '"text ""b"" \N{EM DASH}"'), ("0.0", "A", "C", "text a", "text c")],
    "eval": [("0.0", "B", "C", "text b", "text c"), ("1.0", "D", "C", "text d", "text c")],
    "test": [("1.0", "B", "C", "text b", "text c"), ("0.0", "D", "D", "text d", "text e")],
}


def test_the_release_is_read_byte_for_byte_and_its_repeated_pairs_are_dropped(tmp_path: Path) -> None:
    write_release(tmp_path / "raw" / "lra_release.gz", RELEASE)
    dataset = prepare(tmp_path / "raw", tmp_path / "a")
    assert dataset.meta["label"] == "AAN bytes"
    assert pairs(dataset, "train")[0] == (b"text a", 'text "b" \N{EM DASH}'.encode(), 1)
    assert pairs(dataset, "dev") == [(b"text d", b"text c", 1)]
    assert dataset.meta["notes"] == ["1 dev pairs dropped: they occur in a later split"]
    assert len(np.load(tmp_path / "a" / "offsets.npy")) - 1 == 6, "each text is stored once"


def test_a_release_without_pairs_or_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "raw" / "lra_release.gz"
    write_release(path, {"train": RELEASE["train"]})
    with pytest.raises(UserError, match=r"no pairs in tsv_data/: new_aan_pairs\.eval\.tsv, new_aan_pairs\.test\.tsv"):
        prepare(tmp_path / "raw", tmp_path / "a")
    write_release(path, RELEASE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="remove it and download again"):
        prepare(tmp_path / "raw", tmp_path / "a")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("1.0", "A", "B", "text"), "new_aan_pairs.train.tsv, line 2: 4 fields, where label, 2 ids and 2 texts belong"),
        (("1.0", "A", "B", "t", "t", "t"), "line 2: 6 fields"),
        (("7.0", "A", "B", "t", "u"), "line 2: the label is '7.0', neither 0.0 nor 1.0"),
        (("nan", "A", "B", "t", "u"), "line 2: the label is 'nan'"),
        (("", "A", "B", "t", "u"), "line 2: the label is ''"),
        ((), "line 2: 0 fields"),
        (("<html><body>Not found</body></html>",), "line 2: 1 fields"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, row: tuple[str, ...], message: str) -> None:
    rows: Any = {**RELEASE, "train": [RELEASE["train"][0], row]}
    write_release(tmp_path / "raw" / "lra_release.gz", rows)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "raw", tmp_path / "a")
    assert message in str(caught.value)
    assert "download again" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_with_an_empty_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = {**RELEASE, "train": [*RELEASE["train"], ("1.0", "A", "E", "text a", ""), ("0.0", "E", "A", "", "text a")]}
    write_release(tmp_path / "raw" / "lra_release.gz", rows)
    dataset = prepare(tmp_path / "raw", tmp_path / "a")
    assert dataset.meta["splits"]["train"] == 2
    assert "2 train pairs dropped: a text is empty" in dataset.meta["notes"]


def test_no_pair_is_in_two_splits_in_either_order(tmp_path: Path) -> None:
    rows = {**RELEASE, "train": [*RELEASE["train"], ("1.0", "C", "B", "text c", "text b")]}
    write_release(tmp_path / "raw" / "lra_release.gz", rows)
    dataset = prepare(tmp_path / "raw", tmp_path / "a")
    assert dataset.meta["splits"]["train"] == 2
    assert "1 train pairs dropped: they occur in a later split" in dataset.meta["notes"]
    write_release(tmp_path / "raw" / "lra_release.gz", {**RELEASE, "train": [("1.0", "C", "B", "text c", "text b")]})
    with pytest.raises(UserError, match=r"every pair of new_aan_pairs\.train\.tsv occurs in a later split"):
        prepare(tmp_path / "raw", tmp_path / "b")


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_file_is_no_split(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "raw" / "lra_release.gz"
    write_release(path, {"train": RELEASE["train"], "eval": RELEASE["eval"]})
    with tarfile.open(path) as before:
        members = [(member, before.extractfile(member).read()) for member in before]  # type: ignore[union-attr]
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            archive.addfile(member, io.BytesIO(content))
        odd = tarfile.TarInfo("lra_release/tsv_data/new_aan_pairs.test.tsv")
        odd.type, odd.linkname = kind, "nowhere"
        archive.addfile(odd)
    with pytest.raises(UserError, match=r"no pairs in tsv_data/: new_aan_pairs\.test\.tsv"):
        prepare(tmp_path / "raw", tmp_path / "a")


def test_a_text_that_never_ends_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TEXT", 1000)
    path = tmp_path / "raw" / "lra_release.gz"
    write_release(path, {**RELEASE, "train": [("1.0", "A", "B", "a" * 1001, "b")]})
    with pytest.raises(UserError, match=r"new_aan_pairs\.train\.tsv, line 1: field larger than field limit \(1000\)"):
        prepare(tmp_path / "raw", tmp_path / "a")
    write_release(path, {**RELEASE, "train": [("1.0", "A", "B", "a" * 100_000, "b")]})
    with pytest.raises(UserError, match=r"new_aan_pairs\.train\.tsv: a line is longer than 2,000 bytes"):
        prepare(tmp_path / "raw", tmp_path / "a")
    monkeypatch.setattr(module, "MOST_TEXTS", 10)
    write_release(path, RELEASE)
    with pytest.raises(UserError, match="holds more than 10 bytes of texts"):
        prepare(tmp_path / "raw", tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<html>Not found</html>", "it is no gzip file but begins with b'<html>Not found</html>'"),
        (gzip.compress(b"x" * 10_000, mtime=0)[:-9], "it cannot be unpacked: Compressed file ended"),
        (gzip.compress(b"x" * 10_000, mtime=0)[:-8] + b"\0" * 8, "it cannot be unpacked: CRC check failed"),
    ],
)
def test_what_is_no_whole_gzip_file_does_not_count_as_downloaded(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mirror" / "lra" / "lra_release.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(DataUnavailable) as caught:
        Retrieval(Retrieval.Config()).download(tmp_path / "raw", tmp_path / "mirror", 0, None)
    assert message in str(caught.value)
    assert not (tmp_path / "raw" / "lra_release.gz").exists()


def test_another_release_in_the_mirror_replaces_the_copy(tmp_path: Path) -> None:
    mirrored = tmp_path / "mirror" / "lra" / "lra_release.gz"
    write_release(mirrored, RELEASE)
    task, raw = Retrieval(Retrieval.Config()), tmp_path / "raw"
    assert task.download(raw, tmp_path / "mirror", 0, None)["files"][0]["from"] == "mirror"
    assert task.download(raw, tmp_path / "mirror", 0, None)["files"][0]["from"] == "already there"
    write_release(mirrored, {**RELEASE, "train": RELEASE["train"][:1]})
    assert task.download(raw, tmp_path / "mirror", 0, None)["files"][0]["from"] == "mirror"
    assert (raw / "lra_release.gz").read_bytes() == mirrored.read_bytes()


def test_the_release_is_not_begun_at_the_usual_limit(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match=r"lra_release.gz is 7,700 MB, more than data.download_limit_mb .*500 MB"):
        Retrieval(Retrieval.Config()).download(tmp_path, tmp_path / "no mirror", 500_000_000, None)
    assert "SCHOENBAT_DATA_MIRROR" in Retrieval.how_to_get
    assert "data.download_limit_mb" in Retrieval.how_to_get
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_with_the_release_needs_no_network(tmp_path: Path) -> None:
    write_release(tmp_path / "mirror" / "lra" / "lra_release.gz", RELEASE)
    provenance = Retrieval(Retrieval.Config()).download(tmp_path / "raw", tmp_path / "mirror", 0, None)
    assert [(file["name"], file["from"]) for file in provenance["files"]] == [("lra_release.gz", "mirror")]


def test_no_raw_files_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="download the task"):
        prepare(tmp_path, tmp_path / "a")


@needs_mirror
def test_the_real_papers_have_the_known_counts(tmp_path: Path) -> None:
    assert MIRROR
    provenance = Retrieval(Retrieval.Config()).download(tmp_path / "raw", Path(MIRROR), 0, None)
    assert {file["from"] for file in provenance["files"]} == {"mirror"}
    dataset = prepare(tmp_path / "raw", tmp_path / "a")
    assert dataset.meta["splits"] == {"train": 15_998, "dev": 2_274, "test": 3_702}
    assert dataset.meta["notes"][0] == "1837 papers, 11029 citations among them, 42 of these mutual"
