r"""Causal attention in chunks: what lies near is exact, what lies far goes through features.

Tokens come in chunks of C. Within its chunk a query sees keys by f itself, evaluated on the vectors: for C up to about
D / 2 tokens that is less work than products of D features, and has no error. Everything before the chunk is summed up
in

    sum_j phi(k_j) [v_j, 1]^T,

one matrix [D, v + 1] for each chunk, and, where the feature map is bounded, in the first two moments of its keys.

For exp the keys of the far field are shifted by the mean c of the first chunk, which no query of the far field may not
know: exp(<q, k>) = exp(<q, c>) exp(<q, k - c>). Where a query is cooled (`schoenbat.ops._bounds`), what its far field
weighs in all is taken from the moments of its arguments, as if these were Gaussian.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from schoenbat.features.plan import FeatureMap
from schoenbat.ops._bounds import cooled_parts, limits_of, lost_mass, moments_of, trust
from schoenbat.ops._near import LOWEST, near_of_exp
from schoenbat.ops._planned import look_up, look_up_in_parts, sum_keys
from schoenbat.ops.reference import away_from_zero, divide, keep_from_zero, least_sum, split

MANY_CHUNKS = 128
"""Beyond so many chunks a scan over them is faster than a product with a triangle."""
GIVEN_CHUNK = 64
"""Tokens of a chunk where the features are given, so that f itself is not known."""


@dataclass(frozen=True)
class Far:
    """The tokens before a chunk, summed up; [..., n] are the batch, the key heads, and the chunks where there are many.

    Attributes:
        sums: of phi(k) [v, 1]^T, [..., D, v + 1].
        total: of [v, 1], [..., 1, v + 1].
        moments: of [1, k]^T k over shifted keys, [..., 1 + d, d]; None where the feature map is not bounded.
        centre: what keys were shifted by, [..., 1, d]; None for kernels other than exp.
    """

    sums: Tensor
    total: Tensor
    moments: Tensor | None
    centre: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Far":
        """Apply `function` to each tensor; all have the batch as their first dimension."""
        moments, centre = (None if x is None else function(x) for x in (self.moments, self.centre))
        return Far(function(self.sums), function(self.total), moments, centre)


@dataclass(frozen=True)
class State:
    """The state of causal attention over all tokens so far, of a size that does not grow with their number.

    Attributes:
        far: the chunks that are complete, or None before the first is.
        key, extended: the keys [B, Hk, c, d] and [v, 1] [B, Hk, c, v + 1] of the c < C tokens since; 0 where masked.
    """

    far: Far | None
    key: Tensor
    extended: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """Apply `function` to each tensor; all have the batch as their first dimension."""
        far = None if self.far is None else self.far.map(function)
        return State(far, function(self.key), function(self.extended))


def chunk_length(features: FeatureMap | None) -> int:
    """Choose C: as many tokens as cost about what their features do, a power of two."""
    if features is None:
        return GIVEN_CHUNK
    return min(512, max(64, 2 ** round(math.log2(max(1, features.plan.num_features) / 2))))


def extend(
    features: FeatureMap | None,
    state: State | None,
    query: Tensor,
    key: Tensor,
    extended: Tensor,
    scale: float,
    bounded: bool,
) -> tuple[Tensor, State]:
    """Attend from further tokens, the last N of them, to those of `state` and to each other.

    Args:
        features: phi; or None where query and key are features already, whose dot products are the weights.
        query: [B, H, N, d]; consecutive H / Hk heads share a key head.
        key, extended: [B, Hk, M, d] and [v, 1] [B, Hk, M, v + 1]; 0 where masked.
        bounded: keep what lies far from being further off than uniform weights; needs features.

    Returns:
        [B, H, N, v] and the new state.
    """
    chunk, groups, length = chunk_length(features), query.shape[1] // key.shape[1], query.shape[2]
    # Queries of one group see the same keys: they are further queries of one head.
    rows = query.unflatten(1, (-1, groups)).transpose(2, 3)
    far = None
    if state is not None:
        far = state.far
        key, extended = torch.cat([state.key, key], 2), torch.cat([state.extended, extended], 2)
    tokens = key.shape[2]
    first = tokens - length
    # An exported graph serves all lengths.
    exporting = torch.compiler.is_exporting()
    if not exporting and tokens <= chunk:
        lower = rows.new_ones(length, tokens, dtype=torch.bool).tril(first)
        rows, keys, values = (x.unsqueeze(2) for x in (rows, key, extended))
    else:
        lower = rows.new_ones(chunk, chunk, dtype=torch.bool).tril()
        rows, keys, values = _cut(rows, chunk, first), _cut(key, chunk), _cut(extended, chunk)
    complete = keys.shape[2] if features is None else tokens // chunk
    summed = keys.shape[2] if exporting else complete
    before, after = _sum_up(features, far, keys, values, summed, complete, scale, bounded)
    rows = rows.flatten(3, 4)
    if exporting or (tokens and length):
        out = _attend(features, before, rows, keys, values, lower.repeat_interleave(groups, 0), scale)
    else:
        # Empty, but part of the graph.
        out = rows @ (keys.mT @ values)[..., :-1]
    out = out.unflatten(3, (-1, groups))
    if exporting:
        place = torch.arange(tokens, device=out.device)
        return out[:, :, place // chunk, place % chunk].transpose(2, 3).flatten(1, 2), None
    out = out.flatten(2, 3)
    out = out[:, :, first:tokens] if exporting or out.shape[2] > length else out
    left = tokens if features is None else complete * chunk
    return out.transpose(2, 3).flatten(1, 2), State(after, key[:, :, left:], extended[:, :, left:])


def _cut(x: Tensor, chunk: int, first: int = 0) -> Tensor:
    """Cut x [B, H, n, ...] after `first` zeros into chunks, [B, H, chunks, chunk, ...], with zeros at the end."""
    if torch.compiler.is_exporting():
        # Views would make the graph one for some lengths. The last chunk is not complete, even where it is empty.
        assert not first
        tokens = x.shape[2]
        place = torch.arange((tokens + 2 * chunk - 1) // chunk, device=x.device)[:, None] * chunk + torch.arange(
            chunk, device=x.device
        )
        absent = (place >= tokens)[(..., *(None,) * (x.ndim - 3))]
        return x[:, :, place.clamp_max(tokens - 1)].masked_fill(absent, 0.0)
    padding = -(first + x.shape[2]) % chunk
    return F.pad(x, (0, 0) * (x.ndim - 3) + (first, padding)).unflatten(2, (-1, chunk))


def _sum_up(
    features: FeatureMap | None,
    far: Far | None,
    key: Tensor,
    extended: Tensor,
    summed: int,
    complete: int,
    scale: float,
    bounded: bool,
) -> tuple[Far | None, Far | None]:
    """Sum up what lies before each chunk, from the first `summed` chunks, and after the `complete` ones."""
    chunks, key, extended = key.shape[2], key[:, :, :summed], extended[:, :, :summed]
    if summed == 0:
        return None if far is None else far.map(lambda x: x.unsqueeze(2)), far
    centre = None
    if features is not None and features.kernel.is_exponential:
        if far is None:
            counts = extended[:, :, 0, :, -1:]
            centre = (key[:, :, 0] * counts).sum(-2, keepdim=True) / counts.sum(-2, keepdim=True).clamp_min(1)
        else:
            centre = far.centre
        assert centre is not None
        key = key - centre.unsqueeze(2)
    sums = key.mT @ extended if features is None else sum_keys(key, extended, features.products(key.dtype, scale))
    moments = None
    if bounded:
        counts = extended[..., -1:]
        moments = torch.cat([counts, key * counts], -1).mT @ key
    first = extended.sum(-2, keepdim=True)
    # What lies before the first chunk, after it, after the second, ...
    running = Far(
        _running(None if far is None else far.sums, sums),
        _running(None if far is None else far.total, first),
        None if moments is None else _running(None if far is None else far.moments, moments),
        None,
    )
    end = torch.full((1,), complete, device=key.device)
    after = replace(running.map(lambda x: x.index_select(2, end).squeeze(2)), centre=centre)
    if far is None and not torch.compiler.is_exporting() and chunks == 1:
        return None, after
    before = running.map(lambda x: x[:, :, :chunks])
    before = replace(before, centre=None if centre is None else centre.unsqueeze(2))
    return before, after


def _running(start: Tensor | None, x: Tensor) -> Tensor:
    """Add to `start` the first 0, 1, ... of the chunks of x [B, Hk, n, ...]."""
    chunks = x.shape[2]
    if torch.compiler.is_compiling() or chunks > MANY_CHUNKS:
        first = torch.zeros_like(x[:, :, :1]) if start is None else start.unsqueeze(2)
        return torch.cat([first, x], 2).cumsum(2)
    # By a product with a triangle of ones: a scan over such long rows waits for memory.
    triangle = torch.ones(chunks + 1, chunks, dtype=x.dtype, device=x.device).tril(-1)
    sums = (triangle @ x.flatten(3)).unflatten(3, x.shape[3:])
    return sums if start is None else sums + start.unsqueeze(2)


def _attend(
    features: FeatureMap | None,
    far: Far | None,
    query: Tensor,
    key: Tensor,
    extended: Tensor,
    lower: Tensor,
    scale: float,
) -> Tensor:
    """Attend from [..., R, d] queries to the [..., M, d] keys that `lower` [R, M] allows, and to what lies before."""
    if features is None:
        scores = query @ key.mT
        products = scores.masked_fill(~lower, 0.0) @ extended
        products = products if far is None else products + query @ far.sums
        return divide(*split(products))
    near, top = _near(features, query * scale, key, extended, lower)
    if far is not None:
        found, level = _far(features, far, query, scale)
        highest = torch.maximum(top, level.detach())
        near = torch.exp(top - highest) * near + torch.exp(level - highest) * found
    numerator, total = split(near)
    if features.kernel.is_signed:
        numerator, total = _keep_sum_from_zero(features, numerator, total, far, query, key, extended, lower, scale)
    return numerator / torch.where(total == 0, 1.0, total)


def _near(features: FeatureMap, query: Tensor, key: Tensor, extended: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Compute numerators and denominators [..., R, v + 1] by f itself, over e^t, and t."""
    kernel = features.kernel
    if kernel.is_exponential:
        return near_of_exp(query, key, extended, lower)
    scores = query @ key.mT
    allowed = lower & (extended[..., -1].unsqueeze(-2) > 0)
    weights = kernel.relative(scores.masked_fill(~allowed, 0.0)).masked_fill(~allowed, 0.0)
    products = weights @ extended.to(weights.dtype)
    return products, torch.zeros_like(products[..., :1])


