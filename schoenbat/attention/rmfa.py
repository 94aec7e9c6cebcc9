"""Attention through random Maclaurin features, as published; between pre-SBN and post-SBN it is SchoenbAt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schoenbat.attention import KernelAttention, scale_and_widen
from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.kernels import Kernel
from schoenbat.ops.linear import causal_linear_attention, linear_attention


class Rmfa(KernelAttention):
    """phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1) with one draw of phi for the layer (arXiv 2505.12252)."""

    @dataclass(frozen=True)
    class Config:
        num_features: int = 128
        max_degree: int = 20

    is_random = True
    cost = "linear"
    paper = "SchoenbAt, arXiv 2505.12252"

    @classmethod
    def flops(cls, config: Config, *, length: int, head_dim: int) -> float:
        # Two factors to a feature on average.
        return 12.0 * length * config.num_features * head_dim

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        self.features = RandomMaclaurin(
            self.kernel,
            head_dim=head_dim,
            num_features=config.num_features,
            max_degree=config.max_degree,
            generator=generator,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        q, k, v = scale_and_widen(query, key, value)
        attend = causal_linear_attention if is_causal else linear_attention
        return attend(self.features(q), self.features(k), v, key_mask).to(query.dtype)
