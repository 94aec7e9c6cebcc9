"""exp(x): normalised, it is softmax attention."""

import math

import torch
from torch import Tensor

from schoenbat.kernels import Kernel


class Exp(Kernel):
    r"""f(x) = exp(x), a_n = 1 / n!, for every x."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def coefficient(self, degree: int) -> float:
        return 1 / math.factorial(degree)

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        if allowed is None:
            return torch.softmax(scores, -1)
        masked = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        # Only a row without anything allowed has weight left outside of `allowed`.
        return torch.softmax(masked, -1) * allowed.any(-1, keepdim=True)
