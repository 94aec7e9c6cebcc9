r"""Sums over tokens through features that are products of projections, without ever holding many of the features.

Functions go through the tokens in pieces, so that the features of a piece stay in the cache, and make them anew in the
backward pass: what is kept is the size of the inputs. Few tokens are handled at once, and their features are kept.
Gradients are themselves made of differentiable operations.

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

from schoenbat.features.plan import Plan, Products, expand, pull_back, push_forward
from schoenbat.ops import native

PIECE_ROWS = {"cpu": 4096}
"""Rows of a piece. On a CPU, 128 features of a piece are 2 MB in float32."""
PIECE_ROWS_ELSEWHERE = 2**18
FEW_ROWS = 4096
"""Up to so many rows of queries and keys together are handled at once."""
DIRECT_ROWS = 1024
"""Up to so many rows whose features nobody needs again are looked up without a word to autograd."""


def sum_keys(key: Tensor, extended: Tensor, products: Products) -> Tensor:
    """Sum up keys [..., M, d] and [..., M, v] for queries to be looked up in: [..., D, v].

    That is W^2 psi(K)^T V for features phi = W psi: the weights W of the queries are in it too.
    """
    if torch.compiler.is_compiling():
        return expand(key @ products.projection, products.plan).mT @ extended * products.squares
    return _Sum.apply(key.flatten(0, -3), extended.flatten(0, -3), *products).unflatten(0, key.shape[:-2])


def look_up(query: Tensor, summed: Tensor, products: Products) -> Tensor:
    """Compute psi(Q) S: [..., N, d] and [..., D, v] to [..., N, v]."""
    is_compiling = torch.compiler.is_compiling()
    if is_compiling or (not torch.is_grad_enabled() and query.shape[:-1].numel() <= DIRECT_ROWS):
        return expand(query @ products.projection, products.plan) @ summed
    out = _LookUp.apply(query.flatten(0, -3), summed.flatten(0, -3), products.projection, products.plan)
    return out.unflatten(0, query.shape[:-2])


def attend_plainly(query: Tensor, key: Tensor, extended: Tensor, products: Products) -> Tensor:
    """Compute phi(Q) phi(K)^T V: [..., N, d], [..., M, d] and [..., M, v] to [..., N, v]."""
    # In torch.compile, a comparison of lengths would make the graph one for these lengths alone.
    is_torch = not (torch.compiler.is_compiling() or native.serves_plainly(query, key, extended))
    if is_torch and query.shape == key.shape and 2 * query.shape[:-1].numel() <= FEW_ROWS:
        return _AtOnce.apply(query, key, extended, *products)[0]
    return look_up(query, sum_keys(key, extended, products), products)


def attend_in_parts(parts: list[tuple[Tensor, Products]], key: Tensor, extended: Tensor) -> list[Tensor]:
    """Do what `attend_plainly` does for each part, with its own queries; one before the last has complete degrees."""
    *complete, (query, rest) = parts
    outputs = []
    for own, products in complete:
        if products.plan.runs:
            outputs.append(attend_plainly(own, key, extended, products))
            continue
        out = products.plan.constant**2 * extended.sum(-2, keepdim=True)
        if products.plan.num_linear:
            # All coordinates in an orthogonal basis: dot products themselves, times the square of its vectors' length.
            square = products.plan.linear_weight**2 * products.projection[:, 0].square().sum()
            out = own @ (key.mT @ extended * square) + out
        outputs.append(out.expand(*own.shape[:-1], -1))
    return [*outputs, attend_plainly(query, key, extended, rest)]


def look_up_in_parts(parts: list[tuple[Tensor, Products]], summed: Tensor) -> list[Tensor]:
    """Do what `look_up` does for each part of the products, with its own queries."""
    sums = summed.split([products.plan.num_features for _, products in parts], -2)
    return [look_up(query, own, products) for (query, products), own in zip(parts, sums, strict=True)]


def extend_value(value: Tensor) -> Tensor:
    """Append ones to V: numerators and denominators come out of the same products."""
    return torch.nn.functional.pad(value, (0, 1), value=1.0)


class _AtOnce(torch.autograd.Function):
    """As many queries as keys, stacked, with the features of both kept for the backward pass.

    Outputs after the first are what the backward pass needs. The last two, projected rows and features, carry no
    gradient, so a backward pass that is itself differentiated makes them anew.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, extended: Tensor, projection: Tensor, squares: Tensor, plan: Plan
    ) -> tuple[Tensor, ...]:
        projected = torch.stack([query, key]) @ projection
        features = expand(projected, plan)
        summed = features[1].mT @ extended * squares
        return features[0] @ summed, summed, projected, features

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.save_for_forward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[2:])
        # As set_materialize_grads, which torch.compile does not know: no zeros the size of the features.
        ctx.materialize_grads = False

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        query, key, extended, projection, squares, summed, projected, features = ctx.saved_tensors
        d_query, d_key, d_extended = (
            torch.zeros_like(x) if d is None else d for x, d in zip((query, key, extended), tangents[:3], strict=True)
        )
        d_features = push_forward(projected, ctx.plan, torch.stack([d_query, d_key]) @ projection)
        d_summed = (d_features[1].mT @ extended + features[1].mT @ d_extended) * squares
        return d_features[0] @ summed + features[0] @ d_summed, d_summed, None, None

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_summed: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, extended, projection, squares, summed, projected, features = ctx.saved_tensors
        if torch.is_grad_enabled():
            projected = torch.stack([query, key]) @ projection
            features = expand(projected, ctx.plan)
        grad = torch.zeros_like(features[0] @ summed) if grad is None else grad
        own = features[0].mT @ grad
        grad_summed = (own if grad_summed is None else own + grad_summed) * squares
        grad_features = torch.stack([grad, extended]) @ torch.stack([summed, grad_summed]).mT
        grad_query, grad_key = pull_back(projected, ctx.plan, grad_features) @ projection.T
        return grad_query, grad_key, features[1] @ grad_summed, None, None, None


