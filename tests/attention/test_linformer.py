"""Linformer against the package of that name, and against softmax attention."""

import pytest
import torch
from heads import build, normal
from torch.nn import functional as F


@pytest.mark.parametrize("length", [40, 29])
def test_it_is_the_linformer_packages(length: int) -> None:
    package = pytest.importorskip("linformer", reason="linformer (extra oracles) is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        oracle = package.LinformerSelfAttention(dim=16, seq_len=40, k=10, heads=2).double()
    attention = build("linformer", 8, num_landmarks=10, max_length=40, share=False)
    attention.project_key.data.copy_(oracle.proj_k.data.T)
    attention.project_value.data.copy_(oracle.proj_v.data.T)
    hidden = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    query, key, value = (
        project(hidden).unflatten(-1, (2, 8)).transpose(1, 2) for project in (oracle.to_q, oracle.to_k, oracle.to_v)
    )
    found = oracle.to_out(attention(query, key, value).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(found, oracle(hidden), rtol=1e-12, atol=1e-12)


def test_the_identity_gives_softmax_attention() -> None:
    query, key, value = normal(2, 2, 30, 8)
    attention = build("linformer", 8, num_landmarks=30, max_length=30)
    attention.project_key.data.copy_(torch.eye(30))
    exact = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attention(query, key, value), exact, rtol=1e-12, atol=1e-12)


def test_shared_projections_are_one_parameter() -> None:
    assert len(list(build("linformer", 8).parameters())) == 1
    assert len(list(build("linformer", 8, share=False).parameters())) == 2
