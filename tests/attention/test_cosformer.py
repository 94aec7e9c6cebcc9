"""cosFormer's features against the quadratic form of its weights, in NumPy."""

import numpy as np
import pytest
import torch
from heads import build, normal, ragged


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_the_quadratic_form(is_causal: bool) -> None:
    query, key, value = normal(2, 2, 130, 8)
    lengths = (130, 70)
    found = build("cosformer", 8, max_length=150)(query, key, value, ragged(list(lengths), 130), is_causal)
    for example, length in enumerate(lengths):
        for head in range(2):
            q, k, v = (x[example, head, :length].numpy() for x in (query, key, value))
            places = np.arange(length)
            cosine = np.cos(np.pi * (places[:, None] - places) / 300)
            weights = np.maximum(q, 0) @ np.maximum(k, 0).T * cosine
            weights = np.tril(weights) if is_causal else weights
            total = weights.sum(-1, keepdims=True)
            expected = np.where(total > 0, weights @ v / np.where(total > 0, total, 1), 0)
            torch.testing.assert_close(
                found[example, head, :length], torch.from_numpy(expected), rtol=1e-10, atol=1e-10
            )
