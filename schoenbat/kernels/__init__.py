r"""Dot-product kernels: one file per kernel, found by its exact name.

A kernel is a function f with non-negative Maclaurin coefficients, f(x) = sum_n a_n x^n. By Schoenberg's theorem
(Schoenberg 1942, "Positive definite functions on spheres") these are exactly the functions for which f(<x, y>) is
positive definite in every dimension.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from schoenbat.registry import Registry


class Kernel(ABC):
    """A function of a dot product, elementwise on tensors of any shape."""

    radius: ClassVar[float] = math.inf
    """Radius of convergence of the series; arguments must stay below it in absolute value."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """f(x), elementwise, for abs(x) < radius."""

    @abstractmethod
    def coefficient(self, degree: int) -> float:
        """The Maclaurin coefficient a_degree, never negative."""

    def weights(self, scores: Tensor) -> Tensor:
        """f(scores) up to a factor that is constant along the last axis, for use before a normalisation.

        A kernel that overflows for large arguments divides by such a factor here.
        """
        return self(scores)


KERNELS: Registry[Kernel] = Registry("dotf", "schoenbat.kernels", Kernel)  # type: ignore[type-abstract]
