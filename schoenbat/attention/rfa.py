"""Random feature attention: softmax of unit vectors through sines and cosines."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from schoenbat.attention import Attention, check_positive, sums_bytes
from schoenbat.kernels import Kernel
from schoenbat.ops.linear import causal_linear_attention, linear_attention


class Rfa(Attention):
    r"""phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1), phi(x) = [sin(W u), cos(W u)], u = x / |x|.

    Source: arXiv 2103.02143, Sec. 3.1, the softmax variant without a gate. W is normal, its columns times a learned
    sigma that starts at 1 (one per coordinate, for all heads), over tau. With sigma = 1 it estimates
    softmax(<u_q, u_k> / tau^2). A vector of length 0 has direction 0.

    Estimated weights may be negative and a denominator may come near 0; the latter follows the rule of
    `schoenbat.ops.reference.divide`. Published code clamps it to at least 1, which changes short sequences.

    Time n m d and memory n m of a head, m = num_features.
    """

    @dataclass(frozen=True)
    class Config:
        """Budget and temperature.

        Attributes:
            num_features: sines and cosines together.
            tau: the square root of the temperature of the softmax.
        """

        num_features: int = 128
        tau: float = 1.0

        def __post_init__(self) -> None:
            check_positive(num_features=self.num_features)
            if self.num_features % 2:
                raise ValueError(f"num_features must be even, as many sines as cosines, not {self.num_features}")
            if self.tau <= 0:
                raise ValueError(f"tau must be positive, not {self.tau}")

    is_random = True
    cost = "linear"
    paper = "Peng et al., ICLR 2021, arXiv 2103.02143"
    vectors: Tensor

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        self.register_buffer("vectors", torch.randn(config.num_features // 2, head_dim, generator=generator))
        self.sigma = nn.Parameter(torch.ones(head_dim))

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        return sums_bytes(self.config.num_features, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        attention = causal_linear_attention if is_causal else linear_attention
        return attention(self.features(q), self.features(k), v, key_mask)

    def features(self, x: Tensor) -> Tensor:
        """Compute phi: [B, H, N, head_dim] to [B, H, N, num_features]."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        unit = x / torch.where(length == 0, 1.0, length)
        projected = unit @ (self.vectors * self.sigma / self.config.tau).T.to(x.dtype)
        return torch.cat([projected.sin(), projected.cos()], -1) / math.sqrt(len(self.vectors))
