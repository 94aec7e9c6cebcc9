"""Logistic regression on how often each token occurs: what a text tells without any order."""

import numpy as np
import torch
from torch.nn import functional as F

from schoenbat.lra.data.arrays import Dataset, batches

PENALTY = 1e-3
"""Of the squared weights, beside the mean cross-entropy, for features of standard deviation 1."""


def bag_accuracy(dataset: Dataset) -> float:
    """Score a regression fitted on train on the test split; for data with one text and one label an example."""
    train, test = frequencies(dataset, "train"), frequencies(dataset, "test")
    mean, spread = train.mean(0), train.std(0).clamp_min(1e-9)
    weight, bias = fit((train - mean) / spread, torch.from_numpy(dataset.labels("train")), dataset.meta["num_classes"])
    scores = ((test - mean) / spread) @ weight + bias
    return float((scores.argmax(-1) == torch.from_numpy(dataset.labels("test"))).double().mean())


def frequencies(dataset: Dataset, split: str) -> torch.Tensor:
    """Count the share of each token of a text, float64 [n, vocab_size]; token 0, padding, has none."""
    shares = []
    for rows in batches(dataset, split, 256, seed=None):
        tokens = dataset.batch(split, rows).tokens[:, 0].numpy()
        counts = np.stack([np.bincount(row, minlength=dataset.meta["vocab_size"]) for row in tokens])
        counts[:, 0] = 0
        shares.append(counts / counts.sum(axis=1, keepdims=True))
    return torch.from_numpy(np.concatenate(shares))


def fit(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit weights [num_features, num_classes] and biases [num_classes] of least penalised cross-entropy, from zeros."""
    weight = torch.zeros(features.shape[1], num_classes, dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
