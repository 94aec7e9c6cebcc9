"""Mechanisms and inputs for the tests of single mechanisms."""

from typing import Any

import torch
from torch import Tensor

from schoenbat.attention import ATTENTIONS, Attention


def build(name: str, head_dim: int, seed: int = 0, **options: Any) -> Attention:
    """In double precision, so that a test sees the formula and not rounding."""
    attention_class = ATTENTIONS.get(name)
    generator = torch.Generator().manual_seed(seed)
    return attention_class(
        attention_class.Config(**options), head_dim=head_dim, kernel=None, generator=generator
    ).double()


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of this shape, normal with standard deviation `scale` (values: 1), float64."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return query * scale, key * scale, value


def ragged(lengths: list[int], padded: int) -> Tensor:
    """The key mask of examples of these lengths."""
    return torch.arange(padded) < torch.tensor(lengths)[:, None]


def normalised(weights: Tensor, value: Tensor, key_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """sum_j w_ij v_j / sum_j w_ij of weights [B, H, N, M], over the keys that may be attended."""
    if key_mask is not None:
        weights = weights * key_mask[:, None, None, :]
    if is_causal:
        weights = weights.tril()
    return weights @ value / weights.sum(-1, keepdim=True)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact).norm() / exact.norm()).detach())
