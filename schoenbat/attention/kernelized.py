"""Exact dot-product-kernel attention, quadratic in length: what `rmfa` estimates."""

from torch import Tensor

from schoenbat.attention import KernelAttention, scale_and_widen
from schoenbat.ops.reference import kernel_attention
from schoenbat.ops.softmax import softmax_attention


class Kernelized(KernelAttention):
    """sum_j f(<q_i, k_j> / sqrt(head_dim)) v_j, normalised by the sum of the weights (arXiv 2505.12252, Eq. 3)."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        q, k, v = scale_and_widen(query, key, value)
        if self.kernel.is_exponential:
            return softmax_attention(q, k, v, key_mask, is_causal, scale=1.0).to(query.dtype)
        return kernel_attention(q, k, v, self.kernel, key_mask, is_causal).to(query.dtype)
