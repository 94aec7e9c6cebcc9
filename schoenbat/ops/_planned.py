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

from schoenbat.features.plan import Plan, expand, pull_back, push_forward
from schoenbat.ops.reference import away_from_zero, is_away_from_zero

PIECE_ROWS = {"cpu": 4096}
"""Rows of a piece. On a CPU, 128 features of a piece are 2 MB in float32."""
PIECE_ROWS_ELSEWHERE = 2**18
FEW_ROWS = 4096
"""Up to so many rows of queries and keys together are handled at once."""


def sum_keys(key: Tensor, extended: Tensor, projection: Tensor, plan: Plan) -> Tensor:
    """phi(K)^T V: [..., M, d] and [..., M, v] to [..., D, v]."""
    if torch.compiler.is_compiling():
        return expand(key @ projection, plan).mT @ extended
    out = _Sum.apply(key.flatten(0, -3), extended.flatten(0, -3), projection, plan)
    return out.unflatten(0, key.shape[:-2])


def look_up(query: Tensor, summed: Tensor, projection: Tensor, plan: Plan) -> Tensor:
    """phi(Q) S: [..., N, d] and [..., D, v] to [..., N, v]."""
    if torch.compiler.is_compiling():
        return expand(query @ projection, plan) @ summed
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

    Outputs after the first are what the backward pass needs. The last two, projected rows and features, carry no
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
        projected = torch.stack([query, key]) @ projection
        features = expand(projected, plan)
        summed = features[1].mT @ extend_value(value, key_weight)
        products = features[0] @ summed
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
        d_features = push_forward(projected, ctx.plan, torch.stack([d_query, d_key]) @ projection)
        if key_weight is None:
            d_extended = torch.nn.functional.pad(d_value, (0, 1))
        else:
            d_weight = torch.zeros_like(key_weight) if tangents[3] is None else tangents[3]
            d_extended = torch.cat([d_value * key_weight + value * d_weight, d_weight], -1)
        d_summed = d_features[1].mT @ extend_value(value, key_weight) + features[1].mT @ d_extended
        d_products = d_features[0] @ summed + features[0] @ d_summed
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
            projected = torch.stack([query, key]) @ projection
            features = expand(projected, ctx.plan)
        below = grad_denominator - (grad * attended).sum(-1, keepdim=True) / denominator
        grad_products = torch.cat([grad / denominator, below * is_away_from_zero(denominator, ctx.smallest)], -1)
        grad_summed = grad_summed + features[0].mT @ grad_products
        rows = torch.stack([grad_products, extend_value(value, key_weight)])
        grad_features = rows @ torch.stack([summed, grad_summed]).mT
        grad_query, grad_key = pull_back(projected, ctx.plan, grad_features) @ projection.T
        grad_extended = features[1] @ grad_summed
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
        for group in _pieces(key):
            parts.append(_total([expand(key[i] @ projection, plan).mT @ value[i] for i in group]))
        return _joined(parts, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, d_key: Tensor | None, d_value: Tensor | None, *_: Any) -> Tensor:
        key, value, projection = ctx.saved_tensors
        projected = key @ projection
        terms = []
        if d_key is not None:
            terms.append(push_forward(projected, ctx.plan, d_key @ projection).mT @ value)
        if d_value is not None:
            terms.append(expand(projected, ctx.plan).mT @ d_value)
        return _total(terms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        key, value, projection = ctx.saved_tensors
        grad_key, grad_value = [], []
        for group in _pieces(key):
            keys, values = [], []
            for i in group:
                projected = key[i] @ projection
                keys.append(pull_back(projected, ctx.plan, value[i] @ grad[i[0]].mT) @ projection.T)
                values.append(expand(projected, ctx.plan) @ grad[i[0]])
            grad_key.append(_joined(keys, 1))
            grad_value.append(_joined(values, 1))
        return _joined(grad_key, 0), _joined(grad_value, 0), None, None


class _LookUp(torch.autograd.Function):
    """phi(Q) S: [G, N, d], [G, D, v] to [G, N, v]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, summed: Tensor, projection: Tensor, plan: Plan) -> Tensor:
        parts = []
        for group in _pieces(query):
            parts.append(_joined([expand(query[i] @ projection, plan) @ summed[i[0]] for i in group], 1))
        return _joined(parts, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, d_query: Tensor | None, d_summed: Tensor | None, *_: Any) -> Tensor:
        query, summed, projection = ctx.saved_tensors
        projected = query @ projection
        terms = []
        if d_query is not None:
            terms.append(push_forward(projected, ctx.plan, d_query @ projection) @ summed)
        if d_summed is not None:
            terms.append(expand(projected, ctx.plan) @ d_summed)
        return _total(terms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, summed, projection = ctx.saved_tensors
        grad_query, grad_summed = [], []
        for group in _pieces(query):
            queries, sums = [], []
            for i in group:
                projected = query[i] @ projection
                queries.append(pull_back(projected, ctx.plan, grad[i] @ summed[i[0]].mT) @ projection.T)
                sums.append(expand(projected, ctx.plan).mT @ grad[i])
            grad_query.append(_joined(queries, 1))
            grad_summed.append(_total(sums))
        return _joined(grad_query, 0), _joined(grad_summed, 0), None, None


def _pieces(x: Tensor) -> Iterator[list[tuple[slice, slice]]]:
    """Where the pieces of [G, N, n] lie: for some of the G sequences at a time, the slices of their tokens.

    A sequence that is longer than a piece is cut; shorter ones are taken several at a time.
    """
    sequences, tokens = x.shape[0], x.shape[1]
    rows = PIECE_ROWS.get(x.device.type, PIECE_ROWS_ELSEWHERE)
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
