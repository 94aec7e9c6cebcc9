r"""Random Maclaurin features as SchoenbAt uses them (Kar & Karnick 2012, Algorithm 1; arXiv 2505.12252).

The constant term a_0 is one deterministic feature. Each of the D' = D - 1 others draws a degree n from 1..max_degree
with probability p(n) proportional to 2^-n and n Rademacher vectors w_1..w_n in {-1, 1}^d, and is

    phi_i(x) = sqrt(a_n / (p(n) D')) prod_j <w_j, x>.

Then E <phi(x), phi(y)> = a_0 + sum_{n=1}^{max_degree} a_n <x, y>^n, because E <w, x><w, y> = <x, y>.
"""

import math

import torch
from torch import Tensor, nn

from schoenbat.kernels import Kernel


class RandomMaclaurin(nn.Module):
    """phi: [..., N, head_dim] to [..., N, num_features], the same draw for every head and batch entry.

    Args:
        kernel: gives the coefficients a_n.
        num_features: D, at least 1.
        max_degree: highest degree that is drawn; the series beyond it is left out.
        generator: the source of the draw.
    """

    degrees: Tensor
    signs: Tensor
    projection: Tensor

    def __init__(
        self, kernel: Kernel, *, head_dim: int, num_features: int, max_degree: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, not {num_features}")
        if max_degree < 1:
            raise ValueError(f"max_degree must be at least 1, not {max_degree}")
        self.coefficients = [kernel.coefficient(degree) for degree in range(max_degree + 1)]
        probabilities = torch.tensor([2.0**-degree for degree in range(1, max_degree + 1)], dtype=torch.float64)
        self.probabilities = probabilities / probabilities.sum()
        # The shapes do not depend on the draw, so that any state_dict of this configuration can be loaded; what the
        # forward pass uses is packed from them.
        drawn = num_features - 1
        self.register_buffer("degrees", torch.ones(drawn, dtype=torch.int64))
        self.register_buffer("signs", torch.ones(drawn, max_degree, head_dim, dtype=torch.int8))
        self.register_load_state_dict_post_hook(lambda module, _: module._pack())
        self.resample(generator)

    def resample(self, generator: torch.Generator) -> None:
        """Draw degrees and vectors anew; the degrees are kept in ascending order."""
        drawn = len(self.degrees)
        if drawn:
            degrees = torch.multinomial(self.probabilities, drawn, replacement=True, generator=generator) + 1
            self.degrees.copy_(degrees.sort().values)
        self.signs.copy_(torch.randint(0, 2, self.signs.shape, generator=generator, dtype=torch.int8) * 2 - 1)
        self._pack()

    def _pack(self) -> None:
        """Lay the vectors out by degree: first all first factors of a degree, then all its second factors, ..."""
        degrees = self.degrees.cpu()
        drawn = len(degrees)
        rows, groups = [], []
        for degree in range(1, self.signs.shape[1] + 1):
            members = (degrees == degree).nonzero().flatten().to(self.signs.device)
            if len(members):
                groups.append((degree, len(members)))
                factors = self.signs[members, :degree].to(torch.float32)
                # The amplitude goes into the first factor, which saves a pass over all features.
                variance = self.coefficients[degree] / (float(self.probabilities[degree - 1]) * drawn)
                factors[:, 0] *= math.sqrt(variance)
                rows.append(factors.transpose(0, 1).flatten(0, 1))
        self.groups = groups
        empty = self.signs.new_zeros(0, self.signs.shape[2], dtype=torch.float32)
        self.register_buffer("projection", torch.cat(rows) if rows else empty, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # Features are computed with the tokens along the last axis, where each factor is one contiguous block.
        projected = self.projection.to(x.dtype) @ x.transpose(-1, -2)
        constant = math.sqrt(self.coefficients[0])
        blocks = [x.new_full((*x.shape[:-2], 1, x.shape[-2]), constant)]
        start = 0
        for degree, count in self.groups:
            product = projected[..., start : start + count, :]
            for factor in range(1, degree):
                offset = start + factor * count
                product = product * projected[..., offset : offset + count, :]
            blocks.append(product)
            start += degree * count
        return torch.cat(blocks, dim=-2).transpose(-1, -2)
