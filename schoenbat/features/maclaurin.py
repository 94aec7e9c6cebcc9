r"""Random Maclaurin features as SchoenbAt uses them (Kar & Karnick 2012, Algorithm 1; arXiv 2505.12252).

The constant term a_0 is one deterministic feature. Each of the D' = D - 1 others draws a degree n from 1..max_degree
with probability p(n) proportional to 2^-n and n Rademacher vectors w_1..w_n in {-1, 1}^d, and is

    phi_i(x) = sqrt(a_n / (p(n) D')) prod_j <w_j, x>.

Then E <phi(x), phi(y)> = a_0 + sum_{n=1}^{max_degree} a_n <x, y>^n, because E <w, x><w, y> = <x, y>.
"""

import math

import torch
from torch import Tensor

from schoenbat.features.plan import FeatureMap, Plan, Run
from schoenbat.kernels import Kernel


class RandomMaclaurin(FeatureMap):
    """phi: [..., N, head_dim] to [..., N, num_features], the same draw for every head and batch entry.

    Args:
        kernel: gives the coefficients a_n.
        num_features: D, at least 1.
        max_degree: highest degree that is drawn; the series beyond it is left out.
        generator: the source of the draw.
    """

    degrees: Tensor
    signs: Tensor

    def __init__(
        self, kernel: Kernel, *, head_dim: int, num_features: int, max_degree: int, generator: torch.Generator
    ) -> None:
        super().__init__(kernel, generator)
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, not {num_features}")
        if max_degree < 1:
            raise ValueError(f"max_degree must be at least 1, not {max_degree}")
        self.coefficients = [kernel.relative_coefficient(degree) for degree in range(max_degree + 1)]
        # The shapes do not depend on the draw, so that any state_dict of this configuration can be loaded; what the
        # forward pass uses is packed from them.
        drawn = num_features - 1
        with torch.device("cpu"):
            probabilities = torch.tensor([2.0**-degree for degree in range(1, max_degree + 1)], dtype=torch.float64)
            self.probabilities = (probabilities / probabilities.sum()).tolist()
            self.register_buffer("degrees", torch.ones(drawn, dtype=torch.int64))
            self.register_buffer("signs", torch.ones(drawn, max_degree, head_dim, dtype=torch.int8))
        self.resample(generator)

    def resample(self, generator: torch.Generator) -> None:
        """Draw degrees and vectors anew; the degrees are kept in ascending order."""
        with torch.device("cpu"):
            if len(self.degrees):
                probabilities = torch.tensor(self.probabilities, dtype=torch.float64)
                drawn = torch.multinomial(probabilities, len(self.degrees), replacement=True, generator=generator)
                self.degrees.copy_((drawn + 1).sort().values)
            bits = torch.randint(0, 2, self.signs.shape, generator=generator, dtype=torch.int8)
            self.signs.copy_(bits * 2 - 1)
        self._store()

    def _pack(self) -> Tensor:
        """Return the vectors by degree: first all first factors of a degree, then all its second factors, ..."""
        degrees = self.degrees.cpu()
        columns = [torch.empty(0, self.signs.shape[2], dtype=torch.float32, device="cpu")]
        runs = []
        start = 0
        for degree in range(1, self.signs.shape[1] + 1):
            members = (degrees == degree).nonzero().flatten()
            if len(members):
                factors = self.signs.cpu()[members, :degree].to(torch.float32)
                # The amplitude goes into the first factor, which saves a pass over all features.
                variance = self.coefficients[degree] / (self.probabilities[degree - 1] * len(degrees))
                factors[:, 0] *= math.sqrt(variance)
                columns.append(factors.transpose(0, 1).flatten(0, 1))
                runs.append(Run(tuple(start + len(members) * j for j in range(degree)), len(members), 1.0))
                start += degree * len(members)
        constant = math.sqrt(self.coefficients[0])
        self.plan = Plan(constant, 0, tuple(runs), unit=max(self.coefficients))
        return torch.cat(columns).T.to(self.signs.device)
