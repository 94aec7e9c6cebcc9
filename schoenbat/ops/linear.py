r"""Attention through features, linear in length: phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1).

`attend` is the one way for whole sequences, `extend` for causal ones that come in parts, down to single tokens. What
holds for all of them is here: whatever stands at masked places is filled and never matters, sums over tokens are taken
in float32 or wider outside autocast, query heads may share key heads, and the dtype of the query comes back. Shapes as
in `schoenbat.ops.reference`. Values get a column of ones, so that numerators and denominators are the same products.

Features of exp see shifted vectors where attention is not causal: keys less their mean, which changes no softmax; and
in self-attention queries too. With w_j the weights that the mean query m gives to
the keys, w = softmax(<m, k_j>), and c = sum_j w_j k_j,

    exp(<q, k>) = exp(<q, c>) exp(<m, k - c>) exp(<q - m, k - c>).

The first factor is the same for all keys and cancels, the second is w_j up to another such factor, and the features
only have to describe the third, whose arguments have the mean 0 under w for every query.

Where a feature map is bounded, the output is kept from being further off than that of uniform weights
(`schoenbat.ops._bounds`).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from schoenbat.features.plan import FeatureMap, Products
from schoenbat.ops import _causal, native, triton
from schoenbat.ops._bounds import cooled_parts, limits_of, moments_of, trust
from schoenbat.ops._causal import State
from schoenbat.ops._fit import fit_of, fit_parts, settle
from schoenbat.ops._planned import attend_in_parts, attend_plainly, extend_value, total_of
from schoenbat.ops.reference import SMALLEST, check_square, divide, fill_masked, split

__all__ = ["State", "attend", "causal_linear_attention", "extend", "fixed_state", "linear_attention"]

Features = FeatureMap | Callable[[Tensor], Tensor]
BLOCK = {"cpu": 4096}
BLOCK_ELSEWHERE = 65_536
"""Where calls cost more than what lies in the cache saves."""


def attend(
    features: Features,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
    self_attention: bool = False,
    *,
    block: int | None = None,
    bounded: bool | None = None,
) -> Tensor:
    """Compute sum_j <phi(q_i), phi(k_j)> v_j / sum_j <phi(q_i), phi(k_j)>, an estimate of attention by f(scale <x, y>).

    Args:
        features: a FeatureMap, or any phi from [B, H, n, d] to [B, H, n, D] that works token by token, which is applied
            to query and key times sqrt(scale) as they are.
        query, key, value: [B, H, N, d], [B, Hk, M, d], [B, Hk, M, v]; H is a multiple of Hk, and consecutive H / Hk
            query heads share a key head.
        key_mask: [B, M], True = attend, or None.
        is_causal: query i sees keys up to i; requires N = M.
        scale: not negative.
        self_attention: the queries are the tokens of the keys, so that an output may depend on all of them. Features of
            exp are then made for what lies around the mean query; in cross-attention that would tell a decoder of its
            later tokens. Without effect where attention is causal.
        block: tokens of a causal sequence that are handled at a time. None takes all at once where a gradient is
            recorded or torch.compile is at work, else blocks of 4,096 on a CPU and of 65,536 elsewhere.
        bounded: keep the output from being further off than that of uniform weights; None for what `features` says.

    Returns:
        [B, H, N, v] in the dtype of `query`; 0 for a query that may attend to nothing.
    """
    if bounded is None:
        bounded = isinstance(features, FeatureMap) and features.is_bounded
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        if not is_causal and isinstance(features, FeatureMap) and triton.takes(features, query, key, value, bounded):
            return triton.attend(features, query, key, value, key_mask, scale, self_attention, bounded)
        q, k, v = (x.to(dtype) for x in (query, key, value))
        if is_causal:
            check_square(q, k)
            q, k = _within_range(features, q), _within_range(features, fill_masked(k, key_mask))
            v = fill_masked(v, key_mask)
            out = _causal_blocks(features, q, k, v, key_mask, scale, block, bounded)
        elif isinstance(features, FeatureMap) and native.serves(features, q, k, v, bounded):
            given = (key_mask, scale, self_attention, bounded)
            out = native.attend(features, q, k, v, *given, lambda *x: _attend(features, x[0], x[1], x[2], *given))
        else:
            out = _attend(features, q, k, v, key_mask, scale, self_attention, bounded)
        return out.to(query.dtype)


def _attend(
    features: Features,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    self_attention: bool,
    bounded: bool,
) -> Tensor:
    """Attend where it is not causal, in float32 or wider, by operations of torch."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = fill_masked(key, key_mask), fill_masked(value, key_mask)
    query, key = _within_range(features, query), _within_range(features, key)
    # Queries of one group see the same keys: they are further queries of one head.
    query = query.unflatten(1, (-1, groups)).flatten(2, 3) if groups > 1 else query
    if isinstance(features, FeatureMap):
        counts, query_counts = _counts(key_mask, value), _counts(key_mask, value, groups)
        out = _through_plan(features, query, key, value, counts, query_counts, scale, self_attention, bounded)
    else:
        root = math.sqrt(scale)
        out = linear_attention(features(query * root), features(key * root), value, key_mask)
    return out.unflatten(2, (groups, length)).flatten(1, 2) if groups > 1 else out


