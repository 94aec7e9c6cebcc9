"""Exact softmax attention by torch's fused kernel: the mechanism that every other one is measured against."""

import torch
from torch import Tensor

from schoenbat.attention import Attention
from schoenbat.ops.exact import softmax_attention


class Softmax(Attention):
    """softmax(q k^T / sqrt(head_dim)) v, through torch's scaled_dot_product_attention."""

    cost = "quadratic"
    paper = "Vaswani et al., NeurIPS 2017, arXiv 1706.03762"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            return softmax_attention(query, key, value, key_mask, is_causal)
