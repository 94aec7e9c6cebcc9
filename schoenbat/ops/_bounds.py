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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from schoenbat.features.plan import FeatureMap
from schoenbat.ops.reference import two_point_mean

STANDARD_ERRORS = 3.0
FEW_KEYS = 4.0
"""So many keys cancel as a rule, by trial over random kernels (benchmarks/bounds.py)."""
_NODES, _WEIGHTS = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(8))
"""Nodes and weights, up to a factor, of E g(x) for a standard normal x, exact for polynomials of degree up to 15."""


class Moments(NamedTuple):
    """Of the arguments of f over the keys, for each query: [..., N, 1], the number of keys [..., 1, 1].

    Attributes:
        mean, square: the mean argument, None for 0, and the mean of its square.
        isotropic: the mean square that isotropic keys of the same lengths would give.
        number: how many keys there are, in effect.
    """

    mean: Tensor | None
    square: Tensor
    isotropic: Tensor
    number: Tensor


def moments_of(query: Tensor, first: Tensor | None, second: Tensor, number: Tensor) -> Moments:
    """Moments for queries [..., N, d], of keys k times the scale of their arguments.

    Args:
        first: their mean [..., 1, d]; None for 0.
        second: the mean of k k^T, [..., d, d].
    """
    forms = _Forms.forward if torch.compiler.is_compiling() else _Forms.apply
    square, length, _ = forms(query, second)
    size = second.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return Moments(None if first is None else query @ first.mT, square, length * size, number)


