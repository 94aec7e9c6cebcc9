"""Draws that depend on real tokens only."""

import math

import torch

from schoenbat.ops.places import draw_seed, hashed_uniform, masked_softmax, places_of


def test_places_are_real_tokens_wherever_padding_stands() -> None:
    uniform = torch.tensor([0.0, 0.3, 0.5, 0.999])
    real = torch.tensor([[True, True, False, True, False], [False, False, True, True, True], [False] * 5])
    places = places_of(uniform, real)
    assert places[0].tolist() == [0, 0, 1, 3]
    assert places[1].tolist() == [2, 2, 3, 4]
    assert ((places[2] >= 0) & (places[2] < 5)).all()


def test_hashed_numbers_are_uniform_and_unrelated() -> None:
    # Means and covariances of 40,000 numbers within 5 standard errors: false alarms below 1e-5, with a fixed seed.
    seed = draw_seed(torch.Generator().manual_seed(0))
    row, column = torch.arange(200)[:, None], torch.arange(200)
    drawn = hashed_uniform(seed, row, column)
    assert ((drawn > 0) & (drawn < 1)).all()
    centred = drawn - 0.5
    error = 5 / math.sqrt(drawn.numel())
    assert abs(float(centred.mean())) < error * math.sqrt(1 / 12)
    assert abs(float((centred.square() - 1 / 12).mean())) < error * math.sqrt(1 / 180)
    others = (
        hashed_uniform(seed + 1, row, column) - 0.5,
        centred.T,
        centred.roll(1, 0),
        centred.roll(1, 1),
    )
    for other in others:
        off = ~torch.eye(200, dtype=torch.bool)
        assert abs(float((centred * other)[off].mean())) < error / 12


def test_a_hashed_number_does_not_depend_on_what_else_is_asked() -> None:
    seed = draw_seed(torch.Generator().manual_seed(0))
    assert torch.equal(hashed_uniform(seed, torch.arange(50))[:10], hashed_uniform(seed, torch.arange(10)))


def test_softmax_of_nothing_is_zero_with_a_finite_gradient() -> None:
    scores = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    weights = masked_softmax(scores, allowed)
    weights.square().sum().backward()
    assert (weights[1] == 0).all()
    torch.testing.assert_close(weights[0].sum(), torch.tensor(1.0))
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
