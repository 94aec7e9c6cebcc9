"""What the base class makes of any kernel: its sign, its two parts, and normalised weights of any size."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from schoenbat.errors import UserError
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.ops.reference import SMALLEST_SHARE, normalise

SIGNED: dict[str, Callable[[Tensor], Tensor]] = {
    "x": lambda x: x,
    "sinh": torch.sinh,
    "x^3": lambda x: x**3,
    "x + 0.1 x^2": lambda x: x + 0.1 * x**2,
    "x^2 + x^3": lambda x: x**2 + x**3,
    "1e-9 + x^2 + x^3": lambda x: 1e-9 + x**2 + x**3,
    "1e-6 + x": lambda x: 1e-6 + x,
    "1e-200 x^41": lambda x: 1e-200 * x**41,
    "exp(x) - 1": torch.expm1,
}
UNSIGNED: dict[str, Callable[[Tensor], Tensor]] = {
    "cosh": torch.cosh,
    "x^4": lambda x: x**4,
    "x^40": lambda x: x**40,
    "(0.3 + x)^2": lambda x: (0.3 + x) ** 2,
    "exp(x - 20)": lambda x: torch.exp(x - 20),
    "1e-8 exp": lambda x: 1e-8 * torch.exp(x),
    "exp(100 x)": lambda x: torch.exp(100 * x),
}


@pytest.mark.parametrize("name", SIGNED)
def test_a_kernel_that_is_negative_somewhere_is_signed(name: str) -> None:
    assert Kernel.from_callable(SIGNED[name]).is_signed


@pytest.mark.parametrize("name", UNSIGNED)
def test_a_kernel_that_is_negative_nowhere_is_not_signed(name: str) -> None:
    assert not Kernel.from_callable(UNSIGNED[name]).is_signed


@pytest.mark.parametrize("name", ["exp", "inverse", "log", "sqrt", "trigh", "power2", "yat"])
def test_no_kernel_of_the_library_is_signed(name: str) -> None:
    assert not KERNELS.get(name)().is_signed


def test_the_sign_is_asked_for_inside_the_radius_only() -> None:
    assert not Kernel.from_callable(lambda x: 0.5 + x, 0.5).is_signed
    assert Kernel.from_callable(lambda x: 0.5 + x, 0.6).is_signed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8, 1e30])
def test_normalised_weights_do_not_depend_on_the_size_of_the_kernel(size: float, dtype: torch.dtype) -> None:
    scores = torch.randn(4, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    allowed = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    for f in (torch.exp, torch.cosh, lambda x: x**2):
        tiny = Kernel.from_callable(lambda x, f=f: size * f(x))
        torch.testing.assert_close(
            normalise(tiny, scores, allowed), normalise(Kernel.from_callable(f), scores, allowed), rtol=1e-5, atol=0
        )


def test_weights_below_the_smallest_normal_number_still_sum_to_one() -> None:
    weights = normalise(KERNELS.get("power2")(), torch.tensor([[1e-20, 2e-20, 0.0]]), None)
    torch.testing.assert_close(weights, torch.tensor([[0.2, 0.8, 0.0]]), rtol=1e-4, atol=0)


def test_a_row_of_weights_that_are_all_0_comes_out_uniform() -> None:
    scores = torch.zeros(2, 4, requires_grad=True)
    weights = normalise(KERNELS.get("power2")(), scores, torch.tensor([True, True, True, False]))
    weights.square().sum().backward()
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0]]).expand(2, 4))
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_weights_that_cancel_stay_finite_and_sum_to_one() -> None:
    kernel = Kernel.from_callable(torch.sinh)
    scores = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0 - 1e-6, 0.0], [2.0, -1.0, 0.5]], dtype=torch.float64)
    weights = normalise(kernel, scores, None)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    assert weights.abs().max() <= 1.2 / SMALLEST_SHARE
    torch.testing.assert_close(weights[2], scores[2].sinh() / scores[2].sinh().sum())
    assert weights[1, 0] < 0 < weights[1, 1], "a small negative sum keeps its sign"


def test_yat_takes_another_epsilon_and_refuses_one_that_is_not_positive() -> None:
    kernel = KERNELS.get("yat")
    assert kernel().radius == 1.05
    one = kernel(epsilon=1.0)  # type: ignore[call-arg]
    x = torch.tensor([-1.0, 0.5, 1.0])
    torch.testing.assert_close(one(x), x**2 / (3 - 2 * x))
    assert sum(one.coefficient(degree) * 0.5**degree for degree in range(60)) == pytest.approx(0.25 / 2)
    for epsilon in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="epsilon of the Yat kernel must be positive, not "):
            kernel(epsilon=epsilon)  # type: ignore[call-arg]
