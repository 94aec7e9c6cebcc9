"""1 - log(1 - x)."""

import torch
from torch import Tensor

from schoenbat.kernels import Kernel


class Log(Kernel):
    r"""f(x) = 1 - log(1 - x), a_0 = 1 and a_n = 1 / n, for abs(x) < 1."""

    radius = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return 1 - torch.log1p(-x)

    def coefficient(self, degree: int) -> float:
        return 1.0 if degree == 0 else 1 / degree
