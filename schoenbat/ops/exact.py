"""A kernel's attention without an estimate, quadratic in length, by whatever is fastest. Shapes as in `reference`."""

from torch import Tensor

from schoenbat.kernels import Kernel
from schoenbat.ops.reference import kernel_attention
from schoenbat.ops.softmax import softmax_attention


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, key_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """sum_j f(<q_i, k_j>) v_j / sum_j f(<q_i, k_j>); consecutive query heads may share a head of key and value."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if kernel.is_exponential:
        return softmax_attention(query, key, value, key_mask, is_causal, scale=1.0)
    return kernel_attention(query, key, value, kernel, key_mask, is_causal)
