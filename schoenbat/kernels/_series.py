r"""Maclaurin coefficients of a function that is given as code only, by Cauchy's formula.

For f analytic in abs(z) < R and any r < R,

    a_n = 1 / (2 pi r^n)  integral over [0, 2 pi] of  f(r e^(i t)) e^(-i n t) dt.

The integrand is periodic and analytic, so the trapezoid rule converges geometrically (Trefethen & Weideman 2014,
"The exponentially convergent trapezoidal rule", SIAM Review 56). With N > n points, M(r) the maximum of abs(f) on the
circle, and any rho between r and R, the computed coefficient is off by at most

    r^-n [ M(rho) q^N / (1 - q^N)  +  8 eps (1 + n + k) M(r)  +  noise(r) ],
    q = r / rho,  k = log(M(rho) / M(r)) / log(rho / r).

The first term is aliasing: the rule returns a_n + a_(n+N) r^N + a_(n+2N) r^(2N) + ..., and abs(a_m) <= M(rho) / rho^m
by Cauchy's estimate. The second is rounding in float64: the points are off by a few eps, which f amplifies by its
condition r M'(r) / M(r) <= k (Hadamard's three circles) and the factor e^(-i n t) by n. The third is what the code of
f loses on its own, as (1 + x)^40 loses 40 roundings of 1 + x however small x is. It is measured: an analytic f has no
negative degrees, so what Cauchy's formula finds there is noise, and noise(r) is twice its largest value on the circle
(twice, as the same falls on the degrees that f has).

Which r is best depends on n (Bornemann 2011, "Accuracy and stability of computing high-order derivatives of analytic
functions by Cauchy integrals", Found. Comput. Math. 11): each degree takes, of a ladder of circles, the one with the
least bound. M is the maximum over some points of the circle, among them the positive real one, where a function with
non-negative coefficients is largest; so the bound is exact for every function that is accepted.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchquad import Trapezoid

from schoenbat.errors import UserError

MAX_DEGREE = 255
_BLOCK = 32
"""Degrees computed at a time."""
_EPS = torch.finfo(torch.float64).eps
_LARGE = 1e60
"""Beyond a circle on which f exceeds its lowest term this many times no larger one is tried."""
_OVERFLOW = 1e250
"""A circle on which f overflows ends the ladder if f exceeds this on the one before, and is an error otherwise."""
_TOO_LARGE = 1e305
"""Beyond a circle on which f exceeds this no larger one is tried."""
_UNDERFLOW = 1e-280
_TOO_SMALL = 1e-305
"""A circle on which f, or f over its size, stays below this or `_UNDERFLOW` says nothing: rounding is not relative."""
_NOISE = 1e-9
"""More noise than this share of f is no rounding in float64: f is not analytic, or is computed in less."""


@dataclass(frozen=True)
class _Circle:
    """The circle of `radius`, with the maximum of abs(f) on it and on the next larger one, and the noise of f on it."""

    radius: float
    maximum: float
    outer_radius: float
    outer_maximum: float
    noise: float = 0.0

    @property
    def condition(self) -> float:
        """k of the module's formula."""
        return max(0.0, math.log(self.outer_maximum / self.maximum) / math.log(self.outer_radius / self.radius))

    def num_points(self, above: int) -> int:
        """Return the least power of two above `above` that brings aliasing below rounding."""
        decay = math.log(self.outer_radius / self.radius)
        needed = (math.log(self.outer_maximum / self.maximum) - math.log(_EPS)) / decay
        return 2 ** math.ceil(math.log2(max(needed, above + 1)))

    def aliasing(self, num_points: int) -> float:
        decayed = (self.radius / self.outer_radius) ** num_points
        return self.outer_maximum * decayed / (1 - decayed)

    def rounding(self, degrees: Tensor | float) -> Tensor | float:
        return 8 * _EPS * (1 + degrees + self.condition) * self.maximum + self.noise


