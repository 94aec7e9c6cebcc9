r"""Dot-product kernels: one file per kernel, found by its exact name.

A kernel is a function f with non-negative Maclaurin coefficients, f(x) = sum_n a_n x^n. By Schoenberg's theorem
(Schoenberg 1942, "Positive definite functions on spheres") these are exactly the functions for which f(<x, y>) is
positive definite in every dimension.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from schoenbat.registry import Registry


class Kernel(ABC):
    """A function of a dot product, elementwise on tensors of any shape."""

    is_exponential: ClassVar[bool] = False
    """Whether f = exp, so that normalised weights are a softmax: it cannot overflow and has fused forms."""
    radius: ClassVar[float] = math.inf
    """Radius of convergence of the series; arguments must stay below it in absolute value."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """f(x), elementwise, for abs(x) < radius."""

    @abstractmethod
    def coefficient(self, degree: int) -> float:
        """The Maclaurin coefficient a_degree, never negative."""

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        """f(scores) where `allowed`, else 0, divided by its sum along the last axis.

        A row in which nothing is allowed comes out finite and means nothing.

        Args:
            scores: [..., M], below `radius` in absolute value wherever allowed.
            allowed: bool, broadcastable to `scores`, or None for everywhere.
        """
        if self.is_exponential:
            if allowed is not None:
                scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
            return torch.softmax(scores, -1)
        if allowed is None:
            weights = self(scores)
        else:
            # 0 lies inside every radius of convergence, so f is evaluated only where it is defined.
            weights = self(scores.masked_fill(~allowed, 0.0)).masked_fill(~allowed, 0.0)
        return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


KERNELS: Registry[Kernel] = Registry("dotf", "schoenbat.kernels", Kernel)  # type: ignore[type-abstract]
