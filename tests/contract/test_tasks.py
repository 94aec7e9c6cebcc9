"""What every task promises, checked on its own tiny sample without any download."""

from dataclasses import MISSING, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schoenbat.errors import UserError
from schoenbat.lra.config import build_config
from schoenbat.lra.data.arrays import IGNORED, SPLITS, Dataset, batches
from schoenbat.lra.tasks import TASKS, Task

META_KEYS = {
    "task",
    "num_classes",
    "vocab_size",
    "num_texts",
    "per_position",
    "causal",
    "pad_to_multiple",
    "max_length",
    "splits",
    "lengths",
    "label",
    "source",
    "fingerprint",
    "notes",
}


@pytest.fixture(params=TASKS.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prepared(name: str, folder: Path) -> tuple[Task, dict[str, Any], Dataset]:
    task_class = TASKS.get(name)
    task = task_class(task_class.sample(folder / "raw"))
    meta = task.prepare(folder / "raw", folder / "processed")
    return task, meta, Dataset(folder / "processed")


def test_meta_says_what_the_data_are(name: str, tmp_path: Path) -> None:
    task, meta, dataset = prepared(name, tmp_path)
    assert META_KEYS <= set(meta) <= META_KEYS | {"class_names", "tokens", "vocabulary"}
    assert meta == dataset.meta
    assert (meta["task"], meta["num_texts"]) == (name, task.num_texts)
    assert (meta["num_classes"], meta["vocab_size"]) == (task.num_classes, task.vocab_size)
    for declared in ("per_position", "causal", "pad_to_multiple"):
        assert meta[declared] == getattr(task, declared)
    assert meta["max_length"] == task.config.max_length
    assert meta["label"]
    assert meta["source"]
    print(f"{name}: {meta['splits']}, {meta['lengths']}, {meta['notes']}")


def test_every_example_fits_the_problem(name: str, tmp_path: Path) -> None:
    task, meta, dataset = prepared(name, tmp_path)
    for split in SPLITS:
        assert meta["splits"][split] == dataset.num_examples(split) > 0
        for rows in batches(dataset, split, 4, seed=None):
            batch = dataset.batch(split, rows)
            assert batch.tokens.shape == batch.key_mask.shape == (len(rows), task.num_texts, batch.tokens.shape[-1])
            assert batch.tokens.min() >= 0
            assert batch.tokens.max() < task.vocab_size
            assert ((batch.tokens == 0) == ~batch.key_mask).all()
            assert batch.key_mask[..., 0].all(), "a text without tokens"
            assert (batch.key_mask[..., 1:] <= batch.key_mask[..., :-1]).all(), "padding before a token"
            assert batch.key_mask.sum(-1).max() <= meta["max_length"]
            assert batch.labels.shape == ((len(rows), batch.tokens.shape[-1]) if task.per_position else (len(rows),))
            given = batch.labels[batch.labels != IGNORED] if task.per_position else batch.labels
            assert given.min() >= 0
            assert given.max() < task.num_classes
            if task.per_position:
                assert batch.key_mask[:, 0][batch.labels != IGNORED].all(), "a label beyond the text"


def test_splits_share_no_example(name: str, tmp_path: Path) -> None:
    _, meta, dataset = prepared(name, tmp_path)
    texts = {}
    for split in SPLITS:
        batch = dataset.batch(split, np.arange(meta["splits"][split]), pad_to_multiple=meta["max_length"])
        texts[split] = {tokens.numpy().tobytes() for tokens in batch.tokens}
    for one, other in combinations(SPLITS, 2):
        assert not texts[one] & texts[other], f"{one} and {other}"


def test_train_and_test_know_every_label(name: str, tmp_path: Path) -> None:
    task, _, dataset = prepared(name, tmp_path)
    for split in ("train", "test"):
        labels = dataset.labels(split)
        assert len(np.unique(labels[labels != IGNORED])) >= min(task.num_classes, 4)


def test_preparing_twice_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    prepared(name, tmp_path / "a")
    prepared(name, tmp_path / "b")
    for path in sorted((tmp_path / "a" / "processed").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / "processed" / path.name).read_bytes(), path.name


def test_the_config_is_built_from_what_it_must_be_told_and_holds_max_length(name: str, tmp_path: Path) -> None:
    sample = TASKS.get(name).sample(tmp_path)
    told = {field.name: getattr(sample, field.name) for field in fields(sample) if field.default is MISSING}
    config = build_config(TASKS.get(name).Config, told | {"max_length": 3000}, f"task.{name}.data")
    assert config.max_length == 3000


def test_generated_or_told_how_to_get(name: str, tmp_path: Path) -> None:
    task_class = TASKS.get(name)
    if not task_class.how_to_get:
        provenance = task_class(task_class.Config()).download(tmp_path, None, 0, None)
        assert provenance == {"generated": True}
    else:
        assert "\n" not in task_class.how_to_get


def test_baselines_are_shares_and_the_majority_class_is_among_them(name: str, tmp_path: Path) -> None:
    task, _, dataset = prepared(name, tmp_path)
    baselines = task.baselines(dataset)
    labels = {split: [v for v in dataset.labels(split).ravel().tolist() if v != IGNORED] for split in SPLITS}
    counts = {label: labels["train"].count(label) for label in set(labels["train"])}
    commonest = max(sorted(counts), key=lambda label: counts[label])
    assert baselines["majority class"] == labels["test"].count(commonest) / len(labels["test"])
    assert all(0 <= share <= 1 for share in baselines.values())


def test_a_text_is_encoded_as_prepare_encodes_it_or_the_task_has_no_texts(name: str, tmp_path: Path) -> None:
    task, meta, _ = prepared(name, tmp_path)
    if type(task).encode.__func__ is Task.encode.__func__:
        with pytest.raises(UserError, match="no texts"):
            task.encode("a text", meta)
        return
    tokens = task.encode("[MAX 2 [MED 4 7 9 ] ]" if name == "lra-listops" else "A gem, which is good.", meta)
    assert len(tokens) > 0
    assert tokens.min() >= 1
    assert tokens.max() < meta["vocab_size"]
    assert len(task.class_names or meta.get("class_names", [])) in (0, meta["num_classes"])
