r"""Positive orthogonal random features for exp: FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794).

    exp(<x, y>) = E_w exp(<w, x> - |x|^2 / 2) exp(<w, y> - |y|^2 / 2),    w ~ N(0, I),

so every feature and every estimated weight is positive. The vectors w are orthogonal in blocks of d, with the lengths
of independent Gaussian ones.
"""

import math

import torch
from torch import Tensor, nn


class PositiveRandom(nn.Module):
    """phi: [..., N, head_dim] to [..., N, num_features]."""

    vectors: Tensor

    def __init__(self, *, head_dim: int, num_features: int, generator: torch.Generator) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, not {num_features}")
        self.register_buffer("vectors", torch.zeros(num_features, head_dim))
        self.resample(generator)

    def resample(self, generator: torch.Generator) -> None:
        rows, columns = self.vectors.shape
        self.vectors.copy_(orthogonal_gaussian(rows, columns, generator))

    def forward(self, x: Tensor) -> Tensor:
        exponent = x @ self.vectors.T.to(x.dtype) - x.square().sum(-1, keepdim=True) / 2
        return torch.exp(exponent) / math.sqrt(len(self.vectors))


def orthogonal_gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw standard normal vectors [rows, columns], orthogonal to each other within blocks of `columns` rows."""
    gaussian = torch.randn(-(-rows // columns), columns, columns, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(gaussian)
    directions = (basis * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]).transpose(-1, -2)
    lengths = torch.randn(rows, columns, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return lengths * directions.flatten(0, 1)[:rows]
