"""The unnormalised Gaussian kernel."""

import pytest
import torch
from heads import build, normal, ragged

pairwise = pytest.importorskip("sklearn.metrics.pairwise", reason="scikit-learn (extra oracles) is not installed")


def test_it_is_scikit_learns_rbf_kernel_times_the_values() -> None:
    query, key, value = normal(2, 2, 33, 8)
    mask = ragged([33, 20], 33)
    found = build("gaussian", 8)(query, key, value, mask)
    causal = build("gaussian", 8)(query, key, value, mask, is_causal=True)
    for example, length in enumerate((33, 20)):
        for head in range(2):
            q, k = (x[example, head, :length].numpy() * 8**-0.25 for x in (query, key))
            weights = torch.from_numpy(pairwise.rbf_kernel(q, k, gamma=0.5))
            v = value[example, head, :length]
            torch.testing.assert_close(found[example, head, :length], weights @ v, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(causal[example, head, :length], weights.tril() @ v, rtol=1e-10, atol=1e-10)


def test_nothing_divides_the_sum() -> None:
    _, _, value = normal(1, 1, 50, 8)
    same = torch.zeros(1, 1, 50, 8, dtype=torch.float64)
    torch.testing.assert_close(build("gaussian", 8)(same, same, value), value.sum(-2, keepdim=True).expand_as(value))