class _InPieces(torch.autograd.Function):
    """A function of tensors and a plan, of which only these are kept."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


class _Sum(_InPieces):
    """W^2 psi(K)^T V: [G, M, d], [G, M, v] to [G, D, v]."""

    @staticmethod
    def forward(key: Tensor, value: Tensor, projection: Tensor, squares: Tensor, plan: Plan) -> Tensor:
        if native.serves_plainly(key, value):
            return native.sum_keys(key, value, projection, plan)
        parts = []
        for group in _pieces(key):
            parts.append(total_of([expand(key[i] @ projection, plan).mT @ value[i] for i in group]) * squares)
        return _joined(parts, 0)

    @staticmethod
    def jvp(ctx: Any, d_key: Tensor | None, d_value: Tensor | None, *_: Any) -> Tensor:
        key, value, projection, squares = ctx.saved_tensors
        projected = key @ projection
        terms = []
        if d_key is not None:
            terms.append(push_forward(projected, ctx.plan, d_key @ projection).mT @ value)
        if d_value is not None:
            terms.append(expand(projected, ctx.plan).mT @ d_value)
        return total_of(terms) * squares

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        key, value, projection, squares = ctx.saved_tensors
        if not torch.is_grad_enabled() and native.serves_plainly(grad, key, value):
            return *native.sum_keys_backward(grad, key, value, projection, ctx.plan), None, None, None
        grad = grad * squares
        grad_key, grad_value = [], []
        for group in _pieces(key):
            keys, values = [], []
            for i in group:
                projected = key[i] @ projection
                keys.append(pull_back(projected, ctx.plan, value[i] @ grad[i[0]].mT) @ projection.T)
                values.append(expand(projected, ctx.plan) @ grad[i[0]])
            grad_key.append(_joined(keys, 1))
            grad_value.append(_joined(values, 1))
        return _joined(grad_key, 0), _joined(grad_value, 0), None, None, None


class _LookUp(_InPieces):
    """psi(Q) S: [G, N, d], [G, D, v] to [G, N, v]."""

    @staticmethod
    def forward(query: Tensor, summed: Tensor, projection: Tensor, plan: Plan) -> Tensor:
        if native.serves_plainly(query, summed):
            return native.look_up(query, summed, projection, plan)
        parts = []
        for group in _pieces(query):
            parts.append(_joined([expand(query[i] @ projection, plan) @ summed[i[0]] for i in group], 1))
        return _joined(parts, 0)

    @staticmethod
    def jvp(ctx: Any, d_query: Tensor | None, d_summed: Tensor | None, *_: Any) -> Tensor:
        query, summed, projection = ctx.saved_tensors
        projected = query @ projection
        terms = []
        if d_query is not None:
            terms.append(push_forward(projected, ctx.plan, d_query @ projection) @ summed)
        if d_summed is not None:
            terms.append(expand(projected, ctx.plan) @ d_summed)
        return total_of(terms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, summed, projection = ctx.saved_tensors
        if not torch.is_grad_enabled() and native.serves_plainly(grad, query, summed):
            return *native.look_up_backward(grad, query, summed, projection, ctx.plan), None, None
        grad_query, grad_summed = [], []
        for group in _pieces(query):
            queries, sums = [], []
            for i in group:
                projected = query[i] @ projection
                queries.append(pull_back(projected, ctx.plan, grad[i] @ summed[i[0]].mT) @ projection.T)
                sums.append(expand(projected, ctx.plan).mT @ grad[i])
            grad_query.append(_joined(queries, 1))
            grad_summed.append(total_of(sums))
        return _joined(grad_query, 0), _joined(grad_summed, 0), None, None


def _pieces(x: Tensor) -> Iterator[list[tuple[slice, slice]]]:
    """Yield where the pieces of [G, N, n] lie: for some of the G sequences at a time, the slices of their tokens.

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


def total_of(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
