"""Processed data of a task: token arrays on disk, memory mapped, and the batches cut from them.

A folder holds

    tokens.npy             uint8 or uint16 [T]: the texts, each cut at `max_length`, one after another
    offsets.npy            int64 [num_docs + 1]: text i is tokens[offsets[i]:offsets[i + 1]]
    SPLIT_examples.npy     int32 [n, num_texts]: which texts make up each example, for SPLIT in train, dev, test
    SPLIT_labels.npy       int64 [n]: the class of each example; or int16 [n, max_length]: of each position
    meta.json              what the data are: sizes, lengths, source, fingerprint

Where the labels are `per_position`, IGNORED stands at the positions that have none, and beyond the end of a text.

Token 0 is padding and never stored. A folder appears complete or not at all.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from schoenbat.errors import UserError
from schoenbat.files import write_bytes

SPLITS = ("train", "dev", "test")
IGNORED = -100
"""The label of a position without one, as torch's cross_entropy has it."""
DEFAULTS = {"per_position": False, "causal": False, "pad_to_multiple": 64}
"""Defaults of a description; see `schoenbat.lra.tasks.Task`."""


@dataclass(frozen=True)
class Batch:
    """Examples padded to a common length N; B examples of `num_texts` texts each."""

    tokens: torch.Tensor
    """int64 [B, num_texts, N]; 0 where there is no token."""
    key_mask: torch.Tensor
    """bool [B, num_texts, N]; True where there is a token."""
    labels: torch.Tensor
    """int64 [B], or [B, N] where labels are per position; IGNORED where a position has none."""
    num_labels: int
    """How many labels there are that are not IGNORED."""


