"""Recall tasks: every label is what the sequence says, by solvers that share nothing with what draws them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schoenbat.errors import UserError
from schoenbat.lra.config import build_config
from schoenbat.lra.data.arrays import IGNORED, SPLITS, Dataset
from schoenbat.lra.tasks import TASKS

NAMES = [name for name in TASKS.names() if name.startswith("recall-")]
SMALL = {"train_size": 300, "dev_size": 50, "test_size": 2000}
Row = tuple[list[int], dict[int, int]]
"""The symbols of a sequence, and the label at each position that has one."""


def prepare(name: str, folder: Path, **options: Any) -> Dataset:
    task = TASKS.get(name)
    task(task.Config(**{**SMALL, **options})).prepare(folder, folder / "set")
    return Dataset(folder / "set")


def rows(dataset: Dataset, split: str) -> list[Row]:
    batch = dataset.batch(split, np.arange(dataset.num_examples(split)))
    return [
        ([token - 1 for token in tokens], {at: label for at, label in enumerate(labels) if label != IGNORED})
        for tokens, labels in zip(batch.tokens[:, 0].tolist(), batch.labels.tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_sequences_are_not_padded_and_attention_is_causal(name: str, tmp_path: Path) -> None:
    dataset = prepare(name, tmp_path)
    batch = dataset.batch("train", np.arange(7))
    length = dataset.meta["max_length"]
    assert batch.tokens.shape == (7, 1, length)
    assert batch.labels.shape == (7, length)
    assert batch.key_mask.all()
    assert dataset.meta["causal"]


def test_mqar_asks_for_each_key_once_and_the_label_is_its_value(tmp_path: Path) -> None:
    dataset = prepare("recall-mqar", tmp_path, max_length=32, num_pairs=4, num_symbols=64)
    for symbols, labels in rows(dataset, "test"):
        pairs = dict(zip(symbols[0:8:2], symbols[1:8:2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == len(labels) == 4
        assert max(pairs) < 32 <= min(pairs.values())
        assert sorted(symbols[at] for at in labels) == sorted(pairs)
        assert all(pairs[symbols[at]] == label for at, label in labels.items())
        assert all(at >= 8 and at % 2 == 0 for at in labels)


def test_mqar_places_follow_the_power_law_and_the_rest_is_random(tmp_path: Path) -> None:
    """The first place is drawn first with probability p_1 = 1 / sum i^-0.99; 2,000 keys, within 4 standard errors
    (false-alarm rate 6e-5). The positions between queries take every symbol."""
    dataset = prepare("recall-mqar", tmp_path, max_length=34, num_pairs=1, num_symbols=64)
    found = rows(dataset, "test")
    share = np.mean([2 in labels for _, labels in found])
    weight = np.arange(1, 17) ** -0.99
    expected = weight[0] / weight.sum()
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)
    others = [symbol for symbols, labels in found for at, symbol in enumerate(symbols) if at >= 2 and at not in labels]
    assert set(others) == set(range(64))


def test_copying_tells_the_symbols_in_their_order(tmp_path: Path) -> None:
    dataset = prepare("recall-copying", tmp_path, max_length=24, num_copied=5, num_symbols=9)
    for symbols, labels in rows(dataset, "test"):
        assert [symbol for symbol in symbols if symbol < 9] == [labels[at] for at in range(19, 24)]
        assert symbols[19:] == [10] * 5
        assert symbols[:19].count(9) == 14


def test_noisy_labels_are_the_value_of_the_key_where_it_came_before(tmp_path: Path) -> None:
    """With 3 keys, 4 values and 2 symbols of noise; a share of steps within 4 standard errors of `noise`."""
    dataset = prepare("recall-noisy", tmp_path, max_length=20, num_keys=3, num_values=4, num_noise=2, noise=0.3)
    steps = noisy = 0
    for symbols, labels in rows(dataset, "test"):
        known: dict[int, int] = {}
        at = 0
        while at < 19:
            symbol = symbols[at]
            steps += at < 10
            noisy += at < 10 and symbol >= 7
            if symbol >= 7:
                assert at not in labels
                at += 1
                continue
            assert symbol < 3, "a value without its key"
            value = symbols[at + 1] - 3
            assert 0 <= value < 4
            assert labels.get(at) == known.get(symbol)
            assert known.setdefault(symbol, value) == value, "a key with two values"
            at += 2
        assert labels
    assert abs(noisy / steps - 0.3) < 4 * np.sqrt(0.3 * 0.7 / steps)


def test_memorisation_has_one_map_for_all_sequences(tmp_path: Path) -> None:
    dataset = prepare("recall-memorisation", tmp_path, max_length=9, num_keys=20, num_values=6)
    known: dict[int, int] = {}
    for split in SPLITS:
        for symbols, labels in rows(dataset, split):
            assert sorted(labels) == [1, 3, 5, 7]
            assert [symbols[at] for at in labels] == [20] * 4
            assert all(known.setdefault(symbols[at - 1], label) == label for at, label in labels.items())
    assert len(known) == 20
    other = prepare("recall-memorisation", tmp_path / "b", max_length=9, num_keys=20, num_values=6, seed=1)
    assert any(known[symbols[0]] != labels[1] for symbols, labels in rows(other, "test"))


@pytest.mark.parametrize("name", NAMES)
def test_dev_and_test_ignore_the_training_size_and_follow_the_seed(name: str, tmp_path: Path) -> None:
    small = {"dev_size": 20, "test_size": 20}
    one = prepare(name, tmp_path / "1", train_size=50, **small)
    more = prepare(name, tmp_path / "2", train_size=90, **small)
    other = prepare(name, tmp_path / "3", train_size=50, seed=1, **small)
    for split in ("dev", "test"):
        assert rows(one, split) == rows(more, split) != rows(other, split)
    assert rows(more, "train")[:50] == rows(one, "train")


def test_guessing_among_what_is_present_is_scored(tmp_path: Path) -> None:
    """Against 2,000 sequences and a guess at each label, within 4 standard errors (false-alarm rate 6e-5)."""
    assert TASKS.get("recall-mqar")(TASKS.get("recall-mqar").Config()).baselines(
        prepare("recall-mqar", tmp_path / "m")
    )["one of the values present"] == pytest.approx(0.25)
    generator = np.random.default_rng(0)
    options = {"max_length": 24, "num_copied": 5, "num_symbols": 9}
    dataset = prepare("recall-copying", tmp_path / "c", **options)
    task = TASKS.get("recall-copying")
    stated = task(task.Config(**options)).baselines(dataset)["one of the symbols present"]
    hits = [
        generator.choice([symbol for symbol in symbols if symbol < 9]) == label
        for symbols, labels in rows(dataset, "test")
        for label in labels.values()
    ]
    assert abs(np.mean(hits) - stated) < 4 * np.sqrt(stated * (1 - stated) / len(hits))
    noisy_options = {"max_length": 20, "num_keys": 3, "num_values": 4, "num_noise": 2}
    dataset = prepare("recall-noisy", tmp_path / "n", **noisy_options)
    task = TASKS.get("recall-noisy")
    stated = task(task.Config(**noisy_options)).baselines(dataset)["one of the values present"]
    hits = [
        generator.choice([symbol - 3 for symbol in symbols[:at] if 3 <= symbol < 7]) == label
        for symbols, labels in rows(dataset, "test")
        for at, label in labels.items()
    ]
    assert abs(np.mean(hits) - stated) < 4 * np.sqrt(stated * (1 - stated) / len(hits))


def test_too_few_sequences_end_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="recall-copying: only 16 different sequences were found for 2 of 4 symbols in 4"
    ):
        prepare("recall-copying", tmp_path, max_length=4, num_copied=2, num_symbols=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("recall-mqar", {"num_pairs": 9}, "num_pairs must lie in 1..max_length / 4 = 8, not 9"),
        ("recall-mqar", {"num_symbols": 7}, "num_symbols must be even and at least 8"),
        ("recall-copying", {"num_copied": 33}, "num_copied must lie in"),
        ("recall-noisy", {"noise": 1.0}, r"noise must lie in \[0, 1\)"),
        ("recall-noisy", {"num_keys": 0}, "num_keys must be at least 1"),
        ("recall-memorisation", {"num_values": 1}, "num_keys and num_values must be at least 2"),
        ("recall-memorisation", {"max_length": 1}, "max_length must be at least 2"),
        ("recall-mqar", {"train_size": 0}, "train_size must be at least 1"),
        ("recall-mqar", {"seed": -1}, "seed must not be negative"),
    ],
)
def test_wrong_settings_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(TASKS.get(name).Config, options, "here")
