r"""Attention through a feature map as its formulas say, quadratic in length: what the fast forms are tested against.

A query i sees the key j with the weight w_ij, 0 where it may not. What it gets is N_i / S_i, with p_ij the estimate of
f(scale <q_i, k_j>) and

    N_i = sum_j w_ij p_ij v_j,    S_i = sum_j w_ij p_ij;

where the map is bounded, S_i is kept above a floor, and N_i is S_i mean v + trust sum_j w_ij p_ij (v_j - mean v), for
exp by `schoenbat.ops._bounds`, for other kernels by the regression of `schoenbat.ops._fit`. Causal attention takes the
keys of a query's own chunk by f itself.
"""

import math

import torch
from torch import Tensor

from schoenbat.features.plan import FeatureMap
from schoenbat.ops._bounds import Moments, limits_of, lost_mass, trust
from schoenbat.ops._causal import chunk_length
from schoenbat.ops._fit import fit_of
from schoenbat.ops.reference import (
    SMALLEST,
    AttentionInputs,
    away_from_zero,
    divide,
    fill_masked,
    keep_from_zero,
    least_sum,
)


def naive_attention(features: FeatureMap, inputs: AttentionInputs, bounded: bool) -> Tensor:
    """Compute what `schoenbat.ops.linear.attend` does, [B, H, N, v], for queries that each see some key."""
    query, key, value, key_mask, is_causal, scale, self_attention = inputs
    groups = query.shape[1] // key.shape[1]
    query = query.unflatten(1, (-1, groups)).flatten(2, 3)
    key, value = fill_masked(key, key_mask), fill_masked(value, key_mask)
    inputs = inputs._replace(value=value)
    there = fill_masked(torch.ones_like(key[..., :1]), key_mask)
    place = torch.arange(key.shape[2])
    row = torch.arange(query.shape[2] // groups).repeat(groups)[:, None]
    kernel, seen = features.kernel, there.mT * (place <= row if is_causal else 1)
    if not is_causal or not features.near:
        if features.centres and self_attention and not is_causal:
            own = there.repeat(1, 1, groups, 1)
            mean = (own * query).sum(-2, keepdim=True) / own.sum(-2, keepdim=True)
            seen = (scale * mean @ key.mT).masked_fill(seen == 0, -torch.inf).softmax(-1)
            query = query - mean
        if features.centres and not is_causal:
            key = key - seen @ key / seen.sum(-1, keepdim=True)
        bounded = bounded and not is_causal
        numerator, total = _estimate(features, inputs._replace(query=query, key=key), seen, bounded, features.centres)
        out = divide(numerator, total, 0.0 if bounded else SMALLEST * features.plan.unit)
    else:
        chunk = chunk_length(features)
        near = seen * (place // chunk == row // chunk)
        scores = scale * query @ key.mT
        weights = near * kernel.relative(near * scores)
        numerator, total = weights @ value, weights.sum(-1, keepdim=True)
        first = there[:, :, :chunk] * kernel.is_exponential
        centre = (first * key[:, :, :chunk]).sum(-2, keepdim=True) / first.sum(-2, keepdim=True).clamp_min(1)
        bounded = bounded or kernel.is_signed
        far = _estimate(features, inputs._replace(query=query, key=key - centre), seen - near, bounded, False)
        shift = torch.exp(scale * query @ centre.mT)
        numerator, total = numerator + shift * far[0], total + shift * far[1]
        if kernel.is_signed:
            count = seen.sum(-1, keepdim=True)
            kept = away_from_zero(
                total, count * least_sum(kernel, (seen * scores.square()).sum(-1, keepdim=True) / count)
            )
            numerator, total = numerator + (kept - total) * (seen @ value) / count, kept
        out = numerator / torch.where(total == 0, 1.0, total)
    return out.unflatten(2, (groups, -1)).flatten(1, 2)


def _estimate(
    features: FeatureMap, inputs: AttentionInputs, weight: Tensor, bounded: bool, centred: bool
) -> tuple[Tensor, Tensor]:
    """Return N and S; `centred` keys have the mean 0 under `weight`."""
    query, key, value, _, _, scale, _ = inputs
    weight, root = weight.expand(*query.shape[:-1], -1), math.sqrt(scale)
    key_features = features.relative(root * key)
    if not bounded:
        weight = weight * (features.relative(root * query) @ key_features.mT)
        return weight @ value, weight.sum(-1, keepdim=True)

    mass, tiny = weight.sum(-1, keepdim=True), torch.finfo(query.dtype).tiny
    share, scores = weight / torch.where(mass > 0, mass, 1.0), scale * query @ key.mT
    linear = torch.nn.functional.normalize(features.projection(query.dtype)[:, : features.plan.num_linear], dim=0)

    def mean(x: Tensor) -> Tensor:
        return (share * x).sum(-1, keepdim=True)

    def covariance(x: Tensor, y: Tensor) -> Tensor:
        return mean(x * y) - mean(x) * mean(y)

    isotropic = scale**2 * query.square().sum(-1, keepdim=True) * mean(key.square().mean(-1)[..., None, :])
    number = 1 / share.square().sum(-1, keepdim=True).clamp_min(tiny)
    first, square = mean(scores), mean(scores.square())
    cooler, degree = torch.ones_like(first), features.sketched
    if degree == 1:
        own = scale * (query @ linear) @ (key @ linear).mT
        cooler = (covariance(own, scores) / covariance(own, own).clamp_min(tiny)).clamp(0, 1)
    low = features.plan.num_features if degree is None else features.plan.split(degree)[0].num_features
    average = share @ value
    if not features.kernel.is_exponential:
        fit = fit_of(features, Moments(first, square, isotropic, number), query.shape[-1])
        low = features.plan.num_features if degree == 1 else low
        found = features.relative(root * cooler * query)
        complete = weight * (found[..., :low] @ key_features[..., :low].mT)
        sketched = weight * (found[..., low:] @ key_features[..., low:].mT)
        denominator = mass * fit.base + (0 if degree == 1 else fit.complete * complete.sum(-1, keepdim=True))
        denominator = keep_from_zero(features.kernel, denominator, mass * fit.least)
        products = fit.complete * complete + fit.sketched * sketched
        deviation = products @ value - products.sum(-1, keepdim=True) * average
        # Where no key is seen, both are 0.
        unit = torch.where(mass > 0, fit.unit, 0.0)
        return unit * (fit.kept * deviation + denominator * average), unit * denominator
    factor, excess, least = limits_of(features, Moments(None if centred else first, square, isotropic, number))
    factor = torch.ones_like(first) if factor is None else factor
    if degree is not None and degree > 1:
        ratio = (square / isotropic.clamp_min(tiny)).clamp_max(1)
        cooler = ratio / (features.shares[degree] * ratio + 1 - features.shares[degree])
    below, above = features.relative(root * factor * query), features.relative(root * factor * cooler * query)
    weight = weight * (torch.cat([below[..., :low], above[..., low:]], -1) @ key_features.mT)
    total = weight.sum(-1, keepdim=True)
    floored = torch.maximum(total if excess is None else total - excess * mass, mass * least)
    numerator = floored * average + trust(features, number) * (weight @ value - total * average)
    if not centred:
        lost = torch.exp((1 - factor) * first + lost_mass(square - first.square(), factor, number))
        return numerator * lost, floored * lost
    return numerator, floored
