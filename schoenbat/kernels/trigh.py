"""sinh(x) + cosh(x): equal to exp, kept because the difference between its results and those of exp is pure noise."""

import math

import torch
from torch import Tensor

from schoenbat.kernels import Kernel


class Trigh(Kernel):
    r"""f(x) = sinh(x) + cosh(x), a_n = 1 / n!, for every x."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sinh(x) + torch.cosh(x)

    def coefficient(self, degree: int) -> float:
        return 1 / math.factorial(degree)

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        # sinh and cosh overflow and cancel far from 0. As f = exp, shifting a row only scales it.
        reachable = scores if allowed is None else scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        return super().normalise(scores - reachable.detach().amax(-1, keepdim=True), allowed)
