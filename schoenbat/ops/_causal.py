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
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import register_dataclass, tree_map

from schoenbat.features.plan import FeatureMap, Products
from schoenbat.ops._bounds import cooled_parts, limits_of, lost_mass, moments_of, size_of, trust
from schoenbat.ops._fit import fit_of, fit_parts, settle
from schoenbat.ops._near import LOWEST, near_of_exp
from schoenbat.ops._planned import look_up, look_up_in_parts, sum_keys, total_of
from schoenbat.ops.reference import away_from_zero, divide, least_sum, split

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
        seen, flat: what was made of it for queries, and itself with one dimension for batch and heads, once needed.
    """

    sums: Tensor
    total: Tensor
    moments: Tensor | None
    centre: Tensor | None
    seen: list[tuple[FeatureMap, "_Seen"]] = field(default_factory=list, compare=False, repr=False)
    flat: list["Far"] = field(default_factory=list, compare=False, repr=False)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Far":
        """Apply `function` to each tensor; all have the batch as their first dimension."""
        moments, centre = (None if x is None else function(x) for x in (self.moments, self.centre))
        return Far(function(self.sums), function(self.total), moments, centre)


@dataclass(frozen=True)
class State:
    """The state of causal attention over all tokens so far, of a size that does not grow with their number.

    Attributes:
        far: the chunks that are complete, or None before the first is.
        key, extended: room for the keys [B, Hk, C, d] and [v, 1] [B, Hk, C, v + 1] of the tokens since, or for fewer;
            0 where masked.
        count: how many tokens since there are, below C; a tensor in an exported graph.
        written: how many tokens of the room are in use, by this state or by another that came from it and shares it.
    """

    far: Far | None
    key: Tensor
    extended: Tensor
    count: int | Tensor
    written: list[int] = field(default_factory=lambda: [0], compare=False, repr=False)

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """Apply `function` to each tensor that has the batch as its first dimension."""
        far = None if self.far is None else self.far.map(function)
        # The room may still be that of this state, and is not to be written to.
        return State(far, function(self.key), function(self.extended), self.count, [-1])

    def since(self) -> tuple[Tensor, Tensor]:
        """Return the keys and [v, 1] of the tokens since."""
        return self.key[:, :, : self.count], self.extended[:, :, : self.count]

    def append(self, key: Tensor, extended: Tensor, chunk: int) -> "State":
        """Put M further tokens into the room, which is made for a chunk, or made anew where the state has to stay."""
        assert isinstance(self.count, int)
        count, keys, values, written = self.count + key.shape[2], self.key, self.extended, self.written
        is_frozen = keys.is_inference() and not torch.is_inference_mode_enabled()
        if written[0] != self.count or keys.shape[2] < count or is_frozen:
            keys, values = (x.new_zeros(*x.shape[:2], chunk, x.shape[3]) for x in (keys, values))
            keys[:, :, : self.count], values[:, :, : self.count] = self.since()
            written = [0]
        keys[:, :, self.count : count], values[:, :, self.count : count] = key, extended
        written[0] = count
        return State(self.far, keys, values, count, written)


register_dataclass(Far, field_names=["sums", "total", "moments", "centre"], drop_field_names=["seen", "flat"])
register_dataclass(State, field_names=["far", "key", "extended", "count"], drop_field_names=["written"])


def with_fixed_size(features: FeatureMap | None, state: State, bounded: bool) -> State:
    """Return the same state as tensors alone, whose sizes do not depend on the number of tokens."""
    assert isinstance(state.count, int)
    far = state.far
    if features is None:
        return state
    (batch, heads, _, dim), width = state.key.shape, state.extended.shape[3]
    if far is None:
        far = Far(
            state.key.new_zeros(batch, heads, features.plan.num_features, width),
            state.key.new_zeros(batch, heads, 1, width),
            state.key.new_zeros(batch, heads, 1 + dim, dim) if bounded else None,
            state.key.new_zeros(batch, heads, 1, dim) if features.kernel.is_exponential else None,
        )
    keys, values = (F.pad(x, (0, 0, 0, chunk_length(features) - state.count)) for x in state.since())
    return State(far, keys, values, torch.tensor(state.count, device=state.key.device))


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
    if features is not None and state is not None and length:
        if isinstance(state.count, Tensor):
            return _step(features, state, query, key, extended, scale, bounded)
        is_recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if not is_recorded and state.count + key.shape[2] <= chunk and state.key.dtype == key.dtype:
            state = state.append(key, extended, chunk)
            out = _attend_few(features, state.far, query, *state.since(), scale)
            return out, _closed(features, state, scale, bounded) if state.count == chunk else state
    # Queries of one group see the same keys: they are further queries of one head.
    rows = query.unflatten(1, (-1, groups)).transpose(2, 3)
    far = None
    if state is not None:
        far = state.far
        key, extended = (torch.cat(pair, 2) for pair in zip(state.since(), (key, extended), strict=True))
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
    left = complete * chunk
    if exporting:
        place = torch.arange(tokens, device=out.device)
        out = out[:, :, place // chunk, place % chunk]
    else:
        out = out.flatten(2, 3)
        out = out[:, :, first:tokens] if out.shape[2] > length else out
    out = out.transpose(2, 3).flatten(1, 2)
    if features is None:
        return out, State(after, key[:, :, :0], extended[:, :, :0], 0)
    if not exporting:
        return out, State(after, key[:, :, left:], extended[:, :, left:], tokens - left, [tokens - left])
    # The first chunk that is not complete is that of the state.
    end = torch.full((1,), complete, device=out.device)
    key, extended = (x.index_select(2, end).squeeze(2) for x in (keys, values))
    return out, State(after, key, extended, torch.full((), tokens - left, device=out.device))


def _attend_few(
    features: FeatureMap, far: Far | None, query: Tensor, key: Tensor, extended: Tensor, scale: float
) -> Tensor:
    """Attend from the last N tokens [B, H, N, d] of a chunk, whose tokens so far are given."""
    length, groups, shape = query.shape[2], query.shape[1] // key.shape[1], query.shape[:2]
    lower = None
    if groups > 1:
        # Queries of one group see the same keys: they are further queries of one head.
        query = query.unflatten(1, (-1, groups)).transpose(2, 3).flatten(2, 3)
    # Products of tensors with one batch dimension are one call each.
    rows, key, extended = query.flatten(0, 1), key.flatten(0, 1), extended.flatten(0, 1)
    if far is not None:
        if not far.flat or torch.compiler.is_compiling():
            far.flat[:] = [far.map(lambda x: x.flatten(0, 1))]
        (far,) = far.flat
    if length > 1:
        lower = rows.new_ones(length, key.shape[1], dtype=torch.bool).tril(key.shape[1] - length)
        lower = lower.repeat_interleave(groups, 0)
    out = _attend(features, far, rows, key, extended, lower, scale)
    if groups > 1:
        out = out.unflatten(1, (length, groups)).transpose(1, 2)
    return out.reshape(*shape, length, -1)


def _closed(features: FeatureMap, state: State, scale: float, bounded: bool) -> State:
    """Sum up the chunk of the tokens since, which is complete."""
    _, far = _sum_up(features, state.far, state.key[:, :, None], state.extended[:, :, None], 1, 1, scale, bounded)
    return State(far, torch.zeros_like(state.key), torch.zeros_like(state.extended), 0)


def _step(
    features: FeatureMap, state: State, query: Tensor, key: Tensor, extended: Tensor, scale: float, bounded: bool
) -> tuple[Tensor, State]:
    """Do what `extend` does with one token and a state of tensors alone (`fixed`), whatever is in it."""
    assert query.shape[2] == key.shape[2] == 1
    assert isinstance(state.count, Tensor)
    assert state.far is not None
    chunk = state.key.shape[2]
    is_here = (torch.arange(chunk, device=key.device) == state.count)[:, None]
    keys, values = torch.where(is_here, key, state.key), torch.where(is_here, extended, state.extended)
    out = _attend_few(features, state.far, query, keys, values, scale)
    count = state.count + 1
    before = state.far
    if before.centre is not None:
        is_first = before.total[..., -1:] == 0
        before = replace(before, centre=torch.where(is_first, _mean(keys, values), before.centre), seen=[], flat=[])
    # Without a branch, which few exporters know: what the chunk would leave behind is there at every token.
    closed = _closed(features, State(before, keys, values, chunk), scale, bounded)
    closed = replace(closed, count=torch.zeros_like(count))
    is_full = count == chunk
    new = State(state.far, keys, values, count)
    return out, tree_map(lambda full, other: torch.where(is_full, full, other), closed, new)


def _mean(key: Tensor, extended: Tensor) -> Tensor:
    """Average the keys that count."""
    counts = extended[..., -1:]
    return (key * counts).sum(-2, keepdim=True) / counts.sum(-2, keepdim=True).clamp_min(1)


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
        centre = _mean(key[:, :, 0], extended[:, :, 0]) if far is None else far.centre
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
    lower: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend from [..., R, d] queries to the [..., M, d] keys that `lower` [R, M] allows, and to what lies before.

    None allows all of them.
    """
    if features is None:
        assert lower is not None
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