def extend(
    features: Features,
    state: State | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, State]:
    """Attend causally from N further tokens, after those of `state`: the parts give what the whole would.

    Args:
        state: from an earlier call with the same features, or None for no token yet.
        features, query, key, value, key_mask, scale: as for `attend`, with N = M; there may be fewer queries than keys,
            which are then the last tokens, and none at all to sum up keys only.

    Returns:
        [B, H, N, v] in the dtype of `query`, and the new state.
    """
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = _prepare(query, key, value, key_mask)
        q, k = _within_range(features, q), _within_range(features, k)
        bounded = isinstance(features, FeatureMap) and features.is_bounded
        out, state = _extend(features, state, q, k, _extended(v, key_mask), scale, bounded)
        return out.to(query.dtype), state


def fixed_state(features: FeatureMap, state: State) -> State:
    """Return `state` in the form in which an exported graph of `extend` takes and returns it.

    It consists of tensors alone, whose sizes do not depend on the number of tokens, and serves one token at a time.
    """
    return _causal.with_fixed_size(
        features if features.near else None, state, features.is_bounded or features.kernel.is_signed
    )


def linear_attention(query_features: Tensor, key_features: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Attend from every query to every key, through features that are given.

    Args:
        query_features, key_features: [B, H, N, D], [B, H, M, D].
        value: [B, H, M, v].
        key_mask: [B, M], True = attend, or None.

    Returns:
        [B, H, N, v] in the dtype of `value`.
    """
    q, k, v = _prepare(query_features, key_features, value, key_mask)
    products = q @ (k.mT @ _extended(v, key_mask))
    return divide(*split(products)).to(value.dtype)


def causal_linear_attention(
    query_features: Tensor, key_features: Tensor, value: Tensor, key_mask: Tensor | None
) -> Tensor:
    """Do what `linear_attention` does where query i sees keys up to i; N = M."""
    check_square(query_features, key_features)
    q, k, v = _prepare(query_features, key_features, value, key_mask)
    return _causal.extend(None, None, q, k, _extended(v, key_mask), 1.0, False)[0].to(value.dtype)


def _prepare(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Convert all to float32 or wider, with 0 at masked places of key and value."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.to(dtype), fill_masked(key.to(dtype), key_mask), fill_masked(value.to(dtype), key_mask)


def _within_range(features: Features, x: Tensor) -> Tensor:
    """Clamp coordinates so large that features or moments would overflow: nothing is known of f there."""
    if not (isinstance(features, FeatureMap) and features.near):
        return x
    return x.clamp(-features.largest_coordinate, features.largest_coordinate)


def _counts(mask: Tensor | None, like: Tensor, repeats: int = 1) -> Tensor | None:
    """Make 1 and 0 of the True and False of [B, M], as [B, 1, M, 1]; `repeats` times one after another."""
    if mask is None:
        return None
    return mask.repeat(1, repeats)[:, None, :, None].to(like.dtype)


def _extended(value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Make [V, 1], with 0 for keys that are not there, whose values are 0."""
    counts = _counts(key_mask, value)
    return extend_value(value) if counts is None else torch.cat([value, counts.expand(*value.shape[:-1], 1)], -1)


def _through_plan(
    features: FeatureMap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor | None,
    query_counts: Tensor | None,
    scale: float,
    self_attention: bool,
    bounded: bool,
) -> Tensor:
    products = features.products(query.dtype, scale)
    weight = None if counts is None else counts.expand(*value.shape[:-1], 1)
    if features.centres and not self_attention:
        key = key - _mean(key, counts)
    elif features.centres:
        # torch.compile does not know operations with a forward-mode derivative of their own.
        shift = _Shift.forward if torch.compiler.is_compiling() else _Shift.apply
        query, key, weight = shift(query, key, counts, query_counts, scale)
        # A key of weight 0 stands at the centre: its features could be infinite, and so nothing times 0.
        key = torch.where(weight > 0, key, 0.0)
    if bounded:
        return _bounded(features, products, query, key, value, weight, scale)
    extended = extend_value(value) if weight is None else torch.cat([value * weight, weight], -1)
    return divide(*split(attend_plainly(query, key, extended, products)), SMALLEST * features.plan.unit)


def _bounded(
    features: FeatureMap,
    products: Products,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend within the bounds of `schoenbat.ops._bounds`; `weight` [B, H, M, 1] of the keys, or None for ones."""
    if weight is None:
        mass = divisor = number = key.new_full((1, 1), max(1, key.shape[-2]))
        average, weighted = value.sum(-2, keepdim=True) / divisor, key
        extended = extend_value(value - average)
    else:
        mass, weighted_value, weighted = weight.sum(-2, keepdim=True), value * weight, key * weight
        divisor = torch.where(mass > 0, mass, 1.0)
        average = weighted_value.sum(-2, keepdim=True) / divisor
        extended = torch.cat([torch.addcmul(weighted_value, weight, average, value=-1), weight], -1)
        number = divisor.square() / weight.square().sum(-2, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    # Features of exp see keys whose mean is 0.
    first = None if features.centres else scale / divisor * weighted.sum(-2, keepdim=True)
    second = scale**2 / divisor * (weighted.mT @ key)
    moments = moments_of(query, first, second, number)
    if not features.kernel.is_exponential:
        assert first is not None
        parts = fit_parts(features, products, query, first, second)
        fit = fit_of(features, moments, query.shape[-1])
        deviation, denominator = settle(features, fit, attend_in_parts(parts, key, extended), mass)
        return torch.addcmul(average, fit.kept, deviation / denominator)
    factor, excess, least = limits_of(features, moments)
    query = query if factor is None else query * factor
    parts = cooled_parts(features, products, query, first, second, moments)
    deviation, denominator = split(total_of(attend_in_parts(parts, key, extended)))
    denominator = torch.maximum(denominator if excess is None else denominator - mass * excess, mass * least)
    # Where no key is there, all is 0.
    denominator = torch.where(denominator > 0, denominator, 1.0)
    return torch.addcmul(average, trust(features, number), deviation / denominator)


def _extend(
    features: Features,
    state: State | None,
    query: Tensor,
    key: Tensor,
    extended: Tensor,
    scale: float,
    bounded: bool,
) -> tuple[Tensor, State]:
    if isinstance(features, FeatureMap) and features.near:
        # The sum of a kernel of both signs is kept from 0 by the moments that bounds need.
        bounded = bounded or features.kernel.is_signed
        return _causal.extend(features, state, query, key, extended, scale, bounded)
    root = math.sqrt(scale)
    phi, unit = (features.relative, features.plan.unit) if isinstance(features, FeatureMap) else (features, 1.0)
    return _causal.extend(None, state, phi(query * root), phi(key * root) / unit, extended, 1.0, False)


def _causal_blocks(
    features: Features,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
    block: int | None,
    bounded: bool,
) -> Tensor:
    extended = _extended(v, key_mask)
    if block is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        block = BLOCK.get(q.device.type, BLOCK_ELSEWHERE)
    if block is None:
        return _extend(features, None, q, k, extended, scale, bounded)[0]
    state, outputs = None, []
    for start in range(0, max(1, q.shape[2]), block):
        part = (x[:, :, start : start + block] for x in (q, k, extended))
        out, state = _recomputed(_extend, features, state, *part, scale, bounded)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call function(*arguments), keeping only the arguments for the backward pass."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class _Shift(torch.autograd.Function):
    """q - m, k - c, and the weights softmax(scale <m, k>) of the keys (see the module).

    `counts` [B, 1, M, 1] is 1 for the keys that are there and 0 for others, which get no weight; None is all ones.
    `query_counts` likewise says over which queries m is the mean. One operation to autograd instead of a dozen: for few
    tokens these would cost more than the arithmetic.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, counts: Tensor | None, query_counts: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = _mean(q, query_counts)
        exponent = (mean * scale) @ k.mT
        if counts is not None:
            exponent = exponent.masked_fill(counts.mT == 0, torch.finfo(k.dtype).min)
        weight = torch.softmax(exponent, -1).mT
        weight = weight if counts is None else weight * counts
        return q - mean, k - weight.mT @ k, weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.save_for_forward(*tensors, output[2])

    @staticmethod
    def jvp(ctx: Any, d_q: Tensor | None, d_k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, _, query_counts, weight = ctx.saved_tensors
        d_q = torch.zeros_like(q) if d_q is None else d_q
        d_k = torch.zeros_like(k) if d_k is None else d_k
        d_mean = _mean(d_q, query_counts)
        d_exponent = ctx.scale * (k @ d_mean.mT + d_k @ _mean(q, query_counts).mT)
        d_weight = weight * (d_exponent - weight.mT @ d_exponent)
        return d_q - d_mean, d_k - d_weight.mT @ k - weight.mT @ d_k, d_weight

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_weight: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        q, k, _, query_counts, weight = ctx.saved_tensors
        grad_centre = -grad_k.sum(-2, keepdim=True)
        weighted = weight * (grad_weight + k @ grad_centre.mT)
        grad_exponent = (weighted - weight * weighted.sum(-2, keepdim=True)) * ctx.scale
        grad_mean = grad_exponent.mT @ k - grad_q.sum(-2, keepdim=True)
        share = 1 / q.shape[-2] if query_counts is None else query_counts / _number(query_counts)
        grad_q = grad_q + grad_mean * share
        return grad_q, grad_k + weight * grad_centre + grad_exponent * _mean(q, query_counts), None, None, None


def _mean(x: Tensor, counts: Tensor | None) -> Tensor:
    """Average the tokens that count, [B, H, 1, d]; 0 where none does."""
    if counts is None:
        return x.mean(-2, keepdim=True)
    return x.masked_fill(counts == 0, 0.0).sum(-2, keepdim=True) / _number(counts)


def _number(counts: Tensor) -> Tensor:
    return counts.sum(-2, keepdim=True).clamp_min(1)
