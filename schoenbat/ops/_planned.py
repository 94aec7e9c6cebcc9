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
from schoenbat.ops.reference import away_from_zero

PIECE_ROWS = {"cpu": 4096}
"""Rows of a piece. On a CPU, 128 features of a piece are 2 MB in float32."""
PIECE_ROWS_ELSEWHERE = 2**18
FEW_ROWS = 4096
"""Up to so many rows of queries and keys together are handled at once."""

Least = Tensor | float


def sum_keys(key: Tensor, extended: Tensor, products: Products) -> Tensor:
    """What queries are looked up in, of keys [..., M, d] and [..., M, v]: [..., D, v].

    That is W^2 psi(K)^T V for features phi = W psi: the weights W of the queries are in it too.
    """
    if torch.compiler.is_compiling():
        return expand(key @ products.projection, products.plan).mT @ extended * products.squares
    return _Sum.apply(key.flatten(0, -3), extended.flatten(0, -3), *products).unflatten(0, key.shape[:-2])


def look_up(query: Tensor, summed: Tensor, products: Products, factor: Tensor | None = None) -> Tensor:
    """psi(F Q) S: [..., N, d] and [..., D, v] to [..., N, v]; the diagonal of F is `factor` [..., N, 1]."""
    return _look_up(query, summed, products, factor, None, None)


def quotient(
    query: Tensor,
    key: Tensor,
    extended: Tensor,
    products: Products,
    least: Least,
    factor: Tensor | None = None,
    excess: Tensor | None = None,
) -> Tensor:
    """phi(F Q) phi(K)^T V over phi(F Q) phi(K)^T w, for the columns [V, w] of `extended`; [..., N, v].

    Args:
        query, key, extended: [..., N, d], [..., M, d], [..., M, v + 1].
        least: a denominator closer to 0 is moved there with its sign; or [..., N, 1] that are not negative, below which
            no denominator may be.
        factor: the diagonal of F, [..., N, 1]; None for ones.
        excess: [..., N, 1], by how much denominators are too large, where `least` is a tensor.
    """
    few = query.shape == key.shape and 2 * query.shape[:-1].numel() <= FEW_ROWS
    if few and not torch.compiler.is_compiling():
        return _AtOnce.apply(query, key, extended, factor, excess, least, *products)[0]
    return _look_up(query, sum_keys(key, extended, products), products, factor, excess, least)


def extend_value(value: Tensor) -> Tensor:
    """[V, 1]: numerators and denominators come out of the same products."""
    return torch.nn.functional.pad(value, (0, 1), value=1.0)


def _look_up(
    query: Tensor,
    summed: Tensor,
    products: Products,
    factor: Tensor | None,
    excess: Tensor | None,
    least: Least | None,
) -> Tensor:
    if torch.compiler.is_compiling():
        out = expand(_scaled(query, factor) @ products.projection, products.plan) @ summed
        return out if least is None else _divide(out, excess, least)[0]
    of_rows = (x.flatten(0, -3) if isinstance(x, Tensor) else x for x in (factor, excess, least))
    out = _LookUp.apply(query.flatten(0, -3), summed.flatten(0, -3), *of_rows, products.projection, products.plan)[0]
    return out.unflatten(0, query.shape[:-2])


