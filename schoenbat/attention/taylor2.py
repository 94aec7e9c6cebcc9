"""Softmax attention cut after the second degree, without a kernel's choice: Based's feature map."""

import math

import torch
from torch import Tensor

from schoenbat.attention import Attention, sums_bytes
from schoenbat.ops.linear import causal_linear_attention, linear_attention


class Taylor2(Attention):
    """Weights 1 + x + x^2 / 2, x = <q, k> / sqrt(head_dim), normalised (arXiv 2402.18668; arXiv 2209.04881).

    It is exact with the 1 + d + d (d + 1) / 2 features [1, x, x_i^2 / sqrt(2), x_i x_j (i < j)], 561 for d = 32. A
    weight is at least 1 / 2. The paper projects queries and keys to 16 dimensions first; here they are taken as they
    are.

    Time n F d and memory n F of a head, F the number of features.
    """

    cost = "linear"
    paper = "Arora et al. (Based), arXiv 2402.18668"

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        return sums_bytes(1 + head_dim + head_dim * (head_dim + 1) // 2, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        attention = causal_linear_attention if is_causal else linear_attention
        return attention(_features(q), _features(k), v, key_mask)


def _features(x: Tensor) -> Tensor:
    x = x * x.shape[-1] ** -0.25
    rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    pairs = x[..., rows] * x[..., columns]
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square() / math.sqrt(2), pairs], -1)
