"""Kernels of all shapes for tests that must hold for every kernel, the same ones for the same seed.

`unsigned_kernels` have non-negative coefficients and non-negative values inside their radius: normalised attention by
them is a mean. `signed_kernels` have non-negative coefficients alone.
"""

import math
import random

import numpy as np
import torch
from torch import Tensor

from schoenbat.kernels import KERNELS, Kernel

NUM_UNSIGNED = 200
NUM_FALLING = 200
MAX_DEGREE = 12
EDGE = 1.05
"""Radius of a polynomial that is not non-negative everywhere: a little more than 1, the reach of unit vectors."""


class Polynomial(Kernel):
    """sum_n a_n x^n by Horner's rule, with exact coefficients."""

    def __init__(self, coefficients: list[float], radius: float = math.inf) -> None:
        self.coefficients = coefficients
        self.radius = radius

    def __call__(self, x: Tensor) -> Tensor:
        total = torch.full_like(x, self.coefficients[-1])
        for coefficient in reversed(self.coefficients[:-1]):
            total = total * x + coefficient
        return total

    def coefficient(self, degree: int) -> float:
        return self.coefficients[degree] if degree < len(self.coefficients) else 0.0


class ScaledExp(Kernel):
    """exp(x + shift), which is exp(shift) exp(x), without saying that it is exponential."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def __call__(self, x: Tensor) -> Tensor:
        return torch.exp(x + self.shift)

    def coefficient(self, degree: int) -> float:
        return math.exp(self.shift) / math.factorial(degree)


class Hyperbolic(Kernel):
    """cosh (`parity` 0) or sinh (1)."""

    def __init__(self, parity: int) -> None:
        self.parity = parity

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sinh(x) if self.parity else torch.cosh(x)

    def coefficient(self, degree: int) -> float:
        return 1 / math.factorial(degree) if degree % 2 == self.parity else 0.0


def unsigned_kernels(seed: int = 0) -> dict[str, Kernel]:
    """`NUM_UNSIGNED` kernels by name: eleven that stand for what is hard or common, and random polynomials."""
    kernels: dict[str, Kernel] = {
        "x^2": Polynomial([0.0, 0.0, 1.0]),
        "x^4": Polynomial([0.0, 0.0, 0.0, 0.0, 1.0]),
        "0.001 + x^2": Polynomial([0.001, 0.0, 1.0]),
        "0.01 + x^2": Polynomial([0.01, 0.0, 1.0]),
        "exp(x - 20)": ScaledExp(-20.0),
        "1e-8 exp": ScaledExp(math.log(1e-8)),
        "cosh": Hyperbolic(0),
        **{name: KERNELS.get(name)() for name in ("yat", "inverse", "log", "sqrt")},
    }
    source = random.Random(seed)
    while len(kernels) < NUM_UNSIGNED:
        coefficients = _draw(source)
        if _is_unsigned(coefficients, EDGE):
            radius = math.inf if _is_unsigned(coefficients, math.inf) else EDGE
            kernels[_name(coefficients)] = Polynomial(coefficients, radius)
    return kernels


def falling_kernels(seed: int = 0) -> list[Kernel]:
    """`NUM_FALLING` kernels that are nowhere negative and fall on much of [-3, 0], so that their slope changes sign.

    Four of five are sums of squares of polynomials with non-negative coefficients, which have roots below 0; the others
    cosh(b x) + c sinh(b x), which is least where tanh(b x) = -c.
    """
    source = random.Random(seed)
    kernels: list[Kernel] = []
    while len(kernels) < NUM_FALLING:
        if len(kernels) % 5 == 4:
            steepness, tilt = source.uniform(0.3, 2), source.uniform(0, 0.95)
            odd = [steepness**n / math.factorial(n) * (tilt if n % 2 else 1) for n in range(40)]
            kernels.append(Polynomial(odd, math.inf))
            continue
        total = np.polynomial.Polynomial([source.choice([0.0, 0.0, 0.1])])
        for _ in range(source.randint(1, 2)):
            factors = [np.polynomial.Polynomial([source.uniform(0.2, 3), 1.0]) for _ in range(source.randint(1, 3))]
            total = total + source.uniform(0.1, 1) * math.prod(factors[1:], start=factors[0]) ** 2
        kernels.append(Polynomial(total.coef.tolist()))
    return kernels


def signed_kernels() -> dict[str, Kernel]:
    return {"x": Polynomial([0.0, 1.0]), "sinh": Hyperbolic(1)}


def _draw(source: random.Random) -> list[float]:
    """Coefficients up to a random degree, all of them or a few, of random decay and size."""
    top = source.randint(1, MAX_DEGREE)
    degrees = set(range(top + 1)) if source.random() < 0.5 else {top, *source.sample(range(top + 1), min(top, 3))}
    if source.random() < 0.25:
        degrees.discard(0)
        degrees.discard(1)
    decay, falls = 10 ** source.uniform(-1, 0.3), source.choice([0.0, 0.5, 1.0])
    size = 10 ** source.choice([0.0, source.uniform(-12, 6)])
    coefficients = [0.0] * (top + 1)
    for degree in degrees:
        coefficients[degree] = size * source.uniform(0.05, 1) * decay**degree / math.factorial(degree) ** falls
    if 0 in degrees and source.random() < 0.3:
        coefficients[0] *= 10 ** source.uniform(-4, 0)
    while coefficients and coefficients[-1] == 0:
        coefficients.pop()
    return coefficients or [size]


def _is_unsigned(coefficients: list[float], edge: float) -> bool:
    """Whether the polynomial is nowhere negative for abs(x) <= edge; with no negative coefficient it is not for x >= 0.

    It is least at an end of the interval or where its derivative is 0; roots are good to a few digits there, which
    suffices as the values about a minimum are flat. A value counts as negative below -1e-12 of that at abs(x).
    """
    polynomial = np.polynomial.Polynomial(np.array(coefficients) / max(coefficients))
    if math.isinf(edge):
        if polynomial.degree() % 2:
            return False
        edge = 1e6
    roots = polynomial.deriv().roots() if polynomial.degree() > 1 else np.array([])
    points = np.concatenate([-np.abs(roots), -np.linspace(0, min(edge, 100.0), 2001)[1:], [-edge]])
    points = points[points >= -edge]
    return bool((polynomial(points) >= -1e-12 * polynomial(-points)).all())


def _name(coefficients: list[float]) -> str:
    powers = ["", " x", *(f" x^{degree}" for degree in range(2, len(coefficients)))]
    return " + ".join(f"{a:.3g}{power}" for a, power in zip(coefficients, powers, strict=False) if a)
