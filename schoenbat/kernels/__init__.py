r"""Dot-product kernels: one file per kernel, found by its exact name.

A kernel is a function f with non-negative Maclaurin coefficients, f(x) = sum_n a_n x^n. By Schoenberg's theorem
(Schoenberg 1942, "Positive definite functions on spheres") these are exactly the functions for which f(<x, y>) is
positive definite in every dimension. The weights f(<q, k>) of attention may still be negative, as a coefficient of odd
degree counts with the sign of x: such a kernel, x for one, `is_signed`.

A kernel can also be made from a function alone: `Kernel.from_callable(torch.cosh)`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from schoenbat.errors import UserError
from schoenbat.kernels._series import MaclaurinSeries
from schoenbat.registry import Registry

_LARGEST = 1e36
"""Values beyond it, or sums of some hundred of them, are no float32 any more."""
_RANGE = 16.0
"""Where a kernel that is defined everywhere is looked at."""
_LOW = 32
"""Degrees that make up the parts of a kernel near 0."""


class Kernel(ABC):
    """A function of a dot product, elementwise on tensors of any shape.

    A subclass that does not define `coefficient` must take complex tensors as well: then its coefficients are computed.
    """

    is_exponential: bool = False
    """Whether f = c exp, so that normalised weights are a softmax: it cannot overflow and has fused forms."""
    radius: float = math.inf
    """Radius of convergence of the series; arguments must stay below it in absolute value."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate f(x), elementwise, for abs(x) < radius."""

    def coefficient(self, degree: int) -> float:
        """Return the Maclaurin coefficient a_degree, never negative."""
        return self.series.coefficient(degree)

    @cached_property
    def series(self) -> MaclaurinSeries:
        """The Maclaurin series as computed from f alone, with an error bound for each coefficient.

        Raises:
            UserError: f is no dot-product kernel, such as one with a negative coefficient.
        """
        return MaclaurinSeries(self, self.radius, type(self).__name__)

    @property
    def unit_argument(self) -> float:
        """1, or half the radius of convergence if that is less: an argument of the usual size."""
        return min(1.0, self.radius / 2)

    @cached_property
    def magnitude(self) -> float:
        """What attention divides f by, so that f times a constant is computed as f is: f at the unit argument.

        For c exp it is c. Where f overflows, the argument is halved.
        """
        at = torch.tensor(0.0 if self.is_exponential else self.unit_argument, dtype=torch.float64, device="cpu")
        return next(value for k in range(64) if math.isfinite(value := float(self(at * 0.5**k))))

    def relative_coefficient(self, degree: int) -> float:
        """Return a_degree / `magnitude`."""
        return self.coefficient(degree) / self.magnitude

    def relative(self, x: Tensor) -> Tensor:
        """Evaluate f(x) / `magnitude`, in the dtype of x or in float64."""
        if 1e-20 < self.magnitude < 1e20 or x.dtype == torch.float64:
            return self(x) / self.magnitude
        return self._relative_in_float64(x)

    def _relative_in_float64(self, x: Tensor) -> Tensor:
        # MPS has no float64.
        return self(x if x.device.type == "mps" else x.double()) / self.magnitude

    @cached_property
    def largest_argument(self) -> float:
        """Where `relative` leaves the numbers of its dtype, or `radius` if that comes first; exp has no such limit."""
        if self.is_exponential or not math.isinf(self.radius):
            return self.radius
        powers = 2.0 ** torch.arange(-8, 512, 0.25, dtype=torch.float64, device="cpu")
        within = (self._relative_in_float64(powers).abs() < self._largest).tolist()
        return float(powers[within.index(False) - 1]) if False in within else math.inf

    _largest = _LARGEST

    @cached_property
    def is_signed(self) -> bool:
        """Whether f is negative somewhere inside `radius`, or for abs(x) <= 16 where that is infinite.

        Normalised attention is ill-posed then: a sum of weights can be 0. Without negative coefficients f is largest at
        abs(x), so that a value counts as negative below -1e-12 f(abs(x)). f has the sign of its lowest odd term near 0
        if that is its lowest term; elsewhere 4,096 points are looked at.
        """
        lowest = next((degree for degree in range(_LOW) if self.coefficient(degree) > 0), 0)
        if lowest % 2:
            return True
        edge = min(_RANGE, self.radius * (1 - 1e-6))
        share = torch.arange(1, 2049, dtype=torch.float64) / 2048
        x = edge * torch.cat([share, 10 ** (-12 * share)])
        return bool((self(-x) < -1e-12 * self(x)).any())

    @staticmethod
    def from_callable(f: Callable[[Tensor], Tensor], radius: float = math.inf, name: str | None = None) -> "Kernel":
        """Make a kernel of f, with Maclaurin coefficients by Cauchy's formula, each with a bound on its error.

        Args:
            f: maps tensors of any shape elementwise, real to real and complex to complex; analytic for abs(x) < radius.
                It is given a copy, and may change it in place.
            radius: the radius of convergence of its series, or less.
            name: what errors call it; by default the name of f.

        Raises:
            UserError: f is no function, is 0 everywhere, is not finite or not analytic inside `radius`, is not real on
                the real axis, or has a coefficient that is negative beyond its error: the first 32 are looked at here,
                others when asked for.
        """
        if not callable(f):
            hint = "; named kernels are KERNELS.get(name)()" if isinstance(f, str) else ""
            raise UserError(f"Kernel.from_callable takes a function of a tensor, not {f!r} ({type(f).__name__}){hint}")
        return _CallableKernel(f, radius, name or str(getattr(f, "__name__", type(f).__name__)))


class _CallableKernel(Kernel):
    """Evaluated in float64 for attention: nothing is known of how fast f grows."""

    _largest = 1e290

    def __init__(self, f: Callable[[Tensor], Tensor], radius: float, name: str) -> None:
        self._f = f
        self.radius = radius
        self.series = MaclaurinSeries(f, radius, name)
        points = torch.linspace(-8, 8, 65, dtype=torch.float64)
        self.is_exponential = math.isinf(radius) and bool(
            torch.allclose(self(points), self(torch.zeros_like(points)) * points.exp(), rtol=1e-12, atol=0)
        )

        # Looked up here, as torch.compile cannot follow a look-up.
        assert self.magnitude > 0

    def __call__(self, x: Tensor) -> Tensor:
        return self._f(x.clone())

    def coefficient(self, degree: int) -> float:
        return self.magnitude / math.factorial(degree) if self.is_exponential else self.series.coefficient(degree)

    def relative_coefficient(self, degree: int) -> float:
        return 1 / math.factorial(degree) if self.is_exponential else self.series.relative(degree)

    def relative(self, x: Tensor) -> Tensor:
        return self._relative_in_float64(x)


KERNELS: Registry[Kernel] = Registry("dotf", "schoenbat.kernels", Kernel)  # type: ignore[type-abstract]