class _AtOnce(torch.autograd.Function):
    """`quotient` of as many queries as keys, stacked, with the features of both kept for the backward pass.

    Outputs after the first are what the backward pass needs. The last two, projected rows and features, carry no
    gradient, so a backward pass that is itself differentiated makes them anew.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        extended: Tensor,
        factor: Tensor | None,
        excess: Tensor | None,
        least: Least,
        projection: Tensor,
        squares: Tensor,
        plan: Plan,
    ) -> tuple[Tensor, ...]:
        projected = torch.stack([_scaled(query, factor), key]) @ projection
        features = expand(projected, plan)
        summed = features[1].mT @ extended * squares
        return *_divide(features[0] @ summed, excess, least), summed, projected, features

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.plan = inputs
        _save(ctx, tensors, 5, output)
        ctx.mark_non_differentiable(*output[3:])
        # As set_materialize_grads, which torch.compile does not know: no zeros the size of the features.
        ctx.materialize_grads = False

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        query, key, extended, factor, _, least, projection, squares, *output, projected, features = _saved(ctx)
        attended, denominator, summed = output
        d_query, d_key, d_extended, d_factor, d_excess, d_least = tangents[:6]
        d_rows = torch.stack(
            [_d_scaled(query, factor, d_query, d_factor), torch.zeros_like(key) if d_key is None else d_key]
        )
        d_features = push_forward(projected, ctx.plan, d_rows @ projection)
        d_summed = d_features[1].mT @ extended
        d_summed = (d_summed if d_extended is None else d_summed + features[1].mT @ d_extended) * squares
        d_products = d_features[0] @ summed + features[0] @ d_summed
        return *_d_divide(d_products, attended, denominator, least, d_excess, d_least), d_summed, None, None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, extended, factor, excess, least, projection, squares, *output, projected, features = _saved(ctx)
        attended, denominator, summed = output
        if torch.is_grad_enabled():
            projected = torch.stack([_scaled(query, factor), key]) @ projection
            features = expand(projected, ctx.plan)
        grad_products, *of_rows = _grad_of_divide(grad, grads[0], attended, denominator, excess, least)
        grad_summed = features[0].mT @ grad_products
        grad_summed = (grad_summed if grads[1] is None else grad_summed + grads[1]) * squares
        grad_features = torch.stack([grad_products, extended]) @ torch.stack([summed, grad_summed]).mT
        grad_query, grad_key = pull_back(projected, ctx.plan, grad_features) @ projection.T
        grad_factor = None if factor is None else (grad_query * query).sum(-1, keepdim=True)
        grad_extended = features[1] @ grad_summed
        return _scaled(grad_query, factor), grad_key, grad_extended, grad_factor, *of_rows, None, None, None


class _Sum(torch.autograd.Function):
    """W^2 psi(K)^T V: [G, M, d], [G, M, v] to [G, D, v]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(key: Tensor, value: Tensor, projection: Tensor, squares: Tensor, plan: Plan) -> Tensor:
        parts = []
        for group in _pieces(key):
            parts.append(_total([expand(key[i] @ projection, plan).mT @ value[i] for i in group]) * squares)
        return _joined(parts, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, d_key: Tensor | None, d_value: Tensor | None, *_: Any) -> Tensor:
        key, value, projection, squares = ctx.saved_tensors
        projected = key @ projection
        terms = []
        if d_key is not None:
            terms.append(push_forward(projected, ctx.plan, d_key @ projection).mT @ value)
        if d_value is not None:
            terms.append(expand(projected, ctx.plan).mT @ d_value)
        return _total(terms) * squares

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        key, value, projection, squares = ctx.saved_tensors
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


