r"""Sums over tokens through features that are products of projections, without ever holding many of the features.

Both functions go through the tokens in pieces, so that the features of a piece stay in the cache, and make them anew in
the backward pass: what is kept is the size of the inputs. Few tokens are handled at once by `attend_at_once`, which
keeps their features. Gradients are themselves made of differentiable operations.

What bounds few tokens, for 512 tokens, 2 heads of 32 dimensions and 128 features, forward and backward, in float32: six
products of features with [V, 1] or a gradient are 52 MFLOP, four projections 9 MFLOP. Two Zen 4 cores multiply large
matrices at 199 GFLOP/s: 0.31 ms. The operations read and write 26 MB, all in the cache, where two cores copy at 140
GB/s: 0.19 ms. So they take at least 0.5 ms; exact attention, 235 MFLOP, at least 1.2 ms. More than that goes into calls
and waking the second thread, so fewer and larger operations help most.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from schoenbat.features.plan import Plan, expand, pull_back, push_forward, weigh
from schoenbat.ops.reference import away_from_zero, is_away_from_zero

PIECE = {"cpu": 2**19}
"""How many features of tokens a piece holds. On a CPU, 2 MB in float32."""
PIECE_ELSEWHERE = 2**25
FEW_ROWS = 4096
"""Up to so many rows of queries and keys together are handled at once."""


def sum_keys(key: Tensor, extended: Tensor, projection: Tensor, plan: Plan) -> Tensor:
    """phi(K)^T V: [..., M, d] and [..., M, v] to [..., D, v], with the squares of the weights of phi."""
    if torch.compiler.is_compiling():
        return weigh(expand(_project(key, projection), plan) @ extended, plan, 2)
    out = _Sum.apply(key.flatten(0, -3), extended.flatten(0, -3), projection, plan)
    return out.unflatten(0, key.shape[:-2])


def look_up(query: Tensor, summed: Tensor, projection: Tensor, plan: Plan) -> Tensor:
    """phi(Q) S: [..., N, d] and [..., D, v] to [..., N, v], without the weights of phi, which `sum_keys` gave to S."""
    if torch.compiler.is_compiling():
        return _times(expand(_project(query, projection), plan), summed).mT
    out = _LookUp.apply(query.flatten(0, -3), summed.flatten(0, -3), projection, plan)
    return out.unflatten(0, query.shape[:-2])


def fits_at_once(query: Tensor, key: Tensor) -> bool:
    """Whether `attend_at_once` is the better way."""
    compiling = torch.compiler.is_compiling()
    return not compiling and query.shape == key.shape and 2 * query.shape[:-1].numel() <= FEW_ROWS


def attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None,
    projection: Tensor,
    plan: Plan,
    smallest: float,
) -> Tensor:
    """phi(Q) (phi(K)^T W V) / (phi(Q) phi(K)^T W 1) of as many queries as keys, [B, H, N, d] and [B, H, N, v].

    Args:
        key_weight: the diagonal of W, [B, H, N, 1], or None for ones.
        smallest: denominators closer to 0 are moved there.
    """
    return _AtOnce.apply(query, key, value, key_weight, projection, plan, smallest)[0]


def extend_value(value: Tensor, weight: Tensor | None) -> Tensor:
    """W [V, 1]: numerators and denominators come out of the same products."""
    if weight is None:
        return torch.nn.functional.pad(value, (0, 1), value=1.0)
    return torch.cat([value * weight, weight], -1)


class _AtOnce(torch.autograd.Function):
    """Queries and keys stacked, with the features of both kept for the backward pass.

    Outputs after the first are what the backward pass needs. The last two, projected tokens and features, carry no
    gradient, so a backward pass that is itself differentiated makes them anew.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_weight: Tensor | None,
        projection: Tensor,
        plan: Plan,
        smallest: float,
    ) -> tuple[Tensor, ...]:
        projected = _project(torch.stack([query, key]), projection)
        features = expand(projected, plan)
        summed = weigh(features[1] @ extend_value(value, key_weight), plan, 2)
        products = _as_rows([_times(features[0], summed)], -1)
        denominator = away_from_zero(products[..., -1:], smallest)
        return products[..., :-1] / denominator, denominator, summed, projected, features

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.plan, ctx.smallest = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)
        ctx.mark_non_differentiable(*output[3:])
        # As set_materialize_grads, which torch.compile does not know: no zeros the size of the features.
        ctx.materialize_grads = False

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        query, key, value, key_weight, projection, *output, projected, features = ctx.saved_tensors
        attended, denominator, summed = output
        d_query, d_key, d_value = (
            torch.zeros_like(x) if t is None else t for x, t in zip((query, key, value), tangents[:3], strict=True)
        )
        d_features = push_forward(projected, ctx.plan, _project(torch.stack([d_query, d_key]), projection))
        if key_weight is None:
            d_extended = torch.nn.functional.pad(d_value, (0, 1))
        else:
            d_weight = torch.zeros_like(key_weight) if tangents[3] is None else tangents[3]
            d_extended = torch.cat([d_value * key_weight + value * d_weight, d_weight], -1)
        d_summed = d_features[1] @ extend_value(value, key_weight) + features[1] @ d_extended
        d_summed = weigh(d_summed, ctx.plan, 2)
        d_products = (_times(d_features[0], summed) + _times(features[0], d_summed)).mT
        d_denominator = d_products[..., -1:] * is_away_from_zero(denominator, ctx.smallest)
        return (d_products[..., :-1] - attended * d_denominator) / denominator, d_denominator, d_summed, None, None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, key_weight, projection, *output, projected, features = ctx.saved_tensors
        attended, denominator, summed = output
        grad, grad_denominator, grad_summed = (
            torch.zeros_like(x) if g is None else g for x, g in zip(output, grads[:3], strict=True)
        )
        if torch.is_grad_enabled():
            projected = _project(torch.stack([query, key]), projection)
            features = expand(projected, ctx.plan)
        below = grad_denominator - (grad * attended).sum(-1, keepdim=True) / denominator
        grad_products = torch.cat([grad / denominator, below * is_away_from_zero(denominator, ctx.smallest)], -1)
        grad_summed = weigh(grad_summed + features[0] @ grad_products, ctx.plan, 2)
        rows = torch.stack([grad_products, extend_value(value, key_weight)])
        grad_features = torch.stack([summed, grad_summed]) @ rows.mT
        grad_query, grad_key = _project_back(pull_back(projected, ctx.plan, grad_features), projection)
        grad_extended = _as_rows([_times(features[1], grad_summed)], -1)
        grad_value, grad_weight = grad_extended[..., :-1], None
        if ctx.needs_input_grad[3]:
            grad_weight = (grad_value * value).sum(-1, keepdim=True) + grad_extended[..., -1:]
        if key_weight is not None:
            grad_value = grad_value * key_weight
        return grad_query, grad_key, grad_value, grad_weight, None, None, None


