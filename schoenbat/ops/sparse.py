r"""Attention that is exact where it is sharp: near and heavy keys by exp itself, all others through features.

A trained model attends sharply to few keys, which no affordable number of features describes, and broadly to the rest,
which two degrees do. With E the keys that a query sees exactly, R the n others, and x_j = scale <q, k_j>, the output is

    (sum_{j in E} exp(x_j) v_j + M r) / (sum_{j in E} exp(x_j) + M).

The rest are described about their mean argument mu, with s^2 the variance of their arguments, m their mean value and
y_j = x_j - mu, by

    M = a n exp(mu + g) (1 + c s^2 / 2),
    r = m + sum_{j in R} (b t y_j + c t^2 y_j^2 / 2) (v_j - m) / (n (1 + c t^2 s^2 / 2)).

For exp a = b = c = 1; a head may have a kernel of its own instead (`HeadKernels`). The factor t <= 1 keeps t s where
the features describe exp (`Limits.factor` in `schoenbat.ops._bounds`). Where attention is not causal, g is what log M
misses on average over a few queries of the sequence all of whose weights are looked at. Beyond a spread `WIDE` of s, g
has a part (s - WIDE) (2 log n)^(1/2) as well, by which the largest of n Gaussian arguments grows. The denominators are
positive whatever the arguments are, so an estimate that knows nothing gives the mean value, as uniform weights do.

Near keys: tokens come in blocks of `window`, and a query sees its own block and the one before it; in self-attention
that is not causal, the one after it too. Heavy keys: those to which queries that do not have them near give the largest
sum of squared weights. Where attention is causal, keys that leave the window compete with the heavy keys so far, by
the mean square of the weights that they got, and the losers join the rest for good: no later token has a say, and the
state has a fixed size. The first tokens (sinks) always stay. In cross-attention, where a choice by queries would tell a
decoder of its later tokens, heavy keys are those furthest from the mean key.

After Scatterbrain (Chen et al., arXiv 2110.15343: sparse and low-rank), BigBird (Zaheer et al., arXiv 2007.14062:
blocks), StreamingLLM (Xiao et al., arXiv 2309.17453: sinks) and H2O (Zhang et al., arXiv 2306.14048: heavy keys).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schoenbat.features.plan import FeatureMap, Products, expand
from schoenbat.kernels import Kernel
from schoenbat.ops._bounds import trust
from schoenbat.ops._near import LOWEST
from schoenbat.ops._planned import look_up, sum_keys, total_of
from schoenbat.ops.native import sparse as native_sparse
from schoenbat.ops.places import places_of, real_tokens
from schoenbat.ops.reference import AttentionInputs, check_square, fill_masked, split

QUERIES = 32
"""Queries, spread over the sequence, that choose heavy keys."""
WIDE = 3.5
"""The spread of arguments from which on the largest of them weigh more than their second moment says."""


class Sparsity(NamedTuple):
    """The keys that are seen exactly.

    Attributes:
        window: tokens of a block.
        heavy: the number of heavy keys of each key head.
        sinks: the number of first tokens that stay in causal attention, beside the heavy keys.
    """

    window: int
    heavy: int
    sinks: int


class HeadKernels(nn.Module):
    """A kernel a (1 + b y + c y^2 / 2) of its own for each head, for the rest of the keys; a, b, c > 0.

    Args:
        num_heads: of the queries.

    Attributes:
        logarithms: of a, b, c, [H, 3]; 0 for exp up to the second degree.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.logarithms = nn.Parameter(torch.zeros(num_heads, 3))

    def forward(self) -> Tensor:
        """Return a, b, c, [H, 3]."""
        return self.logarithms.exp()

    def kernel(self, head: int) -> Kernel:
        """Return the kernel of one head, to be evaluated, drawn, or asked for its coefficients."""
        a, b, c = self().detach()[head].tolist()
        return Kernel.from_callable(lambda x: a * (1 + x * (b + c * x / 2)), name=f"of head {head}")