class Limits(NamedTuple):
    """What an output is kept in by, for each query: [..., N, 1]; denominators are per key.

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
    """What keeps the output."""
    if not features.kernel.is_exponential:
        return Limits(None, None, _least_denominator(features, moments))
    reach = max(1.0, features.reach)
    described = [0.0] * (max(features.shares) + 1)
    for degree, share in features.shares.items():
        described[degree] = share / math.factorial(degree)
    limit = _ExpLimits.forward if torch.compiler.is_compiling() else _ExpLimits.apply
    factor, least = limit(moments.square, moments.isotropic, moments.number, reach, tuple(described))
    if moments.mean is not None:
        return Limits(factor, None, torch.exp(moments.mean * factor) * least)
    return Limits(factor, _even_excess(features, moments.square.clamp_max(reach)), least)


def _even_excess(features: FeatureMap, square: Tensor) -> Tensor | None:
    r"""What the highest degree of a truncated exp adds to a denominator if it is even, per key; arguments of mean 0.

    A polynomial cut after the even degree p gives more to the sum of weights than to their slope: for Gaussian
    arguments with the variance s^2 both are right in relation to each other, and to those of exp, once the term
    (s^2 / 2)^(p/2) / (p/2)! of the last degree is taken off the former (the coefficients of Hermite's polynomials).
    """
    degree = max(features.shares)
    if degree % 2 or not degree:
        return None
    half = degree // 2
    return features.shares[degree] / 2**half / math.factorial(half) * (square if half == 1 else square**half)


def _least_denominator(features: FeatureMap, moments: Moments) -> Tensor:
    kernel = features.kernel
    mean, square, isotropic, number = moments
    assert mean is not None
    largest = min(0.99 * kernel.radius, torch.finfo(mean.dtype).max)
    nodes, weights = _NODES.to(mean), (_WEIGHTS / _WEIGHTS.sum()).to(mean).unsqueeze(-1)
    values = kernel((_root(isotropic) * nodes).clamp(-largest, largest))
    expected = values @ weights
    typical = two_point_mean(kernel, mean, square)
    typical = typical + features.error * (expected - typical).clamp_min(0)
    return torch.maximum(typical, STANDARD_ERRORS * features.error * _root(values.square() @ weights / number))


def trust(features: FeatureMap, number: Tensor) -> Tensor:
    """The factor of what an estimate over so many keys adds to the mean value."""
    return number / (number + FEW_KEYS * features.unexplained)


class _Forms(torch.autograd.Function):
    """q^T S q, |q|^2 and S q for queries [..., N, d] and a symmetric S [..., d, d]; the last without a gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        turned = query @ second
        square = (turned * query).sum(-1, keepdim=True).clamp_min(0)
        return square, query.square().sum(-1, keepdim=True), turned

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[2])
        ctx.save_for_forward(*inputs, output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def jvp(ctx: Any, d_query: Tensor | None, d_second: Tensor | None) -> tuple[Tensor, Tensor, None]:
        query, _, turned = ctx.saved_tensors
        d_query = torch.zeros_like(query) if d_query is None else d_query
        d_square = 2 * (turned * d_query).sum(-1, keepdim=True)
        if d_second is not None:
            d_square = d_square + ((query @ d_second) * query).sum(-1, keepdim=True)
        return d_square, 2 * (query * d_query).sum(-1, keepdim=True), None

    @staticmethod
    def backward(ctx: Any, grad_square: Tensor, grad_length: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        query, second, turned = ctx.saved_tensors
        if torch.is_grad_enabled():
            turned = query @ second
        grad_second = (query * grad_square).mT @ query
        return torch.addcmul(2 * grad_square * turned, query, grad_length, value=2), grad_second


class _ExpLimits(torch.autograd.Function):
    """Factor and floor for exp, of the mean square argument, that of isotropic keys, and the number of keys.

    Args:
        reach: what the factor keeps the mean square argument at.
        described: of E exp(2 x) for a Gaussian x of variance s^2 the part that the features describe, as the
            coefficients of a polynomial in s^2.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        square: Tensor, isotropic: Tensor, number: Tensor, reach: float, described: tuple[float, ...]
    ) -> tuple[Tensor, Tensor]:
        cooled = reach / square.clamp_min(reach)
        return cooled.sqrt(), _error_of_exp(isotropic * cooled, number, described)[0].clamp_min(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reach, ctx.described = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        d_square, d_isotropic, d_number = (0.0 if x is None else x for x in tangents[:3])
        factor_by_square, *by = _slopes_of_exp(ctx)
        return factor_by_square * d_square, by[0] * d_square + by[1] * d_isotropic + by[2] * d_number

    @staticmethod
    def backward(ctx: Any, grad_factor: Tensor, grad_least: Tensor) -> tuple[Tensor | None, ...]:
        factor_by_square, *by = _slopes_of_exp(ctx)
        grad_number = (grad_least * by[2]).sum(-2, keepdim=True) if ctx.needs_input_grad[2] else None
        return grad_factor * factor_by_square + grad_least * by[0], grad_least * by[1], grad_number, None, None


def _error_of_exp(variance: Tensor, number: Tensor, described: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Three standard errors of a denominator for Gaussian arguments, and what it is made of."""
    grown = variance.exp()
    left = (grown - _polynomial(variance, described)).clamp_min(0)
    return STANDARD_ERRORS * _root(left * grown / number), grown, left


def _slopes_of_exp(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivatives of the factor by the square, and of the floor by square, isotropic and number."""
    square, isotropic, number = ctx.saved_tensors
    most = square.clamp_min(ctx.reach)
    cooled = ctx.reach / most
    variance = isotropic * cooled
    error, grown, left = _error_of_exp(variance, number, ctx.described)
    slopes = tuple(degree * x for degree, x in enumerate(ctx.described))[1:]
    by_noise = (error > 1) * STANDARD_ERRORS**2 / (2 * error * number)
    by_variance = by_noise * (left > 0) * grown * (left + grown - _polynomial(variance, slopes))
    is_cooled = square > ctx.reach
    factor_by_square = -0.5 * is_cooled * cooled.sqrt() / most
    return (
        factor_by_square,
        by_variance * -variance * is_cooled / most,
        by_variance * cooled,
        -by_noise * left * grown / number,
    )


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """By Horner's rule, the constant first."""
    out = torch.zeros_like(x) if not coefficients else torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        out = out * x + coefficient
    return out


def lost_mass(variance: Tensor, factor: Tensor, count: Tensor) -> Tensor:
    """L(s) - L(factor s) for the log L(s) of the mean of exp(x) over `count` independent x from N(0, s^2).

    To leading order L is s^2 / 2 for s^2 < 2 log n, and s sqrt(2 log n) - log n beyond (Derrida 1981, "Random-energy
    model", Phys. Rev. B 24).
    """
    lost = _LostMass.forward if torch.compiler.is_compiling() else _LostMass.apply
    return lost(variance, factor, (2 * count.clamp_min(2).log()).sqrt())


class _LostMass(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(variance: Tensor, factor: Tensor, edge: Tensor) -> Tensor:
        spread = _root(variance)
        beyond = (spread - edge).clamp_min(0).square() - (factor * spread - edge).clamp_min(0).square()
        return (spread.square() * (1 - factor.square()) - beyond) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, d_variance: Tensor | None, d_factor: Tensor | None, _: Any) -> Tensor:
        by_variance, by_factor = _slopes_of_lost_mass(*ctx.saved_tensors)
        by_variance = by_variance * (0.0 if d_variance is None else d_variance)
        return by_variance + by_factor * (0.0 if d_factor is None else d_factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        by_variance, by_factor = _slopes_of_lost_mass(*ctx.saved_tensors)
        return grad * by_variance, grad * by_factor, None


def _slopes_of_lost_mass(variance: Tensor, factor: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
    spread = _root(variance)
    cooled = torch.minimum(factor * spread, edge)
    by_variance = (torch.minimum(spread, edge) - factor * cooled) / (2 * spread)
    return by_variance * (variance > torch.finfo(variance.dtype).tiny), -spread * cooled


def _root(x: Tensor) -> Tensor:
    """sqrt, with a finite gradient at 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
