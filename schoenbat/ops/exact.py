"""A kernel's attention without an estimate, quadratic in length, by whatever is fastest. Shapes as in `reference`."""

from torch import Tensor
from torch.nn import functional as F

from schoenbat.kernels import Kernel
from schoenbat.ops.reference import fill_masked, kernel_attention, tame_masked


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, key_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Compute sum_j f(<q_i, k_j>) v_j / sum_j f(<q_i, k_j>); consecutive query heads may share a key head."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if kernel.is_exponential:
        return softmax_attention(query, key, value, key_mask, is_causal, scale=1.0)
    return kernel_attention(query, key, value, kernel, key_mask, is_causal)


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute softmax(scale q k^T) v by torch's fused kernel, with scale 1 / sqrt(d) where it is None.

    0 for a query that may attend to nothing.
    """
    if key_mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    query = tame_masked(query, key_mask)
    key, value = fill_masked(key, key_mask), fill_masked(value, key_mask)
    allowed = key_mask[:, None, None, :]
    if is_causal:
        length = query.shape[-2]
        allowed = allowed & allowed.new_ones(length, length).tril()
    # A row without any key would be 0 / 0 inside the fused kernel: let it see everything, then drop its output.
    some = allowed.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed | ~some, scale=scale)
    return out.masked_fill(~some, 0.0)
