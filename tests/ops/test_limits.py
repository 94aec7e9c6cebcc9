"""Pieces of the bounded estimate, each against the expectation that it stands for."""

import math
import types

import numpy as np
import pytest
import torch

from schoenbat.ops import _bounds, linear


@pytest.mark.parametrize("degree", [2, 4, 6])
def test_the_excess_of_an_even_degree_is_its_mean_over_gaussian_arguments(degree: int) -> None:
    """E x^p / p! for x from N(0, s^2), by Gauss-Hermite quadrature, times the share of the degree that is described."""
    variance = torch.tensor([0.3, 1.7], dtype=torch.float64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    moment = float((weights * nodes**degree).sum() / math.sqrt(2 * math.pi))
    features = types.SimpleNamespace(shares={0: 1.0, degree: 0.4})
    found = _bounds._even_excess(features, variance)  # type: ignore[arg-type]
    torch.testing.assert_close(found, 0.4 * moment * variance ** (degree // 2) / math.factorial(degree))


def test_a_shift_of_more_queries_than_keys_has_the_gradients_of_finite_differences() -> None:
    """As where several query heads share a head of keys, and nothing is masked."""
    query, key = (
        torch.randn(2, 1, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (6, 3)
    )
    leaves = (query.requires_grad_(), key.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: linear._Shift.apply(q, k, None, None, 0.7), leaves)