class _Sum(torch.autograd.Function):
    """phi(K)^T V: [G, M, d], [G, M, v] to [G, D, v]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(key: Tensor, value: Tensor, projection: Tensor, plan: Plan) -> Tensor:
        parts = []
        for group in _pieces(key, plan):
            parts.append(_total([expand(_project(key[i], projection), plan) @ value[i] for i in group]))
        return weigh(_joined(parts, 0), plan, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, d_key: Tensor | None, d_value: Tensor | None, *_: Any) -> Tensor:
        key, value, projection = ctx.saved_tensors
        projected = _project(key, projection)
        terms = []
        if d_key is not None:
            terms.append(push_forward(projected, ctx.plan, _project(d_key, projection)) @ value)
        if d_value is not None:
            terms.append(expand(projected, ctx.plan) @ d_value)
        return weigh(_total(terms), ctx.plan, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        key, value, projection = ctx.saved_tensors
        grad = weigh(grad.clone(), ctx.plan, 2)
        grad_key, grad_value = [], []
        for group in _pieces(key, ctx.plan):
            keys, values = [], []
            for i in group:
                projected = _project(key[i], projection)
                keys.append(_project_back(pull_back(projected, ctx.plan, grad[i[0]] @ value[i].mT), projection))
                values.append(_times(expand(projected, ctx.plan), grad[i[0]]))
            grad_key.append(_joined(keys, 1))
            grad_value.append(_joined(values, -1))
        return _joined(grad_key, 0), _as_rows(grad_value, 0), None, None


class _LookUp(torch.autograd.Function):
    """phi(Q) S: [G, N, d], [G, D, v] to [G, N, v]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, summed: Tensor, projection: Tensor, plan: Plan) -> Tensor:
        parts = []
        for group in _pieces(query, plan):
            looked_up = [_times(expand(_project(query[i], projection), plan), summed[i[0]]) for i in group]
            parts.append(_joined(looked_up, -1))
        return _as_rows(parts, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, d_query: Tensor | None, d_summed: Tensor | None, *_: Any) -> Tensor:
        query, summed, projection = ctx.saved_tensors
        projected = _project(query, projection)
        terms = []
        if d_query is not None:
            terms.append(_times(push_forward(projected, ctx.plan, _project(d_query, projection)), summed).mT)
        if d_summed is not None:
            terms.append(_times(expand(projected, ctx.plan), d_summed).mT)
        return _total(terms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, summed, projection = ctx.saved_tensors
        grad_query, grad_summed = [], []
        for group in _pieces(query, ctx.plan):
            queries, sums = [], []
            for i in group:
                projected = _project(query[i], projection)
                queries.append(_project_back(pull_back(projected, ctx.plan, summed[i[0]] @ grad[i].mT), projection))
                sums.append(expand(projected, ctx.plan) @ grad[i])
            grad_query.append(_joined(queries, 1))
            grad_summed.append(_total(sums))
        return _joined(grad_query, 0), _joined(grad_summed, 0), None, None


def _times(features: Tensor, summed: Tensor) -> Tensor:
    """Of features [..., D, N] and S [..., D, v] the product [..., v, N], which BLAS forms faster than its transpose."""
    return summed.mT @ features


def _as_rows(parts: list[Tensor], dim: int) -> Tensor:
    """Columns [..., v, N], joined, as contiguous rows [..., N, v]. Adding zeros takes a third of the time of a copy."""
    columns = _joined(parts, dim)
    return columns.new_zeros(columns.mT.shape) + columns.mT


def _project(x: Tensor, projection: Tensor) -> Tensor:
    """P^T x for tokens [..., N, d] as columns [..., P, N], contiguous."""
    return projection.mT.expand(*x.shape[:-2], -1, -1) @ x.mT


def _project_back(columns: Tensor, projection: Tensor) -> Tensor:
    """The transpose of `_project`, from [..., P, N] to [..., N, d]."""
    return columns.mT @ projection.mT.expand(*columns.shape[:-2], -1, -1)


def _pieces(x: Tensor, plan: Plan) -> Iterator[list[tuple[slice, slice]]]:
    """Where the pieces of [G, N, n] lie: for some of the G sequences at a time, the slices of their tokens.

    A sequence that is longer than a piece is cut; shorter ones are taken several at a time.
    """
    sequences, tokens = x.shape[0], x.shape[1]
    rows = max(1, PIECE.get(x.device.type, PIECE_ELSEWHERE) // max(1, plan.num_features))
    together = max(1, rows // max(1, tokens))
    for first in range(0, max(1, sequences), together):
        some = slice(first, first + together)
        yield [(some, slice(start, start + rows)) for start in range(0, max(1, tokens), rows)]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
