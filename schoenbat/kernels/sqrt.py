"""2 - sqrt(1 - x)."""

import math

import torch
from torch import Tensor

from schoenbat.kernels import Kernel


class Sqrt(Kernel):
    r"""f(x) = 2 - sqrt(1 - x), a_0 = 1 and a_n = C(2n, n) / (4^n (2n - 1)), for abs(x) < 1."""

    radius = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return 2 - torch.sqrt(1 - x)

    def coefficient(self, degree: int) -> float:
        return 1.0 if degree == 0 else math.comb(2 * degree, degree) / (4**degree * (2 * degree - 1))
