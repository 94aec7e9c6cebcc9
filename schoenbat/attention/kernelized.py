"""Exact dot-product-kernel attention, quadratic in length: what `rmfa` estimates."""

import torch
from torch import Tensor

from schoenbat.attention import Attention, scale_and_widen
from schoenbat.kernels import Kernel
from schoenbat.ops.reference import kernel_attention


class Kernelized(Attention):
    """sum_j f(<q_i, k_j> / sqrt(head_dim)) v_j, normalised by the sum of the weights (arXiv 2505.12252, Eq. 3)."""

    needs_kernel = True

    def __init__(self, config: object, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        assert kernel is not None
        self.kernel = kernel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        q, k, v = scale_and_widen(query, key, value)
        return kernel_attention(q, k, v, self.kernel, key_mask, is_causal).to(query.dtype)
