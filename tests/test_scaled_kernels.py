"""A kernel times a constant is the same attention, and arguments for which f overflows are no silent NaN."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from schoenbat import Estimate, Kernel, UserError, calibrate_tensors

pytestmark = pytest.mark.filterwarnings("ignore::schoenbat.PoorEstimateWarning")

Function = Callable[[Tensor], Tensor]
KERNELS: dict[str, Function] = {
    "exp": torch.exp,
    "cosh": lambda x: torch.cosh(x) + 0.3 * torch.sinh(x),
    "1 + 1e-6 x + x^6": lambda x: 1 + 1e-6 * x + x**6,
}
FACTORS = (1e-300, 1e-12, 3.0, 1e30, 1e300)


def unit_vectors(head_dim: int) -> list[Tensor]:
    query, key, value = torch.randn(3, 1, 2, 80, head_dim, generator=torch.Generator().manual_seed(0))
    return [torch.nn.functional.normalize(query, dim=-1), torch.nn.functional.normalize(key, dim=-1), value]


def times(factor: float, f: Function) -> Kernel:
    return Kernel.from_callable(lambda x: factor * f(x))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_times_a_constant_is_the_same_attention(name: str, factor: float) -> None:
    """The same bits but for the rounding of c f itself, in float64."""
    plain, scaled = Kernel.from_callable(KERNELS[name]), times(factor, KERNELS[name])
    for head_dim, num_features in ((4, None), (4, 16), (4, 70), (4, 1024), (64, 16), (64, 256), (64, 4096)):
        query, key, value = unit_vectors(head_dim)
        for is_causal in (False, True):
            one, other = (
                Estimate(kernel, num_features).attend(query, key, value, is_causal=is_causal, scale=1.0)
                for kernel in (plain, scaled)
            )
            assert one.isfinite().all()
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_kernel_times_a_constant_is_calibrated_alike_and_published_features_are_too(factor: float) -> None:
    query, key, value = unit_vectors(8)
    kernels = Kernel.from_callable(KERNELS["cosh"]), times(factor, KERNELS["cosh"])
    spread = 0.7 ** torch.arange(8)
    found = [calibrate_tensors(query * spread, key * spread, value, estimate=Estimate(k, 48)) for k in kernels]
    one, other = (calibrated(query * spread, key * spread, value) for calibrated in found)
    assert one.isfinite().all()
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    one, other = (Estimate(k, 48, "maclaurin").attend(query, key, value) for k in kernels)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_features_are_those_of_f_itself() -> None:
    query, key, _ = unit_vectors(4)
    kernel = times(1e12, torch.cosh)
    features = Estimate(kernel, 1000).make(4, 1.0)
    torch.testing.assert_close(features(query) @ features(key).mT, kernel(query @ key.mT), rtol=1e-4, atol=0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_scores_beyond_the_range_of_float32_are_those_of_float64(is_causal: bool) -> None:
    query, key, value = torch.randn(3, 1, 1, 40, 8, generator=torch.Generator().manual_seed(0))
    query, key = 4.5 * query, 4.5 * key
    assert (query @ key.mT).max() > 100
    for f, scale in ((torch.exp, 1.0), (torch.cosh, 1.0), (lambda x: torch.exp(2 * x), 0.5)):
        kernel = Kernel.from_callable(f)
        found = Estimate(kernel, None).attend(query, key, value, is_causal=is_causal, scale=scale)
        scores = (scale * query.double() @ key.double().mT).masked_fill(
            ~torch.ones(40, 40, dtype=torch.bool).tril() if is_causal else torch.tensor(False), -torch.inf
        )
        weights = kernel(scores).where(scores > -torch.inf, 0.0)
        expected = weights @ value.double() / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        estimated = Estimate(kernel, 64).attend(query, key, value, is_causal=is_causal, scale=scale)
        assert estimated.isfinite().all()


@pytest.mark.parametrize("num_features", [None, 16, 256])
def test_arguments_for_which_f_overflows_are_refused(num_features: int | None) -> None:
    query = torch.full((1, 1, 4, 8), 60.0)
    with pytest.raises(
        UserError, match=r"leaves the range of floating-point numbers for arguments above 6.*Lower scale"
    ):
        Estimate(Kernel.from_callable(torch.cosh), num_features).attend(query, query, query, scale=1.0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("size", [1e3, 1e9, 1e18, 1e30])
def test_vectors_of_any_size_give_finite_outputs_and_gradients(size: float, head_dim: int, is_causal: bool) -> None:
    tensors = torch.randn(3, 1, 2, 150, head_dim, generator=torch.Generator().manual_seed(0))
    for num_features in (1, 40, 300):
        query, key, value = (size * tensors[0], size * tensors[1], tensors[2].clone())
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out = Estimate("exp", num_features).attend(*leaves, is_causal=is_causal, self_attention=True)
        out.square().sum().backward()
        assert out.isfinite().all()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
