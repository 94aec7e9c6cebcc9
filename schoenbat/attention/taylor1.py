"""The kernel cut after its linear term: the control that shows what the higher degrees are worth."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from schoenbat.attention import KernelAttention, sums_bytes
from schoenbat.errors import UserError
from schoenbat.kernels import Kernel
from schoenbat.ops.linear import attend


class Taylor1(KernelAttention):
    """Attention with weights a_0 + a_1 <q, k> / sqrt(head_dim), exact in linear time with head_dim + 1 features."""

    cost = "linear"
    paper = "the linear term of arXiv 2505.12252"

    def __init__(self, config: object, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        self.constant = math.sqrt(self.kernel.coefficient(0))
        self.slope = math.sqrt(self.kernel.coefficient(1))
        if self.constant == self.slope == 0:
            raise UserError("the kernel has neither a constant nor a linear term, and taylor1 keeps no other")

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        return sums_bytes(head_dim + 1, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        return attend(self._features, q, k, v, key_mask, is_causal, scale=q.shape[-1] ** -0.5)

    def _features(self, x: Tensor) -> Tensor:
        return F.pad(self.slope * x, (0, 1), value=self.constant)
