"""Processed data: what is written comes back as batches, and nothing half-written or out of range gets through."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from schoenbat.errors import UserError
from schoenbat.lra.data import arrays
from schoenbat.lra.data.arrays import IGNORED, Dataset, DatasetOnDevice, batches, write_dataset

DOCS = [np.arange(1, length + 1) for length in (3, 70, 1, 200, 64)]
META = {"task": "made-up", "num_classes": 3, "vocab_size": 257, "num_texts": 2, "max_length": 100}


def splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    train = np.array([[0, 1], [1, 2], [4, 4], [2, 0], [0, 0], [3, 2], [3, 4]]), np.array([0, 1, 2, 0, 1, 2, 0])
    return {"train": train, "dev": (np.array([[0, 2]]), np.array([1])), "test": (np.array([[3, 0]]), np.array([2]))}


def write(folder: Path, **changes: Any) -> dict[str, Any]:
    return write_dataset(folder, DOCS, splits(), {**META, **changes})


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    write(tmp_path / "set")
    return Dataset(tmp_path / "set")


def test_meta_describes_the_arrays(dataset: Dataset, tmp_path: Path) -> None:
    assert dataset.meta["splits"] == {"train": 7, "dev": 1, "test": 1}
    assert dataset.meta["lengths"] == {"median": 64, "p95": 174, "max": 200}
    assert json.loads((tmp_path / "set" / "meta.json").read_text()) == dataset.meta
    assert [dataset.num_examples(split) for split in ("train", "dev", "test")] == [7, 1, 1]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_tokens_take_the_smallest_type(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    write(tmp_path / "set", vocab_size=vocab_size)
    assert np.load(tmp_path / "set" / "tokens.npy").dtype == dtype


def test_a_batch_holds_the_texts_and_pads_to_the_longest(dataset: Dataset) -> None:
    batch = dataset.batch("train", np.array([1, 0]))
    assert batch.tokens.shape == (2, 2, 128)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [1, 0]
    for row, docs in enumerate([(1, 2), (0, 1)]):
        for text, doc in enumerate(docs):
            length = len(DOCS[doc])
            assert batch.tokens[row, text, :length].tolist() == DOCS[doc].tolist()
            assert not batch.tokens[row, text, length:].any()
            assert batch.key_mask[row, text].tolist() == [True] * length + [False] * (128 - length)


@pytest.mark.parametrize(("rows", "multiple", "length"), [([4], 64, 64), ([2], 64, 64), ([5], 64, 128), ([5], 1, 100)])
def test_length_is_a_multiple_and_texts_are_cut(dataset: Dataset, rows: list[int], multiple: int, length: int) -> None:
    batch = dataset.batch("train", np.array(rows), pad_to_multiple=multiple)
    assert batch.tokens.shape[-1] == length
    assert batch.key_mask.sum(-1).max() <= META["max_length"]


def test_order_is_a_pure_function_of_seed_and_epoch(dataset: Dataset) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [int(row) for rows in batches(dataset, "train", 2, seed=seed, epoch=epoch) for row in rows]

    assert order(1, 5) == order(1, 5)
    assert len(set(order(1, 5))) == 6
    assert order(1, 5) != order(1, 6)
    assert order(1, 5) != order(2, 5)


def test_without_a_seed_every_example_comes_once_in_order(dataset: Dataset) -> None:
    assert [rows.tolist() for rows in batches(dataset, "train", 3, seed=None)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_split_smaller_than_a_batch_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="batch_size 8 is more than the 7 examples of train"):
        batches(dataset, "train", 8, seed=0)


def test_fingerprint_depends_on_content_only(tmp_path: Path) -> None:
    first = write(tmp_path / "a")["fingerprint"]
    assert write(tmp_path / "b", label="another name")["fingerprint"] == first
    assert write(tmp_path / "c", max_length=99)["fingerprint"] != first


def test_writing_again_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    write(tmp_path / "set")
    write(tmp_path / "set", max_length=10)
    assert Dataset(tmp_path / "set").meta["max_length"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_failed_write_leaves_the_old_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(tmp_path / "set")

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays.np, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "set", max_length=10)
    assert Dataset(tmp_path / "set").meta == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 200}, "tokens outside"),
        ({"num_classes": 2}, "labels outside"),
        ({"num_texts": 1}, "examples of shape"),
    ],
)
def test_what_does_not_fit_the_description_is_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "set", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("docs", [[], [*DOCS[:4], np.array([], int)], [*DOCS[:4], np.array([0])]])
def test_texts_need_tokens_and_none_of_them_padding(tmp_path: Path, docs: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="text"):
        write_dataset(tmp_path / "set", docs, splits(), META)


def test_an_example_must_name_a_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names a text that is not there"):
        write_dataset(tmp_path / "set", DOCS[:4], splits(), META)


def test_a_missing_or_damaged_folder_says_what_to_do(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no processed data in .*preprocess the task"):
        Dataset(tmp_path / "none")
    (tmp_path / "set" / "offsets.npy").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        Dataset(tmp_path / "set")


def position_labels(**changes: Any) -> dict[str, Any]:
    """One text an example, with a label at positions 0 and 2 of each."""
    labels = np.full((5, 100), IGNORED)
    labels[:, 0], labels[:, 2] = np.arange(5) % 3, 1
    parts = {"train": slice(0, 3), "dev": slice(3, 4), "test": slice(4, 5)}
    splits = {name: (np.arange(5)[part, None], labels[part]) for name, part in parts.items()}
    meta = {**META, "num_texts": 1, "per_position": True, "pad_to_multiple": 8, **changes}
    return {"docs": DOCS, "splits": splits, "meta": meta}


def test_labels_of_positions_are_cut_and_filled_like_the_texts(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", **position_labels())
    dataset = Dataset(tmp_path / "set")
    assert np.load(tmp_path / "set" / "train_labels.npy").dtype == np.int16
    for rows, length in (([0, 2], 8), ([1], 72)):
        batch = dataset.batch("train", np.array(rows))
        assert batch.tokens.shape[-1] == batch.labels.shape[-1] == length
        assert batch.labels.dtype == torch.int64
        for row, labels in zip(rows, batch.labels.tolist(), strict=True):
            assert labels == [row % 3, IGNORED, 1] + [IGNORED] * (length - 3)
    assert dataset.batch("test", np.array([0]), pad_to_multiple=64).labels.shape == (1, 64)
    assert dataset.batch("dev", np.array([0]), pad_to_multiple=64).labels.shape == (1, 128)


@pytest.mark.parametrize("vocab_size", [256, 257])
@pytest.mark.parametrize("per_position", [False, True])
def test_batches_made_on_a_device_are_the_same(tmp_path: Path, vocab_size: int, per_position: bool) -> None:
    if per_position:
        write_dataset(tmp_path / "set", **position_labels(vocab_size=vocab_size))
    else:
        write(tmp_path / "set", vocab_size=vocab_size)
    dataset = Dataset(tmp_path / "set")
    # The CPU does as a device: what is asked is how a batch is put together there.
    on_device = DatasetOnDevice(dataset, torch.device("cpu"))
    assert dataset.on(torch.device("cpu")) is dataset
    assert on_device.on(torch.device("cpu")) is on_device
    assert on_device.num_examples("train") == dataset.num_examples("train")
    for rows in ([0], [2, 0, 1], [1, 1]):
        for multiple in (None, 1, 128):
            expected, found = (each.batch("train", np.array(rows), multiple) for each in (dataset, on_device))
            for name in ("tokens", "key_mask", "labels"):
                ours, theirs = getattr(found, name), getattr(expected, name)
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)
            assert found.num_labels == expected.num_labels == int((expected.labels != IGNORED).sum())


def test_labels_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels of shape \(3, 100\) with per_position False"):
        write_dataset(tmp_path / "set", **position_labels(per_position=False))
    with pytest.raises(ValueError, match=r"labels of shape \(7,\) with per_position True"):
        write(tmp_path / "set", per_position=True)
    with pytest.raises(ValueError, match="labels outside"):
        write_dataset(tmp_path / "set", **position_labels(num_classes=2))
    unlabelled = position_labels()
    unlabelled["splits"]["train"][1][0] = IGNORED
    with pytest.raises(ValueError, match="train: an example without a label"):
        write_dataset(tmp_path / "set", **unlabelled)
    whole = splits()
    whole["train"][1][0] = IGNORED
    with pytest.raises(ValueError, match="labels outside"):
        write_dataset(tmp_path / "set", DOCS, whole, META)
