"""Attention through random Maclaurin features, as published; between pre-SBN and post-SBN it is SchoenbAt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schoenbat.attention import MAX_DEGREE, MAX_FEATURES, KernelAttention, sums_bytes
from schoenbat.estimate import Estimate
from schoenbat.kernels import Kernel
from schoenbat.ops.linear import attend
from schoenbat.registry import check_bounds


class Rmfa(KernelAttention):
    """phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1) with one draw of phi for the layer (arXiv 2505.12252)."""

    @dataclass(frozen=True)
    class Config:
        """Budget and degree.

        Attributes:
            num_features: random Maclaurin features.
            max_degree: the highest degree that is drawn.
        """

        num_features: int = 128
        max_degree: int = 20

        def __post_init__(self) -> None:
            check_bounds(self, num_features=(1, MAX_FEATURES), max_degree=(1, MAX_DEGREE))

    is_random = True
    cost = "linear"
    paper = "SchoenbAt, arXiv 2505.12252"

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        estimate = Estimate(self.kernel, config.num_features, "maclaurin", max_degree=config.max_degree)
        self.features = estimate.make(head_dim, generator=generator)

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        return sums_bytes(self.features.plan.num_features, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        return attend(self.features, q, k, v, key_mask, is_causal, scale=q.shape[-1] ** -0.5)
