"""Centring queries and keys leaves exact attention as it is, and brings the estimate closer to it."""

import math

import pytest
import torch
from torch import Tensor

from schoenbat.attention import ATTENTIONS
from schoenbat.kernels import KERNELS
from schoenbat.norm import pre_sbn


def attend(attn: str, tensors: tuple[Tensor, ...], key_mask: Tensor | None, seed: int = 0, **options: object) -> Tensor:
    attention_class = ATTENTIONS.get(attn)
    attention = attention_class(
        attention_class.Config(**options),
        head_dim=tensors[0].shape[-1],
        kernel=KERNELS.get("exp")(),
        generator=torch.Generator().manual_seed(seed),
    )
    return attention(*tensors, key_mask)


def gathered(head_dim: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit queries and keys, each gathered around a direction of their own, and values."""
    generator = torch.Generator().manual_seed(4)
    query, key, value = torch.randn(3, 2, 2, length, head_dim, generator=generator, dtype=torch.float64)
    first, second = pre_sbn(torch.randn(2, head_dim, generator=generator, dtype=torch.float64))
    query, key = (
        pre_sbn(math.sqrt(0.6) * centre + math.sqrt(0.4) * pre_sbn(x)) for x, centre in ((query, first), (key, second))
    )
    return query, key, value


@pytest.mark.parametrize("masked", [False, True])
def test_centring_leaves_exact_attention_as_it_is(masked: bool) -> None:
    # 2,000 features are the whole series for 3 dimensions.
    tensors = gathered(3, 30)
    key_mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    exact = attend("kernelized", tensors, key_mask)
    found = attend("rmfa-sketch", tensors, key_mask, num_features=2000)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_a_key_far_from_the_others_overflows_nothing() -> None:
    # exp(<q, k>) itself would be e^200 here.
    query, key, value = gathered(8, 20)
    key_mask = torch.arange(20).expand(2, -1) < 15
    key[:, :, 16] = 200 * query[:, :, :15].mean(-2)
    assert torch.isfinite(attend("rmfa-sketch", (query, key, value), key_mask)).all()
    key[:, :, 3] = 200 * query[:, :, :15].mean(-2)
    assert torch.isfinite(attend("rmfa-sketch", (query, key, value), key_mask)).all()


def test_gathered_vectors_have_a_fraction_of_the_published_error() -> None:
    # Fifty times and more here; the draws scatter by less than a factor of two.
    tensors = gathered(32, 200)
    exact = attend("kernelized", tensors, None)

    def error(attn: str, **options: object) -> float:
        draws = [float((attend(attn, tensors, None, seed, **options) - exact).norm()) for seed in range(3)]
        return sum(draws) / len(draws)

    assert 10 * error("rmfa-sketch") < error("rmfa")
