"""The second degree, against a package that computes it and against the weights themselves."""

import pytest
import torch
from heads import build, normal, normalised, ragged


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_the_quadratic_form(is_causal: bool) -> None:
    query, key, value = normal(2, 2, 90, 6)
    mask = ragged([90, 40], 90)
    x = query @ key.mT / 6**0.5
    expected = normalised(1 + x + x.square() / 2, value, mask, is_causal)
    found = build("taylor2", 6)(query, key, value, mask, is_causal)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_it_is_taylor_series_linear_attentions() -> None:
    package = pytest.importorskip(
        "taylor_series_linear_attention", reason="taylor-series-linear-attention (extra oracles) is not installed"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        oracle = package.TaylorSeriesLinearAttn(dim=12, dim_head=6, heads=2, causal=False).double()
    hidden = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = ragged([30, 17], 30)
    query = oracle.to_q(hidden)
    key, value = oracle.to_kv(hidden)
    found = build("taylor2", 6)(query, key, value, mask)
    torch.testing.assert_close(
        oracle.to_out(found.transpose(1, 2).flatten(-2)), oracle(hidden, mask=mask), rtol=1e-12, atol=1e-12
    )
