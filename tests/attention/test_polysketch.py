"""Polynomial sketches: unbiased before they are squared, and consistent after."""

import math

import pytest
import torch
from heads import build, normal, ragged, relative_error
from torch import Tensor


def powers(query: Tensor, key: Tensor, degree: int) -> Tensor:
    def prepared(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * x.shape[-1] ** -0.25

    return (prepared(query) @ prepared(key).mT) ** degree


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_second_degree_is_exact(is_causal: bool) -> None:
    query, key, value = normal(2, 2, 90, 6)
    mask = ragged([90, 40], 90)
    weights = powers(query, key, 2) * mask[:, None, None, :]
    weights = weights.tril() if is_causal else weights
    expected = weights @ value / (1 + weights.sum(-1, keepdim=True))
    found = build("polysketch", 6, degree=2)(query, key, value, mask, is_causal)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("degree", [4, 8])
def test_it_is_the_quadratic_form_of_its_sketch(degree: int) -> None:
    query, key, value = normal(2, 2, 90, 6)
    attention = build("polysketch", 6, num_features=30, degree=degree)
    q, k = (torch.nn.functional.layer_norm(x, (6,)) * 6**-0.25 for x in (query, key))

    def sketch(x: Tensor, t: int, start: int) -> Tensor:
        """P_t with the matrices from `start` on at the level of t, by the recursion."""
        if t == 1:
            return x
        first, second = sketch(x, t // 2, start * 2), sketch(x, t // 2, start * 2 + 2)
        matrices = getattr(attention, f"projections_{t.bit_length() - 2}")
        return (first @ matrices[start]) * (second @ matrices[start + 1]) / math.sqrt(5)

    weights = (sketch(q, degree // 2, 0) @ sketch(k, degree // 2, 0).mT) ** 2
    expected = weights @ value / (1 + weights.sum(-1, keepdim=True))
    torch.testing.assert_close(attention(query, key, value), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("degree", [4, 8])
def test_the_sketch_is_unbiased_before_it_is_squared(degree: int) -> None:
    # A z test at 5 standard errors over 1,000 draws: a false-alarm rate of 6e-7, with fixed seeds.
    x, y = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2
    found = []
    for seed in range(1000):
        attention = build("polysketch", 4, seed, num_features=16, degree=degree)
        found.append(float(attention.sketch(x) @ attention.sketch(y)))
    estimates = torch.tensor(found)
    exact = float(x @ y) ** (degree // 2)
    assert abs(float(estimates.mean()) - exact) < 5 * float(estimates.std()) / math.sqrt(len(found))


def test_its_error_falls_with_the_number_of_features() -> None:
    # Medians of 9 draws: 16 times the features are four times the columns, and the error of a sketch goes with the
    # root of their number. A factor of 1.4 is asked for.
    query, key, value = normal(1, 1, 40, 4)
    weights = powers(query, key, 4)
    exact = weights @ value / (1 + weights.sum(-1, keepdim=True))
    errors = []
    for number in (64, 1024, 16384):
        draws = [
            relative_error(build("polysketch", 4, seed, num_features=number)(query, key, value), exact)
            for seed in range(9)
        ]
        errors.append(float(torch.tensor(draws).median()))
    assert errors[0] > 1.4 * errors[1] > 1.4**2 * errors[2]
