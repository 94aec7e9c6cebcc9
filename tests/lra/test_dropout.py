"""Dropout by random bits drops what it should, independently, and says so with the seed alone."""

import math

import pytest
import torch
from torch.nn import functional as F

from schoenbat.lra.dropout import Dropout


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_values_are_dropped_at_the_rate_and_the_others_keep_the_mean(p: float) -> None:
    """Each bound is five standard errors wide: a false alarm in 2 million."""
    torch.manual_seed(0)
    kept = Dropout(p)(torch.ones(400, 1000)) != 0
    error = 5 * math.sqrt(p * (1 - p))
    assert abs(kept.double().mean() - (1 - p)) < error / math.sqrt(kept.numel())
    # Each of the four parts of a number of 64 bits, and each pair of neighbours.
    for lane in range(4):
        assert abs(kept.flatten()[lane::4].double().mean() - (1 - p)) < error / math.sqrt(kept.numel() / 4)
    centred = kept.flatten().double() - (1 - p)
    for distance in (1, 2, 3, 4, 1000):
        covariance = (centred[:-distance] * centred[distance:]).mean()
        assert abs(covariance) < 5 * p * (1 - p) / math.sqrt(kept.numel() - distance)


def test_values_that_stay_are_scaled_and_so_is_their_gradient() -> None:
    x = torch.rand(3, 5, 7, dtype=torch.float64).add_(1).requires_grad_()
    y = Dropout(0.25)(x)
    kept = y != 0
    torch.testing.assert_close(y, x * kept / 0.75)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, kept / 0.75, check_dtype=False)


def test_the_seed_decides_what_is_dropped() -> None:
    drop, x = Dropout(0.5), torch.ones(1001)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(drop(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_nothing_is_dropped_in_evaluation_or_at_the_rate_0() -> None:
    x = torch.randn(100)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    assert Dropout(0.5)(torch.ones(10, dtype=dtype)).dtype == dtype


def test_an_empty_tensor_stays_empty() -> None:
    assert Dropout(0.5)(torch.ones(0, 3)).shape == F.dropout(torch.ones(0, 3)).shape
