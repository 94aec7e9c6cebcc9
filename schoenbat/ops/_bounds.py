r"""Bounds that keep an estimate of attention by exp from being further off than uniform weights.

Other kernels have theirs from `schoenbat.ops._fit`.

The output is mean value + N / S, with N = sum_j w_j (v_j - mean) and S = sum_j w_j. Features whose incomplete degrees
are shrunk give an N that is not further from the truth than 0 is. Then so is the output, as long as S is not too small:
a denominator that is too large only takes the output on the straight way to the mean value. So S is kept above

- what the mean argument implies, exp of it, by Jensen's inequality, and
- three standard errors of itself, lest it be noise.

That holds on average over many keys. With few keys, the variance of a low-coverage numerator exceeds its signal, so it
is shrunk by n / (n + 4 u), with n the number of keys and u the part of the variance of f that the features do not
describe (`trust`). And it holds for isotropic vectors: where queries and keys vary in different
directions, queries are cooled for what the features describe in part (`cooled_parts`).

Moments are exact and cost one product of queries with a d x d matrix. A query of exp whose arguments spread further
than the features describe is cooled: multiplied by a factor below 1, with which the output lies between the mean value
and the truth.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from schoenbat.features.plan import FeatureMap, Products

STANDARD_ERRORS = 3.0
FEW_KEYS = 4.0
"""So many keys cancel as a rule, by trial over random kernels (benchmarks/bounds.py)."""
LARGE_VARIANCE = 40.0
"""Of arguments, from which on nothing is left of an output but the mean value; exp(2 x) would soon overflow."""


class Moments(NamedTuple):
    """Moments of the arguments of f over the keys, for each query: [..., N, 1]; the number of keys is [..., 1, 1].

    Attributes:
        mean, square: the mean argument, None for 0, and the mean of its square.
        isotropic: the mean square that isotropic keys of the same lengths would give.
        number: how many keys there are, in effect.
    """

    mean: Tensor | None
    square: Tensor
    isotropic: Tensor
    number: Tensor


def moments_of(
    query: Tensor, first: Tensor | None, second: Tensor, number: Tensor, size: Tensor | None = None
) -> Moments:
    """Compute moments for queries [..., N, d], of keys k times the scale of their arguments.

    Args:
        first: their mean [..., 1, d]; None for 0.
        second: the mean of k k^T, [..., d, d].
        size: of `second`, where it is known already.
    """
    square = ((query @ second) * query).sum(-1, keepdim=True).clamp_min(0)
    isotropic = query.square().sum(-1, keepdim=True) * (size_of(second) if size is None else size)
    return Moments(None if first is None else query @ first.mT, square, isotropic, number)


def size_of(second: Tensor) -> Tensor:
    """Average the diagonal of [..., d, d], to [..., 1, 1]."""
    return second.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


class Limits(NamedTuple):
    """Limits of an output, for each query: [..., N, 1]; denominators are per key.

    Attributes:
        factor: what the query is multiplied by, at most 1, so that the root of the mean square argument stays where the
            features describe exp: a polynomial of degree p follows it for arguments up to about sqrt(p) from 0 on
            either side. None for 1.
        excess: what the highest degree adds to a denominator.
        least: the floor of the module.
    """

    factor: Tensor | None
    excess: Tensor | None
    least: Tensor


def limits_of(features: FeatureMap, moments: Moments) -> Limits:
    """Compute the limits of the output of each query, for exp."""
    limit = max(1.0, features.reach)
    cooled = limit / moments.square.clamp_min(limit)
    factor = cooled.sqrt()
    # E exp(2 x) and the part of it that the features describe, by degrees of Hermite's polynomials.
    variance = (moments.isotropic * cooled).clamp_max(LARGE_VARIANCE)
    grown = variance.exp()
    noise = (grown - _described(features, variance)).clamp_min(0) * grown
    least = (STANDARD_ERRORS * _root(noise / moments.number)).clamp_min(1)
    if moments.mean is not None:
        return Limits(factor, None, torch.exp(moments.mean * factor) * least)
    return Limits(factor, _even_excess(features, moments.square.clamp_max(limit)), least)


def cooled_parts(
    features: FeatureMap, products: Products, query: Tensor, first: Tensor | None, second: Tensor, moments: Moments
) -> list[tuple[Tensor, Products]]:
    """Pair the products, lowest degrees first, with their queries: cooler ones where a random part is described.

    Queries and keys that vary in different directions have smaller arguments than isotropic vectors of these lengths,
    while the noise of a random part of a degree is what it is for those. With r the mean square argument over the
    isotropic one, up to 1, and s the share, r^n / (s r^n + 1 - s) is the factor of least expected error for the degree
    n, and r / (s r + 1 - s) one for queries that comes close. A random part of the linear degree, which decides alone,
    gets its own factor of least error: the covariance of what it says with the arguments, over its variance.

    Args:
        query, first, second: as for `moments_of`.
    """
    degree = features.sketched
    if degree is None:
        return [(query, products)]
    tiny = torch.finfo(query.dtype).tiny
    if degree > 1:
        share = features.shares[degree]
        ratio = (moments.square / moments.isotropic.clamp_min(tiny)).clamp_max(1)
        factor = ratio / (share * ratio + 1 - share)
    else:
        factor = linear_factor(products, query, second if first is None else second - first.mT @ first)
    low, rest = products.split(degree)
    return [(query, low), (query * factor, rest)]


def linear_factor(products: Products, query: Tensor, covariance: Tensor) -> Tensor:
    """Compute the factor of least error of queries where the linear degree is incomplete (see `cooled_parts`).

    Args:
        covariance: of the keys, [..., d, d]: a mean argument alone changes no weights.
    """
    linear = products.projection[:, : products.plan.num_linear]
    linear = linear / linear[:, :1].norm()
    covariance = linear.mT @ covariance
    coordinates = query @ linear
    common = ((coordinates @ covariance) * query).sum(-1, keepdim=True)
    own = ((coordinates @ (covariance @ linear)) * coordinates).sum(-1, keepdim=True)
    return (common / own.clamp_min(torch.finfo(query.dtype).tiny)).clamp(0, 1)


def _described(features: FeatureMap, variance: Tensor) -> Tensor:
    """Sum share variance^degree / degree! over degrees, by Horner's rule."""
    degrees = range(max(features.shares), -1, -1)
    highest, *lower = (features.shares.get(degree, 0.0) / math.factorial(degree) for degree in degrees)
    total = torch.full_like(variance, highest)
    for coefficient in lower:
        total = total * variance + coefficient
    return total