class MaclaurinSeries:
    """The coefficients of f, computed in blocks of degrees when they are first asked for, and kept.

    Args:
        f: analytic for abs(x) < radius; maps tensors of any shape elementwise, complex to complex and real to real.
        radius: its radius of convergence, or less.
        name: what f is called in errors.

    Raises:
        UserError: f cannot be evaluated inside `radius`, is not finite or not analytic there, is not real on the real
            axis, is 0 everywhere, or has a coefficient that is negative beyond its error.
    """

    def __init__(self, f: Callable[[Tensor], Tensor], radius: float, name: str) -> None:
        if not isinstance(radius, int | float) or not radius > 0:
            raise UserError(f"kernel {name!r}: radius must be positive, not {radius!r}")
        self._f = f
        self._radius = radius
        self._name = name
        self._values: list[float] = []
        self._errors: list[float] = []
        self._size = 1.0
        at_zero = self._evaluate(torch.zeros(1, dtype=torch.float64)).real.item()
        if not math.isfinite(at_zero):
            raise UserError(f"kernel {name!r} is not finite at 0: f(0) = {at_zero:g}")
        # All that follows is for f over its size, so that neither it nor a coefficient of high degree underflows.
        size = abs(self._evaluate(torch.full((1,), min(1.0, radius / 2), dtype=torch.float64)).real.item())
        self._size = size if 1e-307 < size < math.inf else 1.0
        self._circles = self._ladder()
        values, errors = self._block(0)
        self._check_real_axis(values, errors)
        self._append(values, errors)

    def coefficient(self, degree: int) -> float:
        """Return a_degree, or 0 where it is within its error; raises UserError when it is negative beyond that."""
        return self._size * self.relative(degree)

    def relative(self, degree: int) -> float:
        """Return a_degree over f(1), or over f at half the radius if that is less than 1."""
        self._extend(degree)
        value, error = self._values[degree], self._errors[degree]
        return value if value > error else 0.0

    def error(self, degree: int) -> float:
        """Return the bound on the error of a_degree (see the module)."""
        self._extend(degree)
        return self._size * self._errors[degree]

    def _extend(self, degree: int) -> None:
        if not 0 <= degree <= MAX_DEGREE:
            raise ValueError(f"computed Maclaurin coefficients go from degree 0 to {MAX_DEGREE}, not to {degree}")
        while len(self._values) <= degree:
            self._append(*self._block(len(self._values)))

    def _append(self, values: Tensor, errors: Tensor) -> None:
        for value, error in zip(values.tolist(), errors.tolist(), strict=True):
            degree = len(self._values)
            if value < -error:
                raise UserError(
                    f"kernel {self._name!r}: the Maclaurin coefficient of degree {degree} is "
                    f"{self._size * value:.6g} (error at most {self._size * error:.1g}), but a dot-product kernel has "
                    "none below 0 (Schoenberg)"
                )
            self._values.append(value)
            self._errors.append(error)

    def _evaluate(self, x: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                out = self._f(x.clone())  # f may work in place
        except (RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"kernel {self._name!r} cannot be evaluated on {x.dtype} tensors: {reason}") from error
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise UserError(f"kernel {self._name!r} must map a tensor to a tensor of the same shape")
        if out.is_complex() and not x.is_complex():
            raise UserError(f"kernel {self._name!r} must map real tensors to real ones, or its series is not real")
        return out * (1 / self._size)

    def _ladder(self) -> list[_Circle]:
        """Make circles from near 0 to near the radius of convergence (or 1024), as far as f is of use on them."""
        if math.isinf(self._radius):
            radii = [2 ** (k / 4) for k in range(-40, 41)]
        else:
            radii = [self._radius * 2 ** (k / 4) for k in range(-40, -3)]
            radii += [self._radius * (1 - 2.0**-j) for j in range(2, 10)]
        kept: list[tuple[float, float]] = []
        for r in radii:
            maximum = self._on_circle(r, 256).abs().max().item()
            if not math.isfinite(maximum):
                if kept and self._size * kept[-1][1] > _OVERFLOW:
                    break
                raise UserError(
                    f"kernel {self._name!r} is not finite on the circle abs(x) = {r:.6g}, inside its radius "
                    f"{self._radius:g}; pass its radius of convergence, or a smaller one"
                )
            if maximum < _UNDERFLOW or self._size * maximum < _TOO_SMALL:
                continue
            kept.append((r, max(maximum, kept[-1][1]) if kept else maximum))
            if len(kept) > 1 and (self._size * maximum > _TOO_LARGE or _growth(kept) > math.log(_LARGE)):
                break
        if len(kept) < 2:
            raise UserError(f"kernel {self._name!r} is 0 everywhere, but one of its coefficients must be positive")
        circles = [_Circle(*inner, *outer) for inner, outer in itertools.pairwise(kept)]
        return [dataclasses.replace(circle, noise=self._noise(circle)) for circle in circles]

    def _noise(self, circle: _Circle) -> float:
        """Measure noise(r) of the module's formula."""
        half = circle.num_points(above=_BLOCK)
        spectrum = torch.fft.fft(self._on_circle(circle.radius, 2 * half))
        spectrum[:half] = (
            0  # What is left stands for degrees below 0, and above `half`, where aliasing is below rounding.
        )
        noise = 2 * torch.fft.ifft(spectrum).abs().max().item()
        if noise > _NOISE * circle.maximum:
            raise UserError(
                f"kernel {self._name!r}: its values on the circle abs(x) = {circle.radius:.6g} are no power series, by "
                f"{noise / circle.maximum:.1g} of them; {self._promise()}"
            )
        return noise

    def _on_circle(self, r: float, num_points: int) -> Tensor:
        angles = torch.arange(num_points, dtype=torch.float64) * (2 * math.pi / num_points)
        return self._evaluate(torch.polar(torch.full_like(angles, r), angles)).to(torch.complex128)

    def _block(self, first: int) -> tuple[Tensor, Tensor]:
        """Compute values and error bounds of the degrees from `first` on, [_BLOCK] each."""
        degrees = torch.arange(first, first + _BLOCK, dtype=torch.float64)
        values, errors = [], []
        for circle in self._circles:
            scale = circle.radius**-degrees
            num_points = circle.num_points(above=first + _BLOCK)
            bound = scale * (circle.aliasing(num_points) + circle.rounding(degrees))
            # r^-n itself may leave float64, and then this circle says nothing of degree n.
            usable = torch.isfinite(bound) & (scale > 1e-300)
            values.append(torch.where(usable, scale * self._integrals(circle.radius, degrees, num_points), 0.0))
            errors.append(torch.where(usable, bound, math.inf))
        stacked = torch.stack(values)
        best = torch.stack(errors).min(0)
        chosen = stacked.gather(0, best.indices[None])[0]
        # Cauchy's formula gives the same on every circle, unless f is not analytic between them.
        differs = (stacked - chosen).abs() > torch.stack(errors) + best.values
        for row, column in differs.nonzero().tolist()[:1]:
            used = self._circles[int(best.indices[column])]
            raise UserError(
                f"kernel {self._name!r}: its values on the circles abs(x) = {self._circles[row].radius:.6g} and "
                f"{used.radius:.6g} give different coefficients of degree {first + column}: "
                f"{self._size * stacked[row, column]:.17g} and {self._size * chosen[column]:.17g}; {self._promise()}"
            )
        return chosen, best.values

    def _integrals(self, r: float, degrees: Tensor, num_points: int) -> Tensor:
        """Compute r^n times the real part of Cauchy's formula for each degree n, by `num_points` points."""

        def integrand(points: Tensor) -> Tensor:
            angle = points[:, 0]
            values = self._evaluate(torch.polar(torch.full_like(angle, r), angle))
            return values[:, None] * torch.exp(-1j * angle[:, None] * degrees)

        domain = torch.tensor([[0.0, 2 * math.pi]], dtype=torch.float64)
        # Both ends of the interval are the same point of the circle.
        integral = Trapezoid().integrate(integrand, dim=1, N=num_points + 1, integration_domain=domain)
        return integral.real / (2 * math.pi)

    def _check_real_axis(self, values: Tensor, errors: Tensor) -> None:
        """Refuse f if its series does not sum to it where the circles meet the real axis.

        With a circle of radius R at hand, the degrees left out sum to less than M(R) 4^-_BLOCK 4/3 for abs(x) <= R / 4.
        """
        degrees = torch.arange(_BLOCK)
        for circle in self._circles:
            wide = next((other for other in self._circles if other.radius >= 4 * circle.radius), None)
            if wide is None:
                return
            points = torch.tensor([-circle.radius, circle.radius], dtype=torch.float64)
            powers = points[:, None] ** degrees
            given, summed = self._evaluate(points), powers @ values
            tail = wide.maximum * 4 / 3 * 4.0**-_BLOCK
            allowed = powers.abs() @ errors + tail + circle.rounding(0.0) + circle.noise
            for x, one, other, limit in torch.stack([points, given, summed, allowed]).T.tolist():
                if not abs(one - other) <= limit:
                    raise UserError(
                        f"kernel {self._name!r}: f({x:.6g}) = {self._size * one:.17g}, but the series made of its "
                        f"values at complex numbers gives {self._size * other:.17g}; {self._promise()}"
                    )

    def _promise(self) -> str:
        return (
            f"f must be analytic for abs(x) < {self._radius:g} (pass its radius of convergence) and keep the precision "
            "of its argument"
        )


def _growth(circles: list[tuple[float, float]]) -> float:
    """Return the logarithm of f on the last circle over the power of x that f follows on the first two."""
    (r, first), (s, second), (t, last) = circles[0], circles[1], circles[-1]
    power = math.log(second / first) / math.log(s / r)
    return math.log(last / first) - power * math.log(t / r)
