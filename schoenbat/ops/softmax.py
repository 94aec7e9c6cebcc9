"""Softmax attention by torch's fused kernel, with the masks of this library. Shapes as in `schoenbat.ops.reference`."""

from torch import Tensor
from torch.nn import functional as F


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, with scale 1 / sqrt(d) where it is None; 0 for a query that may attend to nothing."""
    if key_mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    allowed = key_mask[:, None, None, :]
    if is_causal:
        length = query.shape[-2]
        allowed = allowed & allowed.new_ones(length, length).tril()
    # A row without any key would be 0 / 0 inside the fused kernel: let it see everything, then drop its output.
    some = allowed.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed | ~some, scale=scale)
    return out.masked_fill(~some, 0.0)