def _even_excess(features: FeatureMap, square: Tensor) -> Tensor | None:
    r"""Compute what an even highest degree of a truncated exp adds to a denominator, per key, for arguments of mean 0.

    A polynomial cut after the even degree p gives more to the sum of weights than to their slope: for Gaussian
    arguments with the variance s^2 both are right in relation to each other, and to those of exp, once the term
    (s^2 / 2)^(p/2) / (p/2)! of the last degree is taken off the former (the coefficients of Hermite's polynomials).
    """
    degree = max(features.shares)
    if degree % 2 or not degree:
        return None
    half = degree // 2
    return features.shares[degree] / 2**half / math.factorial(half) * (square if half == 1 else square**half)


def trust(features: FeatureMap, number: Tensor) -> Tensor:
    """Compute the shrinkage of the deviation from the mean value, for an estimate over so many keys."""
    return number / (number + FEW_KEYS * features.unexplained)


def lost_mass(variance: Tensor, factor: Tensor, count: Tensor) -> Tensor:
    """Compute L(s) - L(factor s) for the log L(s) of the mean of exp(x) over `count` independent x from N(0, s^2).

    To leading order L is s^2 / 2 for s^2 < 2 log n, and s sqrt(2 log n) - log n beyond (Derrida 1981, "Random-energy
    model", Phys. Rev. B 24).
    """
    edge, spread = (2 * count.clamp_min(2).log()).sqrt(), _root(variance)
    beyond = (spread - edge).clamp_min(0).square() - (factor * spread - edge).clamp_min(0).square()
    return (variance * (1 - factor.square()) - beyond) / 2


def _root(x: Tensor) -> Tensor:
    """Take the square root, with a finite gradient at 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
