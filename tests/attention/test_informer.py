"""Informer against transformers' and against its formula."""

import math

import pytest
import torch
from heads import build, normal, ragged, relative_error
from torch.nn import functional as F


def test_it_is_transformers_informer_with_the_same_sample() -> None:
    module = pytest.importorskip(
        "transformers.models.informer.modeling_informer", reason="transformers (extra oracles) is not installed"
    )
    length = 40
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        oracle = module.InformerProbSparseAttention(16, 2, sampling_factor=2).double().eval()
        hidden = 3 * torch.randn(2, length, 16, dtype=torch.float64)
        torch.manual_seed(1)
        expected = oracle(hidden)[0]
        torch.manual_seed(1)
        # It draws as many keys as there are.
        sample = torch.randint(0, length, (length,))
    attention = build("informer", 8, num_samples=2 * math.ceil(math.log1p(length)))
    attention.uniform = (sample.double() + 0.5) / length
    query, key, value = (
        project(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
        for project in (oracle.q_proj, oracle.k_proj, oracle.v_proj)
    )
    found = oracle.out_proj(attention(query, key, value).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_it_is_its_formula_on_the_real_tokens() -> None:
    length, padded = 30, 45
    query, key, value = normal(1, 1, padded, 8)
    attention = build("informer", 8, num_samples=6)
    found = attention(query, key, value, ragged([length], padded))[0, 0, :length]
    q, k, v = (x[0, 0, :length] for x in (query, key, value))
    scores = q @ k.T / math.sqrt(8)
    sampled = scores[:, [int(u * length) for u in attention.uniform]]
    measure = sampled.max(-1).values - sampled.mean(-1)
    expected = v.mean(0).repeat(length, 1)
    for i in measure.argsort(descending=True)[:6]:
        expected[i] = scores[i].softmax(-1) @ v
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_as_many_samples_as_tokens_are_softmax_attention() -> None:
    query, key, value = normal(1, 2, 40, 8, scale=2.0)
    exact = F.scaled_dot_product_attention(query, key, value)
    errors = [
        relative_error(build("informer", 8, num_samples=number)(query, key, value), exact) for number in (4, 16, 32, 40)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-12
