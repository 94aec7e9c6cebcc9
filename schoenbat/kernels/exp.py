"""exp(x): normalised, it is softmax attention."""

import math

import torch
from torch import Tensor

from schoenbat.kernels import Kernel


class Exp(Kernel):
    r"""f(x) = exp(x), a_n = 1 / n!, for every x."""

    is_exponential = True

    def __call__(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def coefficient(self, degree: int) -> float:
        return 1 / math.factorial(degree)
