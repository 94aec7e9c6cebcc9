"""IMDB: both raw forms give the same arrays, and nothing of the test half is trained on."""

import hashlib
import importlib
import io
import json
import lzma
import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schoenbat.errors import DataUnavailable, UserError
from schoenbat.lra.config import build_config
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.tasks import TASKS

Text: Any = TASKS.get("lra-text")
module: Any = importlib.import_module("schoenbat.lra.tasks.lra-text")
MIRROR = os.environ.get("SCHOENBAT_DATA_MIRROR")
needs_mirror = pytest.mark.skipif(
    not MIRROR or not (Path(MIRROR) / "imdb/imdb.jsonl.xz").is_file(),
    reason="SCHOENBAT_DATA_MIRROR names no folder with imdb/imdb.jsonl.xz",
)


def write_archive(lines: Path, archive: Path) -> None:
    """The reviews of the JSON lines as the release packs them, in another order and among other files."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(lines, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    members = {"aclImdb/README": b"about", "aclImdb/train/unsup/0_0.txt": b"no label", "aclImdb/test/urls_neg.txt": b""}
    for record in reversed(records):
        folder = f"aclImdb/{record['split']}/{('neg', 'pos')[record['label']]}"
        members[f"{folder}/{record['id']}_{record['rating']}.txt"] = record["text"].encode()
    with tarfile.open(archive, "w:gz", compresslevel=0) as target:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            target.addfile(info, io.BytesIO(content))


def prepare(raw: Path, out: Path, **options: Any) -> Dataset:
    Text(Text.Config(**options)).prepare(raw, out)
    return Dataset(out)


def texts(dataset: Dataset, split: str) -> list[bytes]:
    batch = dataset.batch(split, np.arange(dataset.num_examples(split)))
    return [bytes(token - 1 for token in tokens if token) for tokens in batch.tokens[:, 0].tolist()]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    Text.sample(tmp_path / "raw")
    return tmp_path / "raw"


def test_both_forms_give_the_same_arrays(raw: Path, tmp_path: Path) -> None:
    write_archive(raw / "imdb.jsonl.xz", tmp_path / "other" / "aclImdb_v1.tar.gz")
    from_lines = prepare(raw, tmp_path / "a", dev_size=8)
    from_archive = prepare(tmp_path / "other", tmp_path / "b", dev_size=8)
    assert from_lines.meta["fingerprint"] == from_archive.meta["fingerprint"]
    assert from_lines.meta["notes"] == from_archive.meta["notes"]


def test_tokens_are_bytes_plus_one(raw: Path, tmp_path: Path) -> None:
    found = texts(prepare(raw, tmp_path / "a", dev_size=8), "test")
    assert found[5].decode() == "Number 5 of test: a dull film" + " indeed" * 5 + " \N{EM DASH} see it or not."


def test_copies_stay_out_of_dev_and_out_of_training_when_tested(raw: Path, tmp_path: Path) -> None:
    dataset = prepare(raw, tmp_path / "a", dev_size=8)
    train, dev, test = (texts(dataset, split) for split in ("train", "dev", "test"))
    assert dataset.meta["splits"] == {"train": 28, "dev": 8, "test": 40}
    assert dataset.meta["notes"][0].startswith("4 training reviews dropped")
    assert not set(train) & set(test)
    assert not set(dev) & {*train, *test}
    assert Counter(train)[b"Twice in training: dull."] == 2
    assert b"Twice in training: dull." not in dev


def test_dev_has_as_many_of_each_label_and_follows_the_seed(raw: Path, tmp_path: Path) -> None:
    first = prepare(raw, tmp_path / "a", dev_size=8)
    assert first.batch("dev", np.arange(8)).labels.tolist() == [0] * 4 + [1] * 4
    assert texts(prepare(raw, tmp_path / "b", dev_size=8, seed=1), "dev") != texts(first, "dev")
    assert texts(prepare(raw, tmp_path / "c", dev_size=8, train_size=4, test_size=4), "dev") == texts(first, "dev")


def test_a_subset_says_so(raw: Path, tmp_path: Path) -> None:
    dataset = prepare(raw, tmp_path / "a", dev_size=8, train_size=6, test_size=10)
    assert dataset.meta["label"] == "IMDB bytes, subset"
    assert dataset.meta["splits"] == {"train": 6, "dev": 8, "test": 10}
    for split, size in (("train", 6), ("test", 10)):
        assert dataset.batch(split, np.arange(size)).labels.sum() == size // 2
    assert prepare(raw, tmp_path / "b", dev_size=8).meta["label"] == "IMDB bytes"


def test_more_than_there_is_names_the_option(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lra-text: train_size 100 needs 50 examples of each label, but label 0 has 14"):
        prepare(raw, tmp_path / "a", dev_size=8, train_size=100)


@pytest.mark.parametrize("options", [{"dev_size": 3}, {"train_size": 0}, {"max_length": 0}, {"seed": -1}])
def test_wrong_settings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="here: "):
        build_config(Text.Config, options, "here")


@pytest.mark.parametrize("form", ["imdb.jsonl.xz", "aclImdb_v1.tar.gz"])
def test_a_truncated_raw_file_is_named(raw: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / "cut" / form
    path.parent.mkdir()
    whole = raw / "imdb.jsonl.xz"
    if form.endswith("gz"):
        write_archive(raw / "imdb.jsonl.xz", whole := tmp_path / "whole.tar.gz")
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{path} cannot be read, remove it and download again"):
        prepare(path.parent, tmp_path / "a", dev_size=8)
    assert not (tmp_path / "a").exists()


def test_no_raw_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="download the task"):
        prepare(tmp_path, tmp_path / "a")


@pytest.mark.parametrize("form", ["LINES", "ARCHIVE"])
def test_either_form_is_taken_from_a_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    content = b"stands for the real file"
    checksum = "sha256:" + hashlib.sha256(content).hexdigest()
    file = replace(getattr(module, form), size=len(content), checksum=checksum)
    monkeypatch.setattr(module, form, file)
    (tmp_path / "mirror" / "imdb").mkdir(parents=True)
    (tmp_path / "mirror" / file.mirror_path).write_bytes(content)
    provenance = Text(Text.Config()).download(tmp_path / "raw", tmp_path / "mirror", 0, None)
    name = Path(file.mirror_path).name
    assert provenance == {"files": [{"name": name, "from": "mirror", "size": len(content), "checksum": checksum}]}
    assert (tmp_path / "raw" / name).read_bytes() == content


def test_the_release_is_subject_to_the_limit(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match=r"aclImdb_v1\.tar\.gz is 84 MB, more than data\.download_limit_mb"):
        Text(Text.Config()).download(tmp_path / "raw", None, 10_000_000, None)


@needs_mirror
@pytest.mark.slow
def test_the_real_data_have_the_known_counts_in_both_forms(tmp_path: Path) -> None:
    assert MIRROR
    Text(Text.Config()).download(tmp_path / "raw", Path(MIRROR), 0, None)
    dataset = prepare(tmp_path / "raw", tmp_path / "a")
    assert dataset.meta["splits"] == {"train": 22_377, "dev": 2_500, "test": 25_000}
    assert dataset.meta["notes"][0].startswith("123 training reviews dropped")
    assert dataset.meta["lengths"]["max"] == 13_704
    baselines = Text(Text.Config()).baselines(prepare(tmp_path / "raw", tmp_path / "c", max_length=768, test_size=5000))
    assert baselines["majority class"] == 0.5
    assert 0.62 < baselines["byte frequencies"] < 0.65
    write_archive(tmp_path / "raw" / "imdb.jsonl.xz", tmp_path / "other" / "aclImdb_v1.tar.gz")
    assert prepare(tmp_path / "other", tmp_path / "b").meta["fingerprint"] == dataset.meta["fingerprint"]
