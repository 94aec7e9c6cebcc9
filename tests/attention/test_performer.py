"""FAVOR+ against two independent implementations, and its approach to softmax attention."""

import pytest
import torch
from heads import build, normal, normalised, ragged, relative_error
from torch.nn import functional as F


def test_it_is_performer_pytorchs() -> None:
    module = pytest.importorskip(
        "performer_pytorch.performer_pytorch", reason="performer-pytorch (extra oracles) is not installed"
    )
    query, key, value = normal(2, 2, 40, 8)
    attention = build("performer", 8, num_features=64)
    # By default it adds 1e-4 to every feature.
    q, k = (
        module.softmax_kernel(x, projection_matrix=attention.vectors, is_query=is_query, eps=0.0)
        for x, is_query in ((query, True), (key, False))
    )
    expected = module.linear_attention(q, k, value)
    torch.testing.assert_close(attention(query, key, value), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_darkformers_with_an_identity_geometry(is_causal: bool) -> None:
    darkformer = pytest.importorskip("darkformer_pytorch", reason="darkformer-pytorch (extra oracles) is not installed")
    query, key, value = (x.float() for x in normal(2, 2, 40, 8, scale=0.5))
    mask = ragged([40, 23], 40)
    found = build("performer", 8, num_features=64).float()
    with torch.random.fork_rng(devices=[]):
        oracle = darkformer.DarkformerKernelAttention(
            head_dim=8, num_heads=2, num_features=64, causal=is_causal, eps=0.0
        ).eval()
    projection = oracle.random_features.projection_matrix
    assert projection.shape[-2:] == found.vectors.shape
    projection.copy_(found.vectors.expand_as(projection))
    expected = oracle(query, key, value, key_mask=mask)
    real = mask[:, None, :, None].expand_as(query)
    actual = found(query, key, value, mask, is_causal)
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_its_formula(is_causal: bool) -> None:
    query, key, value = normal(2, 2, 90, 8)
    mask = ragged([90, 50], 90)
    attention = build("performer", 8, num_features=32)
    q, k = (
        torch.exp(x * 8**-0.25 @ attention.vectors.T - (x * 8**-0.25).square().sum(-1, keepdim=True) / 2)
        for x in (query, key)
    )
    expected = normalised(q @ k.mT, value, mask, is_causal)
    torch.testing.assert_close(attention(query, key, value, mask, is_causal), expected, rtol=1e-10, atol=1e-10)


def test_its_error_falls_with_the_number_of_features() -> None:
    # Short vectors: for long ones no number of features within reach suffices. As 1 / sqrt(features): means of 5 draws,
    # 8 times the features, and a factor of 2 is asked for.
    query, key, value = normal(1, 1, 60, 16, scale=0.5)
    exact = F.scaled_dot_product_attention(query, key, value)
    errors = [
        sum(
            relative_error(build("performer", 16, seed, num_features=number)(query, key, value), exact)
            for seed in range(5)
        )
        / 5
        for number in (64, 512, 4096)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.06
