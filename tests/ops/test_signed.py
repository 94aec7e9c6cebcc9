"""Attention by a kernel of both signs is sum f v / sum f, exact or through features that describe f.

All arguments are the keys themselves, as the only query is 1.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from schoenbat import Estimate, Kernel

CASES: dict[str, tuple[Callable[[Tensor], Tensor], list[float], list[float]]] = {
    "a negative sum": (lambda x: x, [-1, -2], [0, 1]),
    "a negative sum of sinh": (torch.sinh, [-1, -2], [0, 1]),
    "a negative sum of 1 + x": (lambda x: 1 + x, [-2, -3], [0, 1]),
    "weights of both signs": (lambda x: x, [-1, 2, 0.5], [0, 1, 2]),
    "no weight negative, one small": (lambda x: (1 + x) ** 3, [0.5, 0.5, -0.9], [0, 0, 1]),
    "no weight negative": (lambda x: 1 + x + x**2 / 2 + x**3 / 6, [0.9, 0.9, -1.4], [0, 0, 1]),
}


def attended(
    kernel: Kernel, keys: list[float], values: list[float], *, num_features: int | None, causal: bool
) -> Tensor:
    key, value = (torch.tensor(x, dtype=torch.float64).reshape(1, 1, -1, 1) for x in (keys, values))
    query = torch.ones_like(key)
    return Estimate(kernel, num_features).attend(query, key, value, is_causal=causal, scale=1.0)[0, 0, -1, 0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_features", [None, 64])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_formula(name: str, num_features: int | None, causal: bool) -> None:
    f, keys, values = CASES[name]
    weights = f(torch.tensor(keys, dtype=torch.float64))
    expected = float(weights @ torch.tensor(values, dtype=torch.float64) / weights.sum())
    found = attended(Kernel.from_callable(f), keys, values, num_features=num_features, causal=causal)
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_and_estimated_attention_meet_a_sum_near_0_alike(causal: bool) -> None:
    """The sum of x and -x (1 + 1e-6) is moved to 2e-3 x, negative; what is added is the weight of the mean value."""
    for f, size in ((lambda x: x, 1.0), (torch.sinh, math.sinh(1.0))):
        kernel, keys, values = Kernel.from_callable(f), [1.0, -1.0 - 1e-6], [0.0, 1.0]
        found = [attended(kernel, keys, values, num_features=n, causal=causal) for n in (None, 64)]
        expected = (-size + 0.5 * -2e-3 * size) / (-2e-3 * size)
        assert [float(x) for x in found] == pytest.approx([expected, expected], rel=1e-3)


def test_a_far_field_of_both_signs_is_the_formula() -> None:
    """200 tokens are several chunks, of which the last query sees all but one through features."""
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 1, 200, 1, generator=generator, dtype=torch.float64)
    key = key - 0.7
    kernel = Kernel.from_callable(lambda x: x + x**3)
    exact, found = (
        Estimate(kernel, n).attend(torch.ones_like(key), key, value, is_causal=True, scale=1.0) for n in (None, 64)
    )
    weights = kernel(key)
    expected = (weights * value).cumsum(2) / weights.cumsum(2)
    far_from_0 = weights.cumsum(2).abs() > 0.05 * weights.abs().cumsum(2)
    assert far_from_0.float().mean() > 0.9
    torch.testing.assert_close(exact[far_from_0], expected[far_from_0])
    torch.testing.assert_close(found[far_from_0], expected[far_from_0], rtol=1e-5, atol=1e-5)
