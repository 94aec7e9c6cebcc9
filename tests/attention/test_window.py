"""Sliding windows against a band mask, and against two implementations of others."""

import pytest
import torch
from heads import build, normal, ragged
from torch import Tensor
from torch.nn import functional as F


def banded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, window: int, is_causal: bool) -> Tensor:
    places = torch.arange(query.shape[-2])
    distance = places[:, None] - places
    near = (distance >= 0) & (distance <= window) if is_causal else distance.abs() <= window // 2
    return F.scaled_dot_product_attention(query, key, value, attn_mask=near & mask[:, None, None, :])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(1, 4), (7, 4), (64, 8), (65, 8), (50, 2), (50, 100), (50, 128)])
def test_it_is_softmax_attention_under_a_band_mask(length: int, window: int, is_causal: bool) -> None:
    query, key, value = normal(2, 2, length, 8)
    mask = ragged([length, max(1, length - 9)], length)
    found = build("window", 8, window=window)(query, key, value, mask, is_causal)
    real = mask[:, None, :, None].expand_as(found)
    expected = banded(query, key, value, mask, window, is_causal)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-12, atol=1e-12)


def test_a_token_without_a_neighbour_gets_zero() -> None:
    query, key, value = normal(1, 1, 30, 8)
    mask = torch.ones(1, 30, dtype=torch.bool)
    mask[:, 10:21] = False
    found = build("window", 8, window=4)(query, key, value, mask)
    assert (found[:, :, 12:19] == 0).all()
    assert (found[:, :, [11, 19]] != 0).all()


def test_it_is_local_attentions() -> None:
    local = pytest.importorskip("local_attention", reason="local-attention (extra oracles) is not installed")
    query, key, value = normal(2, 2, 64, 8)
    mask = ragged([64, 41], 64)
    # Its window is what is seen to each side.
    oracle = local.LocalAttention(
        window_size=8,
        causal=False,
        look_backward=1,
        look_forward=1,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
        autopad=True,
    )
    found = build("window", 8, window=16)(query, key, value, mask)
    real = mask[:, None, :, None].expand_as(found)
    torch.testing.assert_close(found[real], oracle(query, key, value, mask=mask)[real], rtol=1e-12, atol=1e-12)


def test_a_wide_window_is_softmax_attention() -> None:
    query, key, value = normal(2, 2, 40, 8)
    exact = F.scaled_dot_product_attention(query, key, value)
    errors = [
        float((build("window", 8, window=w)(query, key, value) - exact).norm() / exact.norm()) for w in (4, 16, 40, 80)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-12
