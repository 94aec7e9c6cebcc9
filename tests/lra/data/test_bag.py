"""Logistic regression on frequencies of tokens: it finds what a word tells, and its minimum is one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from schoenbat.lra.data.arrays import Dataset, write_dataset
from schoenbat.lra.data.bag import PENALTY, bag_accuracy, fit, frequencies


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three labels; token 1 + label is twice as likely as others, and the order is random."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 700)
    weights = np.ones((3, 6)) + np.eye(3, 6)
    docs = [1 + rng.choice(6, rng.integers(20, 90), p=weights[label] / weights[label].sum()) for label in labels]
    rows = np.arange(700)[:, None]
    parts = {"train": slice(0, 400), "dev": slice(400, 410), "test": slice(410, 700)}
    meta = {"num_classes": 3, "vocab_size": 7, "num_texts": 1, "max_length": 90}
    write_dataset(tmp_path / "set", docs, {name: (rows[part], labels[part]) for name, part in parts.items()}, meta)
    return Dataset(tmp_path / "set")


def test_frequencies_are_shares_of_the_tokens_that_are_there(dataset: Dataset) -> None:
    found = frequencies(dataset, "dev")
    batch = dataset.batch("dev", np.arange(10))
    for row, tokens in enumerate(batch.tokens[:, 0]):
        kept = tokens[tokens > 0]
        assert found[row].tolist() == [float((kept == token).double().mean()) if token else 0.0 for token in range(7)]


def test_it_tells_labels_apart_that_differ_in_frequencies(dataset: Dataset) -> None:
    """Guessing gives 0.33, and with 290 examples 0.44 at four standard errors."""
    assert bag_accuracy(dataset) > 0.6


def test_weights_are_at_the_minimum_of_the_penalised_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] + torch.randn(200, generator=generator) > 0).long()
    weight, bias = (x.requires_grad_() for x in fit(features, labels, 2))
    loss = torch.nn.functional.cross_entropy(features @ weight + bias, labels) + PENALTY * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4
