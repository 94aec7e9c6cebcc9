r"""Random Fourier features for exp (Rahimi & Recht 2007), with orthogonal frequencies (Yu et al. 2016).

    exp(<x, y>) = e^{|x|^2 / 2} e^{|y|^2 / 2} E_w cos(<w, x - y>),    w ~ N(0, I),

as a cosine and a sine for each w.
"""

import math

import torch
from torch import Tensor, nn

from schoenbat.features.positive import orthogonal_gaussian


class RandomFourier(nn.Module):
    """phi: [..., N, head_dim] to [..., N, num_features], with an even num_features."""

    frequencies: Tensor

    def __init__(self, *, head_dim: int, num_features: int, generator: torch.Generator) -> None:
        super().__init__()
        if num_features < 2 or num_features % 2:
            raise ValueError(f"num_features must be even and at least 2, not {num_features}")
        self.register_buffer("frequencies", torch.zeros(num_features // 2, head_dim))
        self.resample(generator)

    def resample(self, generator: torch.Generator) -> None:
        rows, columns = self.frequencies.shape
        self.frequencies.copy_(orthogonal_gaussian(rows, columns, generator))

    def forward(self, x: Tensor) -> Tensor:
        angles = x @ self.frequencies.T.to(x.dtype)
        amplitude = torch.exp(x.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(self.frequencies))
        return amplitude * torch.cat([torch.cos(angles), torch.sin(angles)], -1)
