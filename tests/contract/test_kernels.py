"""What every kernel promises."""

import math

import pytest
import torch

from schoenbat.kernels import KERNELS, Kernel
from schoenbat.ops.reference import normalise

pytestmark = pytest.mark.parametrize("kernel", [KERNELS.get(name)() for name in KERNELS.names()], ids=KERNELS.names())


def test_coefficients_are_not_negative(kernel: Kernel) -> None:
    coefficients = [kernel.coefficient(degree) for degree in range(40)]
    assert min(coefficients) >= 0
    assert max(coefficients) > 0


def test_series_sums_to_the_function(kernel: Kernel) -> None:
    x = torch.linspace(-0.6, 0.6, 25, dtype=torch.float64)
    series = sum(kernel.coefficient(degree) * x**degree for degree in range(80))
    torch.testing.assert_close(series, kernel(x), rtol=1e-12, atol=1e-12)


def test_weights_inside_the_radius_are_negative_for_signed_kernels_only(kernel: Kernel) -> None:
    edge = min(kernel.radius, 16.0) * 0.999
    values = kernel(torch.linspace(-edge, edge, 1001, dtype=torch.float64))
    assert (values < -1e-12 * values.max()).any() == kernel.is_signed


def test_function_leaves_its_argument_alone(kernel: Kernel) -> None:
    x = torch.linspace(-0.5, 0.5, 11)
    before = x.clone()
    kernel(x)
    assert torch.equal(x, before)


def test_normalised_weights_are_the_function_over_its_sum(kernel: Kernel) -> None:
    scores = torch.rand(3, 7, dtype=torch.float64) - 0.5
    allowed = torch.rand(3, 7) < 0.6
    allowed[:, 0] = True
    weights = kernel(scores) * allowed
    torch.testing.assert_close(normalise(kernel, scores, allowed), weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(normalise(kernel, scores, None), kernel(scores) / kernel(scores).sum(-1, keepdim=True))


@pytest.mark.parametrize("standing", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stands_at_a_masked_place_changes_no_bit(kernel: Kernel, standing: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(5, 9, dtype=dtype, generator=generator) - 0.5
    allowed = torch.rand(5, 9, generator=generator) < 0.6
    allowed[:, 0] = True
    results = []
    for x in (scores, scores.masked_fill(~allowed, standing)):
        x.requires_grad_()
        weights = normalise(kernel, x, allowed)
        (weights**2).sum().backward()
        results.append((weights, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_row_without_keys_is_finite_and_leaves_the_others_alone(kernel: Kernel) -> None:
    scores = torch.rand(2, 5) - 0.5
    allowed = torch.tensor([[False] * 5, [True] * 5])
    weights = normalise(kernel, scores, allowed)
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(weights[1].sum(), torch.tensor(1.0))


def test_masked_scores_may_lie_outside_the_domain(kernel: Kernel) -> None:
    scores = torch.tensor([[0.1, 0.2, 1e4]], requires_grad=True)
    weights = normalise(kernel, scores, torch.tensor([[True, True, False]]))
    weights[0, 0].backward()
    assert scores.grad is not None
    assert torch.isfinite(weights).all()
    assert torch.isfinite(scores.grad).all()


def test_exponential_kernels_are_a_softmax_and_do_not_overflow(kernel: Kernel) -> None:
    if not kernel.is_exponential:
        pytest.skip("its range is that of f in the dtype of the scores")
    weights = normalise(kernel, torch.tensor([[1e4, 1e4 - 1.0, -1e4]]), None)
    torch.testing.assert_close(weights, torch.tensor([[1.0, math.exp(-1), 0.0]]) / (1 + math.exp(-1)))
