"""Exact dot-product-kernel attention, quadratic in length: what `rmfa` estimates."""

from torch import Tensor

from schoenbat.attention import KernelAttention
from schoenbat.ops.exact import exact_attention


class Kernelized(KernelAttention):
    """sum_j f(<q_i, k_j> / sqrt(head_dim)) v_j, normalised by the sum of the weights (arXiv 2505.12252, Eq. 3)."""

    cost = "quadratic"
    paper = "SchoenbAt, arXiv 2505.12252"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        scale = q.shape[-1] ** -0.25
        return exact_attention(q * scale, k * scale, v, self.kernel, key_mask, is_causal)
