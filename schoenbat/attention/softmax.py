"""Exact softmax attention by torch's fused kernel: the mechanism that every other one is measured against."""

from torch import Tensor

from schoenbat.attention import Attention
from schoenbat.ops.exact import softmax_attention


class Softmax(Attention):
    """softmax(q k^T / sqrt(head_dim)) v, through torch's scaled_dot_product_attention."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return softmax_attention(query, key, value, key_mask, is_causal)
