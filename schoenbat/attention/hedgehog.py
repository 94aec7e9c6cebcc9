"""Hedgehog: a small learned feature map, normalised over the features."""

import torch
from torch import Tensor, nn

from schoenbat.attention import Attention, sums_bytes
from schoenbat.kernels import Kernel
from schoenbat.ops.linear import causal_linear_attention, linear_attention


class Hedgehog(Attention):
    """phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1), phi(x) = softmax([2 (W x + b), -2 (W x + b)]) (arXiv 2402.04347).

    Three maps go by this name. Here it is that of flash-linear-attention: softmax over all 2 head_dim entries, W shared
    by the heads, with one W for queries and another for keys, the identity at first. The paper's own are exp with the
    largest entry subtracted, and a softmax of either half. Normalising the features of keys changes the weights;
    normalising those of queries does not. It is trained with the model from the start, not distilled from softmax.

    Time n d^2 and memory n d of a head.
    """

    cost = "linear"
    paper = "Zhang et al., ICLR 2024, arXiv 2402.04347"

    def __init__(self, config: object, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        self.query_weight = nn.Parameter(torch.eye(head_dim))
        self.query_bias = nn.Parameter(torch.zeros(head_dim))
        self.key_weight = nn.Parameter(torch.eye(head_dim))
        self.key_bias = nn.Parameter(torch.zeros(head_dim))

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        return sums_bytes(2 * head_dim, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        attention = causal_linear_attention if is_causal else linear_attention
        q_features = _features(q, self.query_weight, self.query_bias)
        k_features = _features(k, self.key_weight, self.key_bias)
        return attention(q_features, k_features, v, key_mask)


def _features(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mapped = 2 * torch.nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))
    return torch.cat([mapped, -mapped], -1).softmax(-1)
