r"""Dot-product kernels: one file per kernel, found by its exact name.

A kernel is a function f with non-negative Maclaurin coefficients, f(x) = sum_n a_n x^n. By Schoenberg's theorem
(Schoenberg 1942, "Positive definite functions on spheres") these are exactly the functions for which f(<x, y>) is
positive definite in every dimension.

A kernel can also be made from a function alone: `Kernel.from_callable(torch.cosh)`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from schoenbat.kernels._series import MaclaurinSeries
from schoenbat.registry import Registry


class Kernel(ABC):
    """A function of a dot product, elementwise on tensors of any shape.

    A subclass that does not define `coefficient` must take complex tensors as well: then its coefficients are computed.
    """

    is_exponential: ClassVar[bool] = False
    """Whether f = exp, so that normalised weights are a softmax: it cannot overflow and has fused forms."""
    radius: float = math.inf
    """Radius of convergence of the series; arguments must stay below it in absolute value."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """f(x), elementwise, for abs(x) < radius."""

    def coefficient(self, degree: int) -> float:
        """The Maclaurin coefficient a_degree, never negative."""
        return self.series.coefficient(degree)

    @cached_property
    def series(self) -> MaclaurinSeries:
        """The Maclaurin series as computed from f alone, with an error bound for each coefficient.

        Raises:
            UserError: f is no dot-product kernel, such as one with a negative coefficient.
        """
        return MaclaurinSeries(self, self.radius, type(self).__name__)

    @staticmethod
    def from_callable(f: Callable[[Tensor], Tensor], radius: float = math.inf, name: str | None = None) -> "Kernel":
        """The kernel f, with Maclaurin coefficients computed by Cauchy's formula, each with a bound on its error.

        Args:
            f: maps tensors of any shape elementwise, real to real and complex to complex; analytic for abs(x) < radius.
            radius: the radius of convergence of its series, or less.
            name: what errors call it; by default the name of f.

        Raises:
            UserError: f is not finite or not analytic inside `radius`, is not real on the real axis, or has a
                coefficient that is negative beyond its error: the first 32 are looked at here, others when asked for.
        """
        return _CallableKernel(f, radius, name or str(getattr(f, "__name__", type(f).__name__)))

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


class _CallableKernel(Kernel):
    def __init__(self, f: Callable[[Tensor], Tensor], radius: float, name: str) -> None:
        self._f = f
        self.radius = radius
        self.series = MaclaurinSeries(f, radius, name)

    def __call__(self, x: Tensor) -> Tensor:
        return self._f(x)


KERNELS: Registry[Kernel] = Registry("dotf", "schoenbat.kernels", Kernel)  # type: ignore[type-abstract]
