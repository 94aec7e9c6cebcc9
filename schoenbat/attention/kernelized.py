"""Exact dot-product-kernel attention, quadratic in length: what `rmfa` estimates."""

from torch import Tensor

from schoenbat.attention import KernelAttention, scale_and_widen
from schoenbat.ops.exact import exact_attention


class Kernelized(KernelAttention):
    """sum_j f(<q_i, k_j> / sqrt(head_dim)) v_j, normalised by the sum of the weights (arXiv 2505.12252, Eq. 3)."""

    cost = "quadratic"
    paper = "SchoenbAt, arXiv 2505.12252"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        q, k, v = scale_and_widen(query, key, value)
        return exact_attention(q, k, v, self.kernel, key_mask, is_causal).to(query.dtype)
