"""Skeinformer against its formula, and its approach to softmax attention."""

import math

import pytest
import torch
from heads import build, normal, ragged, relative_error
from torch.nn import functional as F


@pytest.mark.parametrize("padded", [30, 45])
def test_it_is_its_formula_on_the_real_tokens(padded: int) -> None:
    length, number = 30, 8
    query, key, value = normal(1, 1, padded, 8)
    attention = build("skeinformer", 8, num_samples=number)
    mask = ragged([length], padded)
    found = attention(query, key, value, mask)[0, 0, :length]
    q, k, v = (x[0, 0, :length] for x in (query, key, value))
    weights = (q @ k.T / math.sqrt(8)).exp()
    rows = [int(u * length) for u in attention.uniform]
    pilot = weights[rows] / weights[rows].sum(-1, keepdim=True)
    padded_pilot = F.pad(pilot, (0, padded - length))[None, None]
    chosen = attention.columns(padded_pilot, value, mask)[0, 0].tolist()
    assert len(set(chosen)) == number
    assert max(chosen) < length
    others = [j for j in range(length) if j not in chosen]
    sampled = weights[:, chosen]
    mean = sampled.prod(-1, keepdim=True) ** (1 / number)
    total = sampled.sum(-1, keepdim=True) + (length - number) * mean
    expected = (sampled @ v[chosen] + mean * v[others].sum(0)) / total
    expected[rows] = pilot @ v
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_columns_are_drawn_in_proportion_to_their_score() -> None:
    # One column of two whose scores are 3 to 1, 1,000 draws: 5 standard errors, a false-alarm rate of 6e-7.
    pilot = torch.tensor([[[[0.75, 0.25]]]], dtype=torch.float64)
    value = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    first = sum(
        int(build("skeinformer", 1, seed, num_samples=1).columns(pilot, value, ragged([2], 2))[0, 0, 0]) == 0
        for seed in range(1000)
    )
    assert abs(first / 1000 - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 1000)


def test_values_of_zero_leave_enough_columns_to_draw() -> None:
    query, key, value = normal(1, 1, 30, 8)
    value[:, :, 2:] = 0
    attention = build("skeinformer", 8, num_samples=10)
    columns = attention.columns(torch.full((1, 1, 10, 30), 1 / 30.0).double(), value, ragged([25], 30))[0, 0]
    assert len(set(columns.tolist())) == 10
    assert int(columns.max()) < 25
    assert torch.isfinite(attention(query, key, value)).all()


def test_as_many_samples_as_tokens_are_softmax_attention() -> None:
    # Means of 10 draws.
    query, key, value = normal(1, 1, 40, 8)
    exact = F.scaled_dot_product_attention(query, key, value)
    errors = [
        sum(
            relative_error(build("skeinformer", 8, seed, num_samples=number)(query, key, value), exact)
            for seed in range(10)
        )
        / 10
        for number in (5, 20, 39, 40)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-12
