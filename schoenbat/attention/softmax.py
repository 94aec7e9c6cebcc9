"""Exact softmax attention by torch's fused kernel: the mechanism that every other one is measured against."""

from torch import Tensor
from torch.nn import functional as F

from schoenbat.attention import Attention


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
        if key_mask is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        allowed = key_mask[:, None, None, :]
        if is_causal:
            length = query.shape[-2]
            allowed = allowed & allowed.new_ones(length, length).tril()
        # A row without any key would be 0 / 0 inside the fused kernel: let it see everything, then drop its output.
        some = allowed.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed | ~some)
        return out.masked_fill(~some, 0.0)
