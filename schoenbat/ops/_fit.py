r"""What an estimate of a kernel other than exp says of f, and how far it is believed: a regression for each query.

The features describe two polynomials of the argument x: the degrees that are complete, p_1, and a sketch of further
ones, p_2, with noise. From the mean and the variance of a query's arguments, taken as those of vectors
in random directions,

    f(x)  ~  E f + a_1 (p_1 - E p_1) + a_2 (p_2 - E p_2)

is the regression of least expected squared error. What is known of f about 0 need not hold where the arguments are: a_1
is negative where f falls and p_1 rises, and 0 where they do not go together. Features that describe all of f have
a_1 = 1. With u the part of the variance of f that this leaves, the output is

    mean v + (n / (n + 4 u)) sum_j (a_1 p_1 + a_2 p_2)(v_j - mean v) / S,    S = n E f + a_1 (sum_j p_1 - n E p_1),

where S is kept from falling below u n E f. Arguments in few clusters are skewed. How the fit changes with the
skewness is known to first order; where a skewness of `SKEWNESS` would make it wrong by more than half, it is made
smaller, so that it is at most twice too large.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from schoenbat.features.plan import FeatureMap, Products
from schoenbat.ops._bounds import Moments, linear_factor
from schoenbat.ops.reference import keep_from_zero, least_sum, split

SKEWNESS = 2.0
FEW_KEYS = 4.0
"""So many keys cancel as a rule, by trial over random kernels (benchmarks/bounds.py)."""
_LEAST_NODES = 8


class Fit(NamedTuple):
    """The regression of each query, [..., N, 1]; all but `kept` are over `unit`, the root mean square of f.

    Attributes:
        complete, sketched: a_1 and a_2.
        base, least: of a denominator per key, S / n = base + a_1 sum_j p_1 / n, and how far it is kept from 0.
        kept: the part of the deviation from the mean value that is believed, n / (n + 4 u).
        unit: in float64 where there is one.
    """

    complete: Tensor
    sketched: Tensor
    base: Tensor
    least: Tensor
    kept: Tensor
    unit: Tensor


def fit_of(features: FeatureMap, moments: Moments, head_dim: int) -> Fit:
    """Compute the regression of each query, from the moments of its arguments."""
    kernel, dtype = features.kernel, moments.square.dtype
    mean, square, isotropic, number = (_wide(x) for x in moments)
    tiny = torch.finfo(torch.float32).tiny
    spread = (square - mean.square()).clamp_min(tiny).sqrt()
    nodes = _nodes(max(_LEAST_NODES, 1 + max(features.described, default=0)), head_dim)
    z, weight, skewed = (mean.new_tensor(x) for x in nodes)
    limit = 0.99 * kernel.largest_argument if kernel.radius < math.inf else kernel.largest_argument
    x = (mean + spread * z).clamp(-min(limit, 1e150), min(limit, 1e150))
    f = kernel.relative(x).to(x.dtype)
    # Its squares may leave float64.
    largest = f.detach().abs().amax(-1, keepdim=True).clamp_min(tiny)
    f = f / largest
    p1, p2, noise1, noise2 = _described(features, x, square, isotropic, head_dim)

    def average(y: Tensor) -> Tensor:
        return (y * weight).sum(-1, keepdim=True)

    f_mean, p1_mean, f_square = average(f), average(p1), average(f.square())
    f, p1, p2 = f - f_mean, p1 - p1_mean, p2 - average(p2)
    with_first, with_second, both = average(f * p1), average(f * p2), average(p1 * p2)
    # A ridge far below what matters: what does not vary gets no part.
    ridge = 1e-28 * f_square + tiny
    first, second = average(p1.square()) + noise1 + ridge, average(p2.square()) + noise2 + ridge
    if features.sketched is None or features.sketched == 1:
        a1, a2 = with_first / first, torch.zeros_like(first)
    else:
        determinant = (first * second - both.square()).clamp_min(ridge * torch.maximum(first, second))
        a1 = (with_first * second - with_second * both) / determinant
        a2 = (with_second * first - with_first * both) / determinant
    fitted = a1 * p1 + a2 * p2
    variance = average(f.square())
    size = average(fitted.square()) + a1.square() * noise1 + a2.square() * noise2
    left = (1 - features.linear_share * (a1 * with_first + a2 * with_second) / variance.clamp_min(tiny)).clamp(0, 1)
    off = ((f - fitted) * fitted * skewed).sum(-1, keepdim=True).abs() / size.clamp_min(tiny)
    sure = (2 * (1 - off)).clamp(0, 1)
    unit = f_square.sqrt()
    a1, a2 = a1 * sure / unit, a2 * sure / unit
    f_mean = f_mean / unit
    least = torch.maximum(least_sum(kernel, square) / (largest * unit), left) if kernel.is_signed else left * f_mean
    kept = number / (number + FEW_KEYS * left)
    # What is said of a part of the linear degree has another mean than all of it.
    base = f_mean if features.sketched == 1 else f_mean - a1 * p1_mean
    a1, a2, base, least, kept = (y.to(dtype) for y in (a1, a2, base, least, kept))
    return Fit(a1, a2, base, least, kept, largest * unit)


def fit_parts(
    features: FeatureMap, products: Products, query: Tensor, first: Tensor, second: Tensor
) -> list[tuple[Tensor, Products]]:
    """Pair the products of complete degrees, and those of others, with their queries; arguments as for `moments_of`."""
    degree = features.sketched
    if degree is None:
        return [(query, products)]
    low, rest = products.split(degree)
    if degree > 1:
        return [(query, low), (query, rest)]
    # What is said of the linear degree is taken as its regression on all of the degree.
    return [(query * linear_factor(products, query, second - first.mT @ first), products)]


def settle(features: FeatureMap, fit: Fit, parts: list[Tensor], mass: Tensor) -> tuple[Tensor, Tensor]:
    """Compute numerators [..., N, v], as the parts [..., N, v + 1] have them, and denominators, both over `unit`."""
    numerator, total = split(parts[0])
    numerator, denominator = fit.complete * numerator, mass * fit.base
    if features.sketched != 1:
        denominator = denominator + fit.complete * total
    if len(parts) > 1:
        numerator = numerator + fit.sketched * parts[1][..., :-1]
    denominator = keep_from_zero(features.kernel, denominator, mass * fit.least)
    # Where no key is there, all is 0.
    return numerator, torch.where(denominator == 0, 1.0, denominator)


def _wide(x: Tensor | None) -> Tensor:
    assert x is not None
    # MPS has no float64.
    return x if x.device.type == "mps" else x.double()


@functools.cache
def _nodes(count: int, head_dim: int) -> tuple[list[float], list[float], list[float]]:
    """Return nodes, weights, and weights that the skewness `SKEWNESS` adds, of E g(z), exact below degree 2 `count`.

    z is sqrt(d) times a coordinate of a random unit vector in R^d: of mean 0 and variance 1, nearly normal, and bounded
    as arguments of vectors of one length are. Its Gauss rule is that of Gegenbauer's weight (Golub & Welsch 1969).
    """
    size, n = max(2, head_dim), np.arange(2, count)
    squares = np.concatenate([[1 / size], n * (n + size - 3) / ((2 * n + size - 4) * (2 * n + size - 2))])
    nodes, vectors = np.linalg.eigh(np.diag(np.sqrt(squares), 1) + np.diag(np.sqrt(squares), -1))
    z, weights = math.sqrt(size) * nodes, vectors[0] ** 2
    cubic = z**3 - (weights @ z**4) * z
    skewed = SKEWNESS * weights * cubic / (weights @ (cubic * z**3))
    return z.tolist(), weights.tolist(), skewed.tolist()


def _described(
    features: FeatureMap, x: Tensor, square: Tensor, isotropic: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluate p_1 and p_2 at x, and the variance of the noise of both."""
    p1 = torch.zeros_like(x)
    p2, noise1, noise2 = p1, torch.zeros_like(square), torch.zeros_like(square)
    before, harmonic = torch.zeros_like(x), torch.ones_like(x)
    for degree in range(max(features.described, default=0) + 1):
        found = features.described.get(degree)
        if found is not None and (features.sketched is None or features.sketched == 1 or degree < features.sketched):
            p1 = p1 + found.coefficient * x**degree
            noise1 = noise1 + found.noise * square**degree
        elif found is not None:
            p2 = p2 + found.coefficient * (x**degree if found.is_power else harmonic)
            noise2 = noise2 + found.noise * isotropic**degree
        # |x|^n |y|^n P_n of the cosine, with |x|^2 |y|^2 = d times the isotropic mean square.
        if degree == 0:
            before, harmonic = harmonic, x
        else:
            following = (2 * degree + head_dim - 2) * x * harmonic - degree * head_dim * isotropic * before
            before, harmonic = harmonic, following / (degree + head_dim - 2)
    return p1, p2, noise1, noise2
