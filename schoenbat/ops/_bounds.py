r"""What keeps an estimate of attention from being further off than uniform weights.

The output is mean value + N / S, with N = sum_j w_j (v_j - mean) and S = sum_j w_j. Features whose incomplete degrees
are shrunk give an N that is not further from the truth than 0 is. Then so is the output, as long as S is not too small:
a denominator that is too large only takes the output on the straight way to the mean value. So S is kept above

- what the first two moments of the arguments imply (`schoenbat.ops.reference.two_point_mean`; for exp its value at the
  mean argument, by Jensen's inequality),
- what isotropic vectors of these lengths would give, as far as the features do not describe f, and
- three standard errors of itself, lest it be noise.

That holds on average over many keys. Few may cancel, so that an N that is a sketch of little has more variance than it
stands for: it is multiplied by n / (n + 4 u), with n the number of keys and u the part of the variance of f that the
features do not describe (`trust`).

Moments are exact and cost one product of queries with a d x d matrix. A query of exp whose arguments spread further
than the features describe is cooled: multiplied by a factor below 1, with which the output lies between the mean value
and the truth.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from schoenbat.features.plan import FeatureMap
from schoenbat.ops.reference import two_point_mean

STANDARD_ERRORS = 3.0
FEW_KEYS = 4.0
"""So many keys cancel as a rule, by trial over random kernels (benchmarks/bounds.py)."""
_NODES = tuple(
    (float(node), float(weight / math.sqrt(2 * math.pi)))
    for node, weight in zip(*np.polynomial.hermite_e.hermegauss(8), strict=True)
)
"""Nodes and weights of E g(x) for a standard normal x, exact for polynomials of degree up to 15."""


class Moments(NamedTuple):
    """Of the arguments of f over the keys, for each query: [..., N, 1], the number of keys [..., 1, 1].

    Attributes:
        mean, square: the mean argument and the mean of its square.
        spread: the root mean square that isotropic keys of the same lengths would give.
        number: how many keys there are, in effect.
    """

    mean: Tensor
    square: Tensor
    spread: Tensor
    number: Tensor

    def cooled(self, factor: Tensor) -> "Moments":
        """Those of arguments that are multiplied by `factor`."""
        return Moments(self.mean * factor, self.square * factor.square(), self.spread * factor, self.number)


def moments_of(query: Tensor, first: Tensor, second: Tensor, number: Tensor, scale: float) -> Moments:
    """Moments for queries [..., N, d], over keys with the mean `first` [..., 1, d] and E k k^T `second` [..., d, d]."""
    square = (scale**2 * ((query @ second) * query).sum(-1, keepdim=True)).clamp_min(0)
    size = second.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] / query.shape[-1]
    spread = scale * _root(query.square().sum(-1, keepdim=True) * size)
    return Moments(scale * (query @ first.mT), square, spread, number)


def cooling(features: FeatureMap, moments: Moments) -> Tensor:
    """The factor, at most 1, that keeps the root of the mean square argument where the features describe exp.

    A polynomial of degree p follows exp for arguments up to about sqrt(p) from 0 on either side.
    """
    limit = max(1.0, features.reach)
    return (limit / moments.square.clamp_min(limit)).sqrt()


def least_denominator(features: FeatureMap, moments: Moments) -> Tensor:
    """The floor of the module, per key."""
    kernel = features.kernel
    mean, square, spread, number = moments
    if kernel.is_exponential:
        typical = torch.exp(mean)
        # E exp(2 x) and the part of it that the features describe, by degrees of Hermite's polynomials.
        variance = spread.square()
        described = sum(share * variance**degree / math.factorial(degree) for degree, share in features.shares.items())
        noise = (torch.exp(variance) - described).clamp_min(0) * torch.exp(variance)
        return typical * (STANDARD_ERRORS * _root(noise / number)).clamp_min(1)
    largest = min(0.99 * kernel.radius, torch.finfo(mean.dtype).max)
    values = [(weight, kernel((node * spread).clamp(-largest, largest))) for node, weight in _NODES]
    isotropic = sum(weight * value for weight, value in values)
    mean_square = sum(weight * value.square() for weight, value in values)
    typical = two_point_mean(kernel, mean, square)
    typical = typical + features.error * (isotropic - typical).clamp_min(0)
    return torch.maximum(typical, STANDARD_ERRORS * features.error * _root(mean_square / number))


def trust(features: FeatureMap, number: Tensor) -> Tensor:
    """The factor of what an estimate over so many keys adds to the mean value."""
    return number / (number + FEW_KEYS * features.unexplained)


def even_excess(features: FeatureMap, square: Tensor) -> Tensor:
    r"""What the highest degree of a truncated exp adds to a denominator if it is even, per key; arguments of mean 0.

    A polynomial cut after the even degree p gives more to the sum of weights than to their slope: for Gaussian
    arguments with the variance s^2 both are right in relation to each other, and to those of exp, once the term
    (s^2 / 2)^(p/2) / (p/2)! of the last degree is taken off the former (the coefficients of Hermite's polynomials).
    """
    degree = max(features.shares)
    if degree % 2 or not degree:
        return torch.zeros_like(square)
    return features.shares[degree] * (square / 2) ** (degree // 2) / math.factorial(degree // 2)


def log_mass(spread: Tensor, count: Tensor) -> Tensor:
    """log of the mean of exp(x) over `count` independent x from N(0, spread^2), to leading order.

    s^2 / 2 for s^2 < 2 log n, and s sqrt(2 log n) - log n beyond (Derrida 1981, "Random-energy model",
    Phys. Rev. B 24).
    """
    edge = (2 * count.clamp_min(2).log()).sqrt()
    inside = torch.minimum(spread, edge)
    return inside.square() / 2 + (spread - inside) * edge


def _root(x: Tensor) -> Tensor:
    """sqrt, with a finite gradient at 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