class _LookUp(torch.autograd.Function):
    """psi(F Q) S: [G, N, d], [G, D, v], and F by its diagonal [G, N, 1] or None for ones, to [G, N, v].

    With `least` the quotient of its columns and the last, and a second output, the denominators.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        summed: Tensor,
        factor: Tensor | None,
        excess: Tensor | None,
        least: Least | None,
        projection: Tensor,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        parts, denominators = [], []
        for group in _pieces(query):
            outputs, divisors = [], []
            for i in group:
                out = expand(_scaled(query[i], _piece(factor, i)) @ projection, plan) @ summed[i[0]]
                if least is not None:
                    out, divisor = _divide(out, _piece(excess, i), _piece(least, i))
                    divisors.append(divisor)
                outputs.append(out)
            parts.append(_joined(outputs, 1))
            denominators.append(_joined(divisors, 1) if divisors else query.new_empty(0))
        return _joined(parts, 0), _joined(denominators, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.plan = inputs
        _save(ctx, tensors, 4, output)
        ctx.materialize_grads = False

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor | None]:
        query, summed, factor, _, least, projection, attended, denominator = _saved(ctx)
        d_query, d_summed, d_factor, d_excess, d_least = tangents[:5]
        projected = _scaled(query, factor) @ projection
        d_rows = _d_scaled(query, factor, d_query, d_factor)
        d_out = push_forward(projected, ctx.plan, d_rows @ projection) @ summed
        if d_summed is not None:
            d_out = d_out + expand(projected, ctx.plan) @ d_summed
        if least is None:
            return d_out, None
        return _d_divide(d_out, attended, denominator, least, d_excess, d_least)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_denominator: Tensor | None) -> tuple[Tensor | None, ...]:
        query, summed, factor, excess, least, projection, attended, denominator = _saved(ctx)
        of_rows: tuple[Tensor | None, ...] = (None, None)
        if least is not None:
            grad, *of_rows = _grad_of_divide(grad, grad_denominator, attended, denominator, excess, least)
        assert grad is not None
        grad_query, grad_summed, grad_factor = [], [], []
        for group in _pieces(query):
            queries, sums, factors = [], [], []
            for i in group:
                own = _piece(factor, i)
                projected = _scaled(query[i], own) @ projection
                grad_scaled = pull_back(projected, ctx.plan, grad[i] @ summed[i[0]].mT) @ projection.T
                queries.append(_scaled(grad_scaled, own))
                sums.append(expand(projected, ctx.plan).mT @ grad[i])
                if factor is not None:
                    factors.append((grad_scaled * query[i]).sum(-1, keepdim=True))
            grad_query.append(_joined(queries, 1))
            grad_summed.append(_total(sums))
            grad_factor += [_joined(factors, 1)] if factors else []
        of_factor = _joined(grad_factor, 0) if grad_factor else None
        return _joined(grad_query, 0), _joined(grad_summed, 0), of_factor, *of_rows, None, None


def _save(ctx: Any, tensors: list[Any], place_of_least: int, output: tuple[Tensor, ...]) -> None:
    """Keep inputs and outputs, for `_saved`; the input at the place may be a number."""
    ctx.place, ctx.least = place_of_least, tensors[place_of_least]
    if isinstance(ctx.least, Tensor):
        ctx.least = None
    elif ctx.least is not None:
        tensors = [*tensors[:place_of_least], None, *tensors[place_of_least + 1 :]]
    ctx.save_for_backward(*tensors, *output)
    ctx.save_for_forward(*tensors, *output)


def _saved(ctx: Any) -> list[Any]:
    saved = list(ctx.saved_tensors)
    if ctx.least is not None:
        saved[ctx.place] = ctx.least
    return saved


def _divide(products: Tensor, excess: Tensor | None, least: Least) -> tuple[Tensor, Tensor]:
    """Quotients and what was divided by, as `quotient` says."""
    numerator, denominator = products[..., :-1], products[..., -1:]
    if isinstance(least, Tensor):
        denominator = torch.maximum(denominator if excess is None else denominator - excess, least)
        # Where no key is there, all is 0.
        denominator = torch.where(denominator > 0, denominator, 1.0)
    else:
        denominator = away_from_zero(denominator, least)
    return numerator / denominator, denominator


def _d_divide(
    d_products: Tensor,
    attended: Tensor,
    denominator: Tensor,
    least: Least,
    d_excess: Tensor | None,
    d_least: Tensor | None,
) -> tuple[Tensor, Tensor]:
    found = d_products[..., -1:] if d_excess is None else d_products[..., -1:] - d_excess
    moved = torch.zeros_like(found) if d_least is None else d_least
    d_denominator = torch.where(denominator.abs() > least, found, moved)
    return (d_products[..., :-1] - attended * d_denominator) / denominator, d_denominator


def _grad_of_divide(
    grad: Tensor | None,
    grad_denominator: Tensor | None,
    attended: Tensor,
    denominator: Tensor,
    excess: Tensor | None,
    least: Least,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of `_divide`."""
    grad = (torch.zeros_like(attended) if grad is None else grad) / denominator
    below = -(grad * attended).sum(-1, keepdim=True)
    below = below if grad_denominator is None else below + grad_denominator
    found = below * (denominator.abs() > least)
    grad_least = below - found if isinstance(least, Tensor) else None
    return torch.cat([grad, found], -1), None if excess is None else -found, grad_least


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _d_scaled(x: Tensor, factor: Tensor | None, d_x: Tensor | None, d_factor: Tensor | None) -> Tensor:
    out = torch.zeros_like(x) if d_x is None else _scaled(d_x, factor)
    return out if d_factor is None else out + x * d_factor


def _piece(x: Any, piece: tuple[slice, slice]) -> Any:
    return x[piece] if isinstance(x, Tensor) else x


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