def _near(
    features: FeatureMap, query: Tensor, key: Tensor, extended: Tensor, lower: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute numerators and denominators [..., R, v + 1] by f itself, over e^t, and t."""
    kernel = features.kernel
    if kernel.is_exponential:
        return near_of_exp(query, key, extended, lower)
    scores = query @ key.mT
    allowed = _allowed(extended, lower)
    weights = kernel.relative(scores.masked_fill(~allowed, 0.0)).masked_fill(~allowed, 0.0)
    products = weights @ extended.to(weights.dtype)
    return products, torch.zeros_like(products[..., :1])


def _allowed(extended: Tensor, lower: Tensor | None) -> Tensor:
    is_there = extended[..., -1].unsqueeze(-2) > 0
    return is_there if lower is None else is_there & lower


class _Seen(NamedTuple):
    """What queries need of the tokens before a chunk, whatever the queries are.

    Attributes:
        number: of the tokens, at least 1.
        first, second: the mean of k and of k k^T times the scale and its square, as for `moments_of`.
        size: the mean square of a coordinate of k, times the square of the scale.
        mean: of [v, 1].
        kept: the shrinkage of deviations from the mean value.
    """

    products: Products
    is_there: Tensor
    number: Tensor
    first: Tensor | None
    second: Tensor | None
    size: Tensor | None
    mean: Tensor
    kept: Tensor


def _see(features: FeatureMap, far: Far, dtype: torch.dtype, scale: float) -> _Seen:
    if not far.seen or far.seen[0][0] is not features or torch.is_grad_enabled() or torch.compiler.is_compiling():
        # The column of ones has no use for a gradient.
        total = far.total[..., -1:].detach()
        count = total.clamp_min(1)
        first = second = size = None
        if far.moments is not None:
            first, second = (x / count for x in (scale * far.moments[..., :1, :], scale**2 * far.moments[..., 1:, :]))
            size = size_of(second)
        products, kept = features.products(dtype, scale), trust(features, count)
        far.seen[:] = [(features, _Seen(products, total > 0, count, first, second, size, far.total / count, kept))]
    return far.seen[0][1]


def _far(features: FeatureMap, far: Far, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute numerators and denominators of what lies before, [..., R, v + 1], over e^l, and l."""
    level = query.new_zeros(()) if far.centre is None else scale * (query @ far.centre.mT)
    seen = _see(features, far, query.dtype, scale)
    if seen.first is None or seen.second is None:
        return look_up(query, far.sums, seen.products), torch.where(seen.is_there, level, LOWEST)
    moments = moments_of(query, seen.first, seen.second, seen.number, seen.size)
    if not features.kernel.is_exponential:
        fit = fit_of(features, moments, query.shape[-1])
        described = fit_parts(features, seen.products, query, seen.first, seen.second)
        mean = seen.mean[..., :-1]
        parts = look_up_in_parts(described, far.sums)
        deviations = [torch.cat([x[..., :-1] - x[..., -1:] * mean, x[..., -1:]], -1) for x in parts]
        numerator, denominator = settle(features, fit, deviations, seen.number)
        products = torch.cat([fit.kept * numerator + denominator * mean, denominator], -1) * fit.unit
        return torch.where(seen.is_there, products, 0.0), torch.where(seen.is_there, level, LOWEST)
    factor, _, least = limits_of(features, moments)
    assert factor is not None
    assert moments.mean is not None
    level = level + (1 - factor) * moments.mean
    level = level + lost_mass(moments.square - moments.mean.square(), factor, seen.number)
    cooled = cooled_parts(features, seen.products, query * factor, seen.first, seen.second, moments)
    found = total_of(look_up_in_parts(cooled, far.sums))
    denominator = torch.maximum(found[..., -1:], seen.number * least)
    # Shrink the numerator towards denominator * mean value.
    kept = seen.kept * found
    found = torch.addcmul(kept, denominator - kept[..., -1:], seen.mean)
    return found, torch.where(seen.is_there, level, LOWEST)


def _keep_sum_from_zero(
    features: FeatureMap,
    numerator: Tensor,
    total: Tensor,
    far: Far | None,
    query: Tensor,
    key: Tensor,
    extended: Tensor,
    lower: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Keep the sum of the weights of a kernel of both signs from 0, as `reference.normalise` does."""
    allowed = _allowed(extended, lower).to(query.dtype).expand(*query.shape[:-1], -1)
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