class Rest(NamedTuple):
    """Keys that are not seen exactly, summed up; [..., n] are the batch and the key heads.

    Attributes:
        sums: of phi(k) [v, 1]^T, [..., D, v + 1].
        total: of [v, 1], [..., 1, v + 1].
        second: the sum of k k^T, [..., d, d].
        centre: what was taken off the keys, [..., 1, d].
    """

    sums: Tensor
    total: Tensor
    second: Tensor
    centre: Tensor


class Exact(NamedTuple):
    """Scores [B, Hk, R, M] of exact keys, `LOWEST` where a key is not seen, and their [v, 1] [..., M, v + 1].

    Values of [B, Hk, M, v + 1] are those of all rows; those of [n, M, v + 1] are those of n blocks of rows.
    """

    scores: Tensor
    extended: Tensor


class Taken(NamedTuple):
    """Keys that a rest contains though the query sees them exactly, summed up with x^n / n! for n = 0, 1, 2.

    Attributes:
        zeroth, first, second: of x^n / n! [v, 1], [B, Hk, R, v + 1]; `second` is None without features of that degree.
        square: of x^2, [B, Hk, R, 1].
    """

    zeroth: Tensor
    first: Tensor
    second: Tensor | None
    square: Tensor


def attend(
    features: FeatureMap, inputs: AttentionInputs, sparsity: Sparsity, kernels: HeadKernels | None = None
) -> Tensor:
    """Compute the attention of the module, [B, H, N, v] in the dtype of `query`.

    Args:
        features: of exp up to the second degree, the first of them complete.
        inputs: without `self_attention` no key is near, unless attention is causal.
        kernels: of the heads; None for exp.
    """
    query, key, value, key_mask, is_causal, scale, self_attention = inputs
    if is_causal:
        check_square(query, key)
        return extend(features, None, inputs, sparsity, kernels)[0]
    given = None if kernels is None else kernels()
    if sparsity.window and native_sparse.serves(features, inputs, given):
        return native_sparse.attend(features, inputs, sparsity.window, sparsity.heavy, given)
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        real = real_tokens(key_mask, key)
        there = real[:, None, :, None].to(wide)
        key, value = fill_masked(key.to(wide), key_mask), fill_masked(value.to(wide), key_mask)
        extended = torch.cat([value, there.expand(*value.shape[:-1], 1)], -1)
        rows = (scale * query.to(wide)).unflatten(1, (-1, groups))
        if not length or not key.shape[2]:
            # The output is empty or 0, but part of the graph.
            return (rows @ (key.mT @ value).unsqueeze(2)).flatten(1, 2).to(query.dtype)
        block = min(sparsity.window, length) if self_attention else 0

        places, missed = _choose_heavy(rows, key, real, sparsity.heavy, block, self_attention)
        free = there.expand(*key.shape[:-1], 1).scatter(2, places.unsqueeze(-1), 0.0)
        centre = (free * key).sum(2, keepdim=True) / free.sum(2, keepdim=True).clamp_min(1)
        key = key - centre
        rest = _sum_up(features, key, extended * free, centre)

        # Two blocks more than there are tokens for, so that the blocks of all sequences can be one sequence.
        size = block or length
        number = -(-length // size) + (2 if block else 0)
        blocks = F.pad(rows, (0, 0, 0, number * size - length)).unflatten(3, (number, size)).transpose(2, 3)
        rows = blocks.flatten(2, 4)
        heavy = _take(key, places), _take(extended, places)
        exact = [_look_at(rows, *heavy)]
        taken = None
        if block:
            near, taken = _look_nearby(features, blocks, key, extended * free)
            exact.append(near)
        out, _ = _combine(features, rest, exact, rows, kernels, (number, groups), taken, missed)
        out = out.unflatten(2, blocks.shape[2:5]).transpose(2, 3).flatten(3, 4)[:, :, :, :length]
        return out.flatten(1, 2).to(query.dtype)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Gather tokens of [B, Hk, M, e] at places [B, Hk, m]."""
    return x.gather(2, places.unsqueeze(-1).expand(*places.shape, x.shape[-1]))


def _look_at(rows: Tensor, key: Tensor, extended: Tensor) -> Exact:
    return Exact(rows @ key.mT + _hidden(extended), extended)


def _hidden(extended: Tensor) -> Tensor:
    """Return what hides keys that are not there, [..., 1, M]: `LOWEST` for these and 0 for others."""
    return torch.where(extended[..., -1].unsqueeze(-2) > 0, 0.0, LOWEST)


def _choose_heavy(
    rows: Tensor, key: Tensor, real: Tensor, number: int, block: int, self_attention: bool
) -> tuple[Tensor, Tensor | None]:
    """Choose heavy keys (see the module), and measure g by the queries that chose.

    Args:
        rows: scaled queries [B, Hk, G, N, d].

    Returns:
        Places [B, Hk, m], and g [B, Hk, G]; None in cross-attention, where queries may not tell.
    """
    hidden, number = ~real[:, None], min(number, key.shape[2])
    if not self_attention:
        there = real[:, None, :, None].to(key.dtype)
        mean = (key * there).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1)
        worth = (key - mean).square().sum(-1).masked_fill(hidden, -1.0)
        return worth.topk(number, -1).indices, None
    asking = places_of((torch.arange(QUERIES, device=key.device) + 0.5) / QUERIES, real)
    some = rows.gather(3, asking[:, None, None, :, None].expand(*rows.shape[:3], -1, rows.shape[-1]))
    far = real[:, None].expand(-1, QUERIES, -1)
    if block:
        blocks = torch.arange(key.shape[2], device=key.device) // block
        far = far & ((blocks - asking[..., None] // block).abs() > 1)
    scores = some @ key.unsqueeze(2).mT
    weights = scores.masked_fill(hidden[:, None, None], LOWEST).softmax(-1).masked_fill(~far[:, None, None], 0.0)
    worth = weights.square().sum((2, 3)).masked_fill(hidden, -1.0)
    places = worth.topk(number, -1).indices
    free = torch.ones_like(worth, dtype=torch.bool).scatter(-1, places, value=False)
    rest = far[:, None, None] & free[:, :, None, None]
    count = rest.sum(-1)
    scores = scores.masked_fill(~rest, 0.0)
    mean = scores.sum(-1) / count.clamp_min(1)
    variance = scores.square().sum(-1) / count.clamp_min(1) - mean.square()
    mass = (scores - mean.unsqueeze(-1)).masked_fill(~rest, LOWEST).logsumexp(-1)
    missed = mass - _log_mass(variance.clamp_min(0), count.clamp_min(1))
    return places, missed.masked_fill(count == 0, 0.0).mean(-1)


def _log_mass(variance: Tensor, count: Tensor, curvature: Tensor | float = 1.0) -> Tensor:
    """Compute log(M / exp(mu)) of the module with a = 1 and g = 0."""
    beyond = (variance.clamp_min(WIDE**2).sqrt() - WIDE) * (2 * count.log()).sqrt()
    return (count * (1 + curvature * variance / 2)).log() + beyond


def _sum_up(features: FeatureMap, key: Tensor, extended: Tensor, centre: Tensor) -> Rest:
    """Sum up centred keys [..., M, d], of which those with extended values [..., M, v + 1] of 0 do not count."""
    sums = sum_keys(key, extended, features.products(key.dtype, 1.0))
    second = (key * extended[..., -1:]).mT @ key
    return Rest(sums, extended.sum(-2, keepdim=True), second, centre)


def _look_nearby(features: FeatureMap, blocks: Tensor, key: Tensor, extended: Tensor) -> tuple[Exact, Taken]:
    """Look at the blocks beside each query's own.

    Args:
        blocks: queries [B, Hk, n, G, R, d]; the last two blocks are empty.
        key, extended: [B, Hk, M, d] and [v, 1] [B, Hk, M, v + 1], 0 for what is heavy or not there.
    """
    number, size = blocks.shape[2], blocks.shape[4]
    rows = blocks.flatten(0, 2).flatten(1, 2)

    def surrounding(x: Tensor) -> Tensor:
        """Gather each block with its neighbours: [B, Hk, M, e] to [B Hk n, 3 R, e], without a copy."""
        padded = F.pad(x, (0, 0, size, (number - 1) * size - x.shape[2])).flatten(0, 2)
        return F.pad(padded, (0, 0, 0, 2 * size)).unfold(0, 3 * size, size).mT

    def of_rows(x: Tensor) -> Tensor:
        return x.reshape(*blocks.shape[:2], -1, x.shape[-1])

    values = surrounding(extended)
    scores = rows @ surrounding(key).mT
    there = values[..., -1:]
    square = scores.square()
    zeroth = values.sum(1, keepdim=True).expand(-1, rows.shape[1], -1)
    second = None
    _, products = _products_by_degree(features, rows.dtype)
    if products.plan.runs and features.sketched is None:
        second = square / 2 @ values
    elif products.plan.runs:
        own = surrounding(_features(key, products) * products.squares.mT)
        second = _features(rows, products) @ own.mT @ values
    sums = zeroth, scores @ values, second, square @ there
    taken = Taken(*(None if x is None else of_rows(x) for x in sums))  # type: ignore[arg-type]
    return Exact(of_rows(scores + _hidden(values)), values), taken


class State(NamedTuple):
    """The state of causal attention over all tokens so far, of a size that does not grow with their number.

    Attributes:
        rest: the keys that are neither recent nor heavy; None before there are any.
        recent, heavy: keys of the blocks in the window, at most 2 `window` tokens, and heavy keys with the sinks.
        number: of tokens so far that are no padding, [B].
    """

    rest: Rest | None
    recent: "Kept"
    heavy: "Kept"
    number: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """Apply `function` to each tensor; all have the batch as their first dimension."""
        rest = None if self.rest is None else Rest(*map(function, self.rest))
        recent, heavy = (Kept(*map(function, kept)) for kept in (self.recent, self.heavy))
        return State(rest, recent, heavy, function(self.number))


class Kept(NamedTuple):
    """Keys that are seen exactly.

    Attributes:
        keys, extended: [B, Hk, m, d] and [v, 1] [B, Hk, m, v + 1].
        worth: the sum of squared weights that queries gave to each key, and the number of these queries, [B, Hk, m, 2].
    """

    keys: Tensor
    extended: Tensor
    worth: Tensor

    def join(self, other: "Kept") -> "Kept":
        """Put keys of `other` after these."""
        return Kept(*(torch.cat(pair, 2) for pair in zip(self, other, strict=True)))

    def part(self, start: int, end: int | None = None) -> "Kept":
        """Return some of the keys."""
        return Kept(*(x[:, :, start:end] for x in self))


def extend(
    features: FeatureMap,
    state: State | None,
    inputs: AttentionInputs,
    sparsity: Sparsity,
    kernels: HeadKernels | None = None,
) -> tuple[Tensor, State]:
    """Attend causally from N further tokens, after those of `state`: the parts give what the whole would.

    Returns:
        [B, H, N, v] in the dtype of `query`, and the new state.
    """
    query, key, value, key_mask, _, scale, _ = inputs
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        real = real_tokens(key_mask, key)
        there = real[:, None, :, None].to(wide)
        key, value = fill_masked(key.to(wide), key_mask), fill_masked(value.to(wide), key_mask)
        extended = torch.cat([value, there.expand(*value.shape[:-1], 1)], -1)
        rows = (scale * query.to(wide)).unflatten(1, (-1, groups))
        if state is None:
            none = Kept(key[:, :, :0], extended[:, :, :0], key.new_zeros(*key.shape[:2], 0, 2))
            state = State(None, none, none, real.new_zeros(len(real), dtype=torch.long))
        counted = state.number[:, None] + real.cumsum(1)
        is_sink = real & (counted <= sparsity.sinks)
        worth = torch.zeros_like(key[..., :2])
        worth[..., 0].masked_fill_(is_sink[:, None], math.inf)
        given = Kept(key, extended, worth)
        outputs, start = [], 0
        while start < length:
            end = min(length, start + sparsity.window - state.recent.keys.shape[2] % sparsity.window)
            recent = state.recent.join(given.part(start, end))
            state = state._replace(recent=recent)
            out, state = _attend_within(features, state, rows[:, :, :, start:end], real[:, start:end], kernels)
            outputs.append(out)
            if recent.keys.shape[2] == 2 * sparsity.window:
                state = _close(features, state, sparsity)
            start = end
        # Of no tokens the output is empty, but part of the graph.
        out = torch.cat(outputs, 3) if outputs else rows @ (key.mT @ value).unsqueeze(2)
        return out.flatten(1, 2).to(query.dtype), state._replace(number=counted[:, -1] if length else state.number)


def _attend_within(
    features: FeatureMap, state: State, rows: Tensor, real: Tensor, kernels: HeadKernels | None
) -> tuple[Tensor, State]:
    """Attend from the last tokens of `state`, [B, Hk, G, n, d], and note which weights its keys got."""
    groups, length = rows.shape[2:4]
    recent, heavy = state.recent, state.heavy
    rows = rows.flatten(2, 3)
    tokens = recent.keys.shape[2]
    seen = torch.ones(length, tokens, dtype=torch.bool, device=rows.device).tril(tokens - length).repeat(groups, 1)
    centre = None if state.rest is None else state.rest.centre
    near, far = (
        _look_at(rows, kept.keys if centre is None else kept.keys - centre, kept.extended) for kept in (recent, heavy)
    )
    near = Exact(near.scores.masked_fill(~seen, LOWEST), near.extended)
    out, weights = _combine(features, state.rest, [near, far], rows, kernels, (1, groups))
    with torch.no_grad():
        asks = real.repeat(1, groups)[:, None, :, None]
        worths = []
        for kept, (scores, _), own in zip((recent, heavy), (near, far), weights, strict=True):
            squares = own.square().masked_fill(~asks, 0.0).sum(2)
            number = ((scores > LOWEST / 2) & asks).sum(2)
            worths.append(kept.worth + torch.stack([squares, number.to(squares.dtype)], -1))
    recent, heavy = recent._replace(worth=worths[0]), heavy._replace(worth=worths[1])
    return out.unflatten(2, (groups, -1)), state._replace(recent=recent, heavy=heavy)


def _close(features: FeatureMap, state: State, sparsity: Sparsity) -> State:
    """Let the block that leaves the window compete with the heavy keys, and sum up the losers."""
    candidates = state.heavy.join(state.recent.part(0, sparsity.window))
    key, extended, worth = candidates
    mean = worth[..., 0] / worth[..., 1].clamp_min(1)
    mean = mean.masked_fill(extended[..., -1] == 0, -1.0)
    number = min(sparsity.heavy + sparsity.sinks, key.shape[2])
    places = mean.topk(number, -1).indices
    heavy = Kept(*(_take(x, places) for x in candidates))
    lost = extended.scatter(2, places.unsqueeze(-1).expand(*places.shape, extended.shape[-1]), 0.0)
    counts = lost[..., -1:]
    centre = (counts * key).sum(2, keepdim=True) / counts.sum(2, keepdim=True).clamp_min(1)
    rest = state.rest
    if rest is not None:
        centre = torch.where(rest.total[..., -1:] > 0, rest.centre, centre)
    added = _sum_up(features, key - centre, lost, centre)
    if rest is not None:
        added = Rest(rest.sums + added.sums, rest.total + added.total, rest.second + added.second, centre)
    return State(added, state.recent.part(sparsity.window), heavy, state.number)


def _combine(
    features: FeatureMap,
    rest: Rest | None,
    exact: list[Exact],
    rows: Tensor,
    kernels: HeadKernels | None,
    layout: tuple[int, int],
    taken: Taken | None = None,
    missed: Tensor | None = None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Put exact and estimated weights together: outputs [B, Hk, rows, v], and the weights of the exact keys.

    Args:
        rows: scaled queries [B, Hk, rows, d], in as many blocks and groups as `layout` says.
        taken: what of `rest` is seen exactly.
        missed: g of the module.
    """
    columns = [one.scores for one in exact]
    output = None
    if rest is not None:
        level, output = _describe(features, rest, rows, kernels, layout, taken)
        columns.append(level if missed is None else level + _of_rows(missed.unsqueeze(-1), layout, rows))
    # Where no key is seen, all weight goes to the last column, which has no value.
    columns.append(torch.full_like(rows[..., :1], LOWEST / 2))
    weights = torch.cat(columns, -1).softmax(-1).split([column.shape[-1] for column in columns], -1)
    parts = [] if output is None else [weights[-2] * output]
    for own, (_, extended) in zip(weights, exact, strict=False):
        value = extended[..., :-1]
        blocks = own.reshape(len(value), -1, own.shape[-1]) if value.ndim == 3 else own
        parts.append((blocks @ value).reshape(*own.shape[:-1], -1))
    return total_of(parts), weights[: len(exact)]


def _describe(
    features: FeatureMap,
    rest: Rest,
    rows: Tensor,
    kernels: HeadKernels | None,
    layout: tuple[int, int],
    taken: Taken | None,
) -> tuple[Tensor, Tensor]:
    """Compute log M without g, and r, of the module for each row; `LOWEST` where there is no such key."""
    linear, higher = _products_by_degree(features, rows.dtype)
    cut = [features.plan.num_features - linear.plan.num_features - higher.plan.num_features]
    cut += [linear.plan.num_features, higher.plan.num_features]
    _, linear_sums, higher_sums = rest.sums.split(cut, -2)
    first = look_up(rows, linear_sums, linear)
    second = look_up(rows, higher_sums, higher) if higher.plan.runs else None
    total = rest.total
    square = ((rows @ rest.second) * rows).sum(-1, keepdim=True)
    if taken is not None:
        total, first, square = total - taken.zeroth, first - taken.first, square - taken.square
        second = None if second is None or taken.second is None else second - taken.second
    value, number = split(total)
    count = number.clamp_min(1)
    value = value / count
    mean = first[..., -1:] / count
    variance = (square / count - mean.square()).clamp_min(0)
    limit = max(1.0, features.reach)
    factor = (limit / variance.clamp_min(limit)).sqrt()

    slope = curvature = 1.0
    gain = 0.0
    if kernels is not None:
        own = kernels().unflatten(0, (rows.shape[1], layout[1]))
        gain, slope, curvature = _of_rows(own, layout, rows).split(1, -1)
        gain = gain.log()

    def deviation(products: Tensor) -> Tensor:
        """Return the sum of x^n / n! (v - m)."""
        return torch.addcmul(products[..., :-1], value, products[..., -1:], value=-1)

    linear_part = deviation(first)
    output, denominator = slope * factor * linear_part, count
    if second is not None:
        reached = curvature * factor.square()
        share = features.shares[2]
        if share < 1:
            isotropic = (
                rows.square().sum(-1, keepdim=True) * rest.second.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
            )
            ratio = (
                (square / isotropic.clamp_min(torch.finfo(rows.dtype).tiny) * (rest.total[..., -1:] / count))
                .clamp(0, 1)
                .square()
            )
            reached = reached * ratio / (share * ratio + 1 - share)
        output = output + reached * (deviation(second) - mean * linear_part)
        denominator = count * (1 + curvature * factor.square() * variance / 2)
    output = value + trust(features, count) * output / denominator
    level = gain + mean + _log_mass(variance, count, curvature)
    return level.masked_fill(number <= 0, LOWEST), output


def _of_rows(x: Tensor, layout: tuple[int, int], rows: Tensor) -> Tensor:
    """Repeat what the heads [..., Hk, G, e] have for each of their rows, [..., Hk, rows, e]."""
    size = rows.shape[2] // math.prod(layout)
    return x[..., None, :, None, :].expand(*x.shape[:-2], layout[0], layout[1], size, -1).flatten(-4, -2)


def _products_by_degree(features: FeatureMap, dtype: torch.dtype) -> tuple[Products, Products]:
    """Return the products of the linear features and of those of the second degree."""
    _, above = features.products(dtype, 1.0).split(1)
    return above.split(2)


def _features(x: Tensor, products: Products) -> Tensor:
    """Compute features without their weights."""
    return expand(x @ products.projection, products.plan)
