r"""How many of D features each degree of a kernel should get, and what error is left.

Let x and y have |x| |y| = s and independent uniform directions in R^d, so that t = <x, y> / s has the density
proportional to (1 - t^2)^((d-3)/2). On the sphere the kernel is diagonal in spherical harmonics (Funk and Hecke):

    f(s t) = sum_l mu_l N_l P_l(t),    mu_l = E f(s t) P_l(t),

with P_l the Gegenbauer polynomial that is 1 at t = 1 and N_l the number of orthonormal harmonics of degree l. Each of
them costs one feature and takes mu_l^2 off the expected squared error; by Eckart and Young no D features leave less
error than the D harmonics of largest mu_l. Products of l different coordinates are harmonic, so they serve as features
in any orthonormal basis: C(d, l) of them, all equally good for a random basis. A degree that gets n of its N_l
harmonics is thereby the unbiased sketch, which is N_l / n times as large, shrunk by n / N_l, the factor of least error.

When a budget reaches the C(d + p - 1, p) monomials of a degree p, that degree is exact for every pair of vectors, and
the remainder of f is treated as above.

Vectors come in one of two ways:

- as they are, with |x| and |y| known (`fixed_norm`). The constant and linear features then also carry what the higher
  degrees contribute to them;
- of any length up to sqrt(s). Each feature is then weighted by its own Maclaurin term, sqrt(l! a_l), which is right for
  every length.

Real vectors are not isotropic. Where few tokens cancel, a sketch of little has more variance than that, and where
vectors share directions, the shrinkage of a large share is a bias that all pairs have in common. So the factor of a
degree of which the share r = n / N_l is covered is not r but r min(1/2 + 3 r, 1 + r), up to 1: half of the best one
for a small share, which keeps three quarters of what it takes off the expected squared error, and more for a large one.

Attention divides, so the error of its output is another one than that of f. For exp a part of an odd degree above the
first makes the output worse, up to four times the budget, and so does a part of a degree beyond an incomplete one
(benchmarks/budgets.py). Such a part gets no features, and not all of the budget is spent. Other kernels are weighted by
what is known of them (`schoenbat.ops._fit`).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torchquad import GaussLegendre

from schoenbat.kernels import Kernel

NODES = 200
"""Nodes of the Gauss-Legendre rule over the angle."""


@dataclass(frozen=True)
class Share:
    """The features of one degree.

    Attributes:
        degree: of the monomials that are its features.
        num_features: how many there are.
        of: how many describe the degree: N_degree harmonics, or, where `exact`, all monomials.
        exact: whether the degree's Maclaurin term comes out exactly, for all vectors.
        weight: the factor of a feature x_1 x_2 ... with different coordinates; sqrt(1 / m!) comes on top for a
            coordinate that is repeated m times.
        gain: by how much one of its features lowers the expected squared error, relative to E f^2.
        coefficient, noise: what all of them say of f over its magnitude (`schoenbat.features.plan.Described`).
    """

    degree: int
    num_features: int
    of: int
    exact: bool
    weight: float
    gain: float
    coefficient: float
    noise: float


@dataclass(frozen=True)
class Allocation:
    """The features of each degree, and the error that they leave.

    Attributes:
        head_dim: d.
        scale: s = |x| |y|.
        shares: ascending in degree; their sizes add up to the budget, or to less where the series is exhausted.
        expected_error: sqrt(E (estimate - f)^2 / E f^2) over isotropic directions and the random basis.
        root_mean_square: sqrt(E f^2), the size of a kernel value.
        unexplained: E (estimate - f)^2 over the variance of f: what is not known of how f differs between directions.
    """

    head_dim: int
    scale: float
    shares: tuple[Share, ...]
    expected_error: float
    root_mean_square: float
    unexplained: float

    @property
    def num_features(self) -> int:
        return sum(share.num_features for share in self.shares)

    def rows(self) -> list[dict[str, int | float | bool]]:
        """Return one row per degree, for a table or a figure."""
        return [
            {
                "degree": share.degree,
                "num_features": share.num_features,
                "of": share.of,
                "exact": share.exact,
                "gain": share.gain * share.num_features,
            }
            for share in self.shares
        ]

    def __str__(self) -> str:
        lines = [f"{'degree':>6} {'features':>8} {'of':>8}  {'gain':>8}"]
        lines += [
            f"{share.degree:>6} {share.num_features:>8} {share.of:>8}  {share.gain * share.num_features:8.1e}"
            f"{'  exact' if share.exact else ''}"
            for share in self.shares
        ]
        lines.append(f"{self.num_features} features, expected relative error {self.expected_error:.2e}")
        return "\n".join(lines)


def allocate(
    kernel: Kernel, *, head_dim: int, num_features: int, scale: float, max_degree: int, fixed_norm: bool
) -> Allocation:
    """Find the allocation of least expected error.

    Args:
        kernel: gives f and its coefficients a_n.
        head_dim: d.
        num_features: the budget D, at least 1.
        scale: s = |x| |y|, below the kernel's radius.
        max_degree: the highest degree that may get features.
        fixed_norm: whether all vectors have the length sqrt(s).
    """
    for name, value, least in (
        ("head_dim", head_dim, 1),
        ("num_features", num_features, 1),
        ("max_degree", max_degree, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if not 0 < scale < kernel.radius:
        raise ValueError(f"scale must lie between 0 and the kernel's radius {kernel.radius:g}, not {scale:g}")
    coefficients = [kernel.relative_coefficient(degree) for degree in range(max_degree + 1)]
    candidates = []
    for exact_through in [-1, *range(2, max_degree + 1)]:
        exact = [p for p in range(exact_through + 1) if coefficients[p] > 0]
        if sum(num_monomials(head_dim, p) for p in exact) > num_features:
            break
        candidates.append(_allocate_rest(kernel, coefficients, exact, head_dim, num_features, scale, fixed_norm))
    return min(candidates, key=lambda allocation: allocation.expected_error)


def num_monomials(head_dim: int, degree: int) -> int:
    """Count the monomials of degree p in d coordinates, C(d + p - 1, p)."""
    return math.comb(head_dim + degree - 1, degree)


def num_harmonics(head_dim: int, degree: int) -> int:
    """Count the homogeneous polynomials of degree l, less those that are |x|^2 times another: N_l."""
    return num_monomials(head_dim, degree) - (num_monomials(head_dim, degree - 2) if degree >= 2 else 0)


def _allocate_rest(
    kernel: Kernel,
    coefficients: list[float],
    exact: list[int],
    head_dim: int,
    num_features: int,
    scale: float,
    fixed_norm: bool,
) -> Allocation:
    """Give degrees in `exact` all their monomials, and the rest of the budget to the harmonics of largest gain."""
    # There are no products of more than d different coordinates.
    degrees = range(min(len(coefficients) - 1, head_dim) + 1)

    def integrand(t: np.ndarray) -> np.ndarray:
        u = torch.from_numpy(scale * t)
        value = kernel.relative(u)
        rest = value - sum((coefficients[p] * u**p for p in exact), torch.zeros_like(u))
        harmonics = itertools.islice(_gegenbauer(t, head_dim), len(degrees))
        products = [rest.numpy() * harmonic for harmonic in harmonics]
        return np.stack([value.numpy() ** 2, value.numpy(), rest.numpy() ** 2, *products], -1)

    total, mean, left, *projections = _expect(integrand, head_dim)
    norms = [math.prod(head_dim + 2 * j for j in range(degree)) for degree in degrees]
    used, weights, gains = {}, {}, {}
    for degree, projection in zip(degrees, projections, strict=True):
        own = 0.0 if degree in exact else coefficients[degree] * scale**degree * math.factorial(degree) / norms[degree]
        used[degree] = max(projection, 0.0) if fixed_norm else own
        # mu^2, less (mu - used)^2.
        gains[degree] = 2 * projection * used[degree] - used[degree] ** 2
        weights[degree] = used[degree] * norms[degree] / scale**degree

    shares = []
    budget = num_features
    for degree in exact:
        squared = math.factorial(degree) * coefficients[degree]
        if degree <= 1 and fixed_norm:
            squared += weights[degree]
            left -= gains[degree] * (head_dim if degree else 1)
        count = num_monomials(head_dim, degree)
        weight, coefficient = math.sqrt(squared * kernel.magnitude), squared / math.factorial(degree)
        shares.append(Share(degree, count, count, True, weight, 0.0, coefficient, 0.0))
        budget -= count
    for degree in sorted(_incomplete(kernel, exact, degrees), key=lambda degree: -gains[degree]):
        capacity = math.comb(head_dim, degree)
        count = min(budget, capacity)
        # Below that it is rounding.
        if count and gains[degree] > 1e-26 * total:
            harmonics = num_harmonics(head_dim, degree)
            share = count / harmonics
            boost = min(0.5 + 3 * share, 1 + share, 1 / share)
            enlarged = boost * used[degree]
            gain = 2 * projections[degree] * enlarged - enlarged**2
            complete = degree <= 1 and count == capacity
            weight = math.sqrt(boost * weights[degree] * kernel.magnitude)
            coefficient, noise = weights[degree], 0.0
            if not complete:
                coefficient = count * enlarged / scale**degree
                noise = count * enlarged**2 * (1 - share) * head_dim**degree / scale ** (2 * degree)
            shares.append(Share(degree, count, harmonics, complete, weight, gain / total, coefficient, noise))
            left -= count * gain
            budget -= count
    shares.sort(key=lambda share: share.degree)
    # Rounding may leave less than nothing.
    left = max(left, 0.0)
    unexplained = min(1.0, left / max(total - mean**2, 1e-15 * total))
    size = kernel.magnitude * math.sqrt(total)
    return Allocation(head_dim, scale, tuple(shares), math.sqrt(left / total), size, unexplained)


def _incomplete(kernel: Kernel, exact: list[int], degrees: range) -> set[int]:
    """Return the degrees of which a part may be described."""
    others = set(degrees) - set(exact)
    if not kernel.is_exponential:
        return others
    following = max(exact, default=1) + 1
    return {degree for degree in others if degree <= 1 or (degree == following and degree % 2 == 0)}


def _gegenbauer(t: np.ndarray, head_dim: int) -> Iterator[np.ndarray]:
    """Yield P_0, P_1, ... at t, with P_l(1) = 1."""
    before, current = np.zeros_like(t), np.ones_like(t)
    for degree in itertools.count():
        yield current
        # For d = 2 and degree 0 the recurrence is 0 / 0; P_1(t) = t for every d.
        if degree == 0:
            before, current = current, t
        else:
            following = ((2 * degree + head_dim - 2) * t * current - degree * before) / (degree + head_dim - 2)
            before, current = current, following


def _expect(function: Callable[[np.ndarray], np.ndarray], head_dim: int) -> list[float]:
    """Average each column of function(t) over the cosine t of two independent directions in R^d."""
    if head_dim == 1:
        return function(np.array([-1.0, 1.0])).mean(0).tolist()

    def weighted(angle: np.ndarray) -> np.ndarray:
        # t = cos(angle) has the density sin(angle)^(d-2), which is smooth for every d.
        density = np.sin(angle[:, 0]) ** (head_dim - 2)
        return np.concatenate([density[:, None], density[:, None] * function(np.cos(angle[:, 0]))], -1)

    domain = np.array([[0.0, math.pi]])
    mass, *moments = GaussLegendre().integrate(weighted, dim=1, N=NODES, integration_domain=domain)
    return [float(moment / mass) for moment in moments]