def _far(features: FeatureMap, far: Far, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute numerators and denominators of what lies before, [..., R, v + 1], over e^l, and l."""
    level = query.new_zeros(()) if far.centre is None else scale * (query @ far.centre.mT)
    products = features.products(query.dtype, scale)
    # The column of ones has no use for a gradient.
    total = far.total[..., -1:].detach()
    if far.moments is None:
        return look_up(query, far.sums, products), torch.where(total > 0, level, LOWEST)
    count = total.clamp_min(1)
    first, second = (x / count for x in (scale * far.moments[..., :1, :], scale**2 * far.moments[..., 1:, :]))
    moments = moments_of(query, first, second, count)
    factor, _, least = limits_of(features, moments)
    if factor is not None:
        assert moments.mean is not None
        level = level + (1 - factor) * moments.mean
        level = level + lost_mass(moments.square - moments.mean.square(), factor, count)
        query = query * factor
    found = look_up_in_parts(cooled_parts(features, products, query, first, second, moments), far.sums)
    denominator = keep_from_zero(features.kernel, found[..., -1:], count * least)
    # Shrink the numerator towards denominator * mean value.
    kept = trust(features, count)
    found = torch.addcmul(kept * found, denominator - kept * found[..., -1:], far.total / count)
    return found, torch.where(total > 0, level, LOWEST)


def _keep_sum_from_zero(
    features: FeatureMap,
    numerator: Tensor,
    total: Tensor,
    far: Far | None,
    query: Tensor,
    key: Tensor,
    extended: Tensor,
    lower: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Keep the sum of the weights of a kernel of both signs from 0, as `reference.normalise` does."""
    allowed = (lower & (extended[..., -1].unsqueeze(-2) > 0)).to(query.dtype)
    values = allowed @ extended
    square = ((scale * query @ key.mT).square() * allowed).sum(-1, keepdim=True)
    if far is not None:
        assert far.moments is not None
        values = values + far.total
        square = square + scale**2 * ((query @ far.moments[..., 1:, :]) * query).sum(-1, keepdim=True)
    value, number = split(values)
    count = number.clamp_min(1)
    kept = away_from_zero(total, number * least_sum(features.kernel, square.clamp_min(0) / count))
    return numerator + (kept - total) * value / count, kept
