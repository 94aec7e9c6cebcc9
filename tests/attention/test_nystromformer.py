"""Nyströmformer against transformers' and against its formula segment by segment."""

from itertools import pairwise

import pytest
import torch
from heads import build, normal, ragged, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from schoenbat.ops.inverse import iterated_inverse


@pytest.mark.parametrize("conv_size", [0, 5])
def test_it_is_transformers_nystromformer(conv_size: int) -> None:
    module = pytest.importorskip(
        "transformers.models.nystromformer.modeling_nystromformer",
        reason="transformers (extra oracles) is not installed",
    )
    length, heads, width, landmarks = 48, 2, 8, 6
    config = module.NystromformerConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_landmarks=landmarks,
        segment_means_seq_len=length,
        conv_kernel_size=conv_size or 1,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        oracle = module.NystromformerSelfAttention(config).double().eval()
    oracle.init_option = "exact"
    attention = build("nystromformer", width, num_landmarks=landmarks, conv_size=conv_size)
    if conv_size:
        oracle.conv.weight.data.copy_(attention.filter.data[:, None].expand_as(oracle.conv.weight))
    else:
        oracle.conv_kernel_size = None
    for name in ("query", "key"):
        # At the size of its initialisation all weights would be alike.
        getattr(oracle, name).weight.data *= 4
    hidden = torch.randn(2, length, heads * width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    query, key, value = (
        project(hidden).unflatten(-1, (heads, width)).transpose(1, 2)
        for project in (oracle.query, oracle.key, oracle.value)
    )
    found = attention(query, key, value).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(found, oracle(hidden)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("length", "padded"), [(37, 37), (37, 50), (9, 50), (8, 50), (5, 50), (1, 50)])
def test_it_is_its_formula_on_the_real_tokens(length: int, padded: int) -> None:
    query, key, value = normal(1, 1, padded, 8)
    found = build("nystromformer", 8, num_landmarks=8)(query, key, value, ragged([length], padded))[0, 0, :length]
    q, k, v = (x[0, 0, :length] for x in (query, key, value))
    if length <= 8:
        expected = F.scaled_dot_product_attention(q, k, v)
    else:
        q, k = q * 8**-0.25, k * 8**-0.25
        cuts = [a * length // 8 for a in range(9)]

        def means(x: Tensor) -> Tensor:
            return torch.stack([x[start:stop].mean(0) for start, stop in pairwise(cuts)])

        left, middle, right = ((a @ b.T).softmax(-1) for a, b in ((q, means(k)), (means(q), means(k)), (means(q), k)))
        expected = left @ iterated_inverse(middle) @ right @ v
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_its_error_falls_with_the_number_of_landmarks() -> None:
    # Tokens that drift: those of a segment are alike. m = n is softmax attention.
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(3, 1, 1, 96, 8, generator=generator, dtype=torch.float64).cumsum(-2) / 4
    query, key, value = nn.functional.layer_norm(steps, (8,))
    exact = F.scaled_dot_product_attention(query, key, value)
    errors = [
        relative_error(build("nystromformer", 8, num_landmarks=m)(query, key, value), exact) for m in (2, 8, 32, 96)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-12