def write_dataset(
    folder: Path,
    docs: Sequence[np.ndarray],
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the arrays of a task into `folder`, replacing what is there.

    Args:
        docs: the tokens of each text, whole; they are cut at `meta["max_length"]` here.
        splits: for each of train, dev, test the examples (ints [n, num_texts], indices into `docs`) and labels (ints
            [n], or [n, max_length] where they are per position).
        meta: task, num_classes, vocab_size, num_texts, max_length, label, source, notes, and what differs from
            `DEFAULTS`.

    Returns:
        `meta` with the sizes of the splits, the lengths of the texts before they were cut, and `fingerprint`, the
        SHA-256 over all arrays; also written as meta.json.

    Raises:
        ValueError: tokens, labels or indices out of range, an empty text, or an example without a label.
    """
    meta = DEFAULTS | dict(meta)
    arrays, lengths = _pack(docs, splits, meta)
    described = {
        **meta,
        "splits": {split: len(arrays[f"{split}_labels"]) for split in SPLITS},
        "lengths": {
            "median": round(float(np.median(lengths))),
            "p95": round(float(np.percentile(lengths, 95))),
            "max": int(lengths.max()),
        },
        "fingerprint": _fingerprint(arrays),
    }
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            write_bytes(part / f"{name}.npy", content.getbuffer())
        write_bytes(part / "meta.json", (json.dumps(described, indent=2, sort_keys=True) + "\n").encode())
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return described


def _pack(
    docs: Sequence[np.ndarray], splits: Mapping[str, tuple[np.ndarray, np.ndarray]], meta: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the arrays to be stored, checked, and the lengths of the texts before they are cut."""
    lengths = np.array([len(doc) for doc in docs], dtype=np.int64)
    if not len(lengths) or lengths.min() == 0:
        raise ValueError("every text needs at least one token, and there must be a text")
    kept = np.minimum(lengths, meta["max_length"])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
    tokens = np.empty(offsets[-1], dtype=np.uint8 if meta["vocab_size"] <= 256 else np.uint16)
    for index, doc in enumerate(docs):
        if doc.min() < 1 or doc.max() >= meta["vocab_size"]:
            raise ValueError(f"text {index} has tokens outside 1..{meta['vocab_size'] - 1}")
        tokens[offsets[index] : offsets[index + 1]] = doc[: kept[index]]
    arrays = {"tokens": tokens, "offsets": offsets}
    for split in SPLITS:
        examples, labels = np.asarray(splits[split][0], np.int32), np.asarray(splits[split][1], np.int64)
        if examples.shape != (len(labels), meta["num_texts"]) or not len(labels):
            raise ValueError(f"{split}: examples of shape {examples.shape} for {len(labels)} labels")
        if examples.min() < 0 or examples.max() >= len(docs):
            raise ValueError(f"{split}: an example names a text that is not there")
        if labels.shape[1:] != ((meta["max_length"],) if meta["per_position"] else ()):
            raise ValueError(f"{split}: labels of shape {labels.shape} with per_position {meta['per_position']}")
        if meta["per_position"] and not (labels != IGNORED).any(axis=1).all():
            raise ValueError(f"{split}: an example without a label")
        given = labels[labels != IGNORED] if meta["per_position"] else labels
        if given.min() < 0 or given.max() >= meta["num_classes"]:
            raise ValueError(f"{split}: labels outside 0..{meta['num_classes'] - 1}")
        arrays[f"{split}_examples"] = examples
        arrays[f"{split}_labels"] = labels.astype(np.int16) if meta["per_position"] else labels
    return arrays, lengths


def _fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


class Dataset:
    """The processed data in a folder.

    Args:
        folder: written by `write_dataset`.

    Raises:
        UserError: the folder is missing or not such a folder.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
            self._offsets = np.load(folder / "offsets.npy")
            self._examples = {split: np.load(folder / f"{split}_examples.npy") for split in SPLITS}
            self._labels = {split: np.load(folder / f"{split}_labels.npy") for split in SPLITS}
        except FileNotFoundError as error:
            raise UserError(
                f"no processed data in {folder}: {error.filename} is missing; preprocess the task"
            ) from None
        except (ValueError, EOFError) as error:
            raise UserError(f"processed data in {folder} cannot be read ({error}); preprocess the task again") from None

    def num_examples(self, split: str) -> int:
        """Return the number of examples of train, dev or test."""
        return len(self._labels[split])

    def labels(self, split: str) -> np.ndarray:
        """Return all labels of a split, in its order: ints [n], or [n, max_length] where they are per position."""
        return self._labels[split]

    def batch(self, split: str, indices: np.ndarray, pad_to_multiple: int | None = None) -> Batch:
        """Return the examples `indices` [B] of a split.

        N is the length of the longest text among them, rounded up to a multiple of `pad_to_multiple` (by default what
        the data's description says).
        """
        starts, ends, length = self._bounds(split, indices, pad_to_multiple)
        tokens = np.zeros((*starts.shape, length), dtype=np.int64)
        for row in np.ndindex(starts.shape):
            tokens[row][: ends[row] - starts[row]] = self._tokens[starts[row] : ends[row]]
        padded = torch.from_numpy(tokens)
        labels = self._labels[split][indices].astype(np.int64)
        if labels.ndim == 2:
            beyond = max(0, length - labels.shape[1])
            labels = np.pad(labels[:, :length], ((0, 0), (0, beyond)), constant_values=IGNORED)
        return Batch(padded, padded != 0, torch.from_numpy(labels), self._num_labels(split, indices))

    def on(self, device: torch.device) -> "Dataset":
        """Return the same data, whose batches are made where a model on `device` reads them.

        For a device other than the CPU all of it is copied there, so that a batch needs no more than its indices.
        """
        return self if device.type == "cpu" else DatasetOnDevice(self, device)

    def _bounds(
        self, split: str, indices: np.ndarray, pad_to_multiple: int | None
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Return where the texts of the examples begin and end among all tokens, [B, num_texts] each, and N."""
        if pad_to_multiple is None:
            pad_to_multiple = self.meta["pad_to_multiple"]
        docs = self._examples[split][indices]
        starts, ends = self._offsets[docs], self._offsets[docs + 1]
        longest = int((ends - starts).max())
        return starts, ends, -(-longest // pad_to_multiple) * pad_to_multiple

    def _num_labels(self, split: str, indices: np.ndarray) -> int:
        return int((self._labels[split][indices] != IGNORED).sum())


class DatasetOnDevice(Dataset):
    """The data of `source`, kept on a device, where its batches are made; they are the same bit for bit."""

    def __init__(self, source: Dataset, device: torch.device) -> None:
        vars(self).update(vars(source))
        self._device = device
        # torch has no arithmetic of its unsigned 16-bit numbers.
        tokens = source._tokens if source._tokens.dtype == np.uint8 else source._tokens.astype(np.int32)
        self._all_tokens = torch.from_numpy(np.array(tokens)).to(device)
        self._all_labels = {split: torch.from_numpy(labels).to(device) for split, labels in source._labels.items()}

    def batch(self, split: str, indices: np.ndarray, pad_to_multiple: int | None = None) -> Batch:
        starts, ends, length = self._bounds(split, indices, pad_to_multiple)
        rows, first, end = (self._copied(array) for array in (indices, starts[..., None], ends[..., None]))
        place = first + torch.arange(length, device=self._device)
        key_mask = place < end
        tokens = self._all_tokens[place.clamp_max(len(self._all_tokens) - 1)].long().masked_fill(~key_mask, 0)
        labels = self._all_labels[split][rows].long()
        if labels.ndim == 2:
            labels = F.pad(labels[:, :length], (0, max(0, length - labels.shape[1])), value=IGNORED)
        return Batch(tokens, key_mask, labels, self._num_labels(split, indices))

    def on(self, device: torch.device) -> Dataset:
        return self if device == self._device else super().on(device)

    def _copied(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


def batches(dataset: Dataset, split: str, batch_size: int, *, seed: int | None, epoch: int = 0) -> Iterator[np.ndarray]:
    """Return the indices of one pass over a split, `batch_size` at a time.

    With a seed the order is a permutation that depends on nothing but (seed, epoch), and an incomplete last batch is
    left out; without one (None) the order is that of the data and the last batch may be smaller.

    Raises:
        UserError: a seed is given and the split is smaller than one batch.
    """
    num_examples = dataset.num_examples(split)
    if seed is None:
        order, end = np.arange(num_examples), num_examples
    else:
        if num_examples < batch_size:
            raise UserError(f"batch_size {batch_size} is more than the {num_examples} examples of {split}")
        order = np.random.default_rng([seed, epoch]).permutation(num_examples)
        end = num_examples - num_examples % batch_size
    return (order[start : start + batch_size] for start in range(0, end, batch_size))
