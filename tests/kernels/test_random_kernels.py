"""The kernels that other tests draw from are what they are said to be."""

import math

import pytest
import random_kernels
import torch
from random_kernels import Polynomial, signed_kernels, unsigned_kernels

KERNELS = unsigned_kernels()


def test_there_are_200_and_those_of_a_seed_are_always_the_same() -> None:
    again = unsigned_kernels()
    assert len(KERNELS) == 200
    assert list(again) == list(KERNELS)
    assert all(again[name].coefficient(n) == KERNELS[name].coefficient(n) for name in KERNELS for n in range(13))
    assert list(unsigned_kernels(seed=1)) != list(KERNELS)
    always = {"x^2", "x^4", "yat", "0.001 + x^2", "0.01 + x^2", "exp(x - 20)", "1e-8 exp", "inverse", "log", "sqrt"}
    assert always | {"cosh"} <= set(unsigned_kernels(seed=1))


def test_none_is_negative_inside_its_radius_and_the_signed_ones_are() -> None:
    assert [name for name, kernel in KERNELS.items() if kernel.is_signed] == []
    assert all(kernel.is_signed for kernel in signed_kernels().values())


def test_coefficients_sum_to_the_function() -> None:
    x = torch.linspace(-0.9, 0.9, 19, dtype=torch.float64)
    for name, kernel in (KERNELS | signed_kernels()).items():
        coefficients = [kernel.coefficient(degree) for degree in range(400 if kernel.radius < 2 else 40)]
        assert min(coefficients) >= 0 < max(coefficients), name
        total = sum(a * x**degree for degree, a in enumerate(coefficients))
        torch.testing.assert_close(total, kernel(x), rtol=1e-11, atol=1e-14 * max(coefficients), msg=name)


def test_the_random_ones_are_of_all_kinds() -> None:
    drawn = [kernel for kernel in KERNELS.values() if isinstance(kernel, Polynomial)]
    sparse = [kernel for kernel in drawn if sum(a > 0 for a in kernel.coefficients) <= 3]
    without_constant = [kernel for kernel in drawn if kernel.coefficient(0) == 0]
    with_odd = [kernel for kernel in drawn if any(a > 0 for a in kernel.coefficients[1::2])]
    everywhere = [kernel for kernel in drawn if math.isinf(kernel.radius)]
    tiny = [kernel for kernel in drawn if max(kernel.coefficients) < 1e-6]
    for kind in (sparse, without_constant, with_odd, everywhere, tiny):
        assert 10 <= len(kind) <= len(drawn) - 10


@pytest.mark.parametrize(
    ("coefficients", "edge", "unsigned"),
    [
        ([0.0, 1.0], 1.05, False),
        ([1.0, 1.0], 1.05, False),
        ([1.0, 0.9], 1.05, True),
        ([1.0, 0.9], math.inf, False),
        ([1.0, 2.0, 1.0], math.inf, True),
        ([0.99, 2.0, 1.0], 1.05, False),
        ([0.0, 0.0, 1.0, 1.0], 1.05, False),
        ([0.0, 0.0, 1.0, 0.9], 1.05, True),
        ([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1e-3], 50.0, False),
    ],
)
def test_a_polynomial_that_dips_below_0_is_rejected(coefficients: list[float], edge: float, unsigned: bool) -> None:
    assert random_kernels._is_unsigned(coefficients, edge) == unsigned
