r"""Features that are products of projections, and linear attention through them that never holds many of them.

A plan says which products. A projected row is z_0, z_1, ..., and goes on cyclically, as far as any run reaches. Its
first coordinates are the linear features. A run with the offsets (0, s, ...) and length n is the n features

    weight * z_i z_{i+s} ...,    i = 0 .. n - 1,

so all of them together are a product of a few contiguous slices.

`product_attention` goes through the tokens in chunks, once for the keys and once for the queries, and makes the
features of a chunk anew in the backward pass: what is kept is the size of the inputs, and a chunk stays in the cache.
Few tokens are handled at once, and keep their features. Gradients are themselves made of differentiable operations.
Shapes as in `schoenbat.ops.reference`.

What bounds few tokens, for 512 tokens, 2 heads of 32 dimensions and 128 features, forward and backward, in float32: six
products of features with [V, 1] or a gradient are 52 MFLOP, four projections 9 MFLOP. Two Zen 4 cores multiply large
matrices at 199 GFLOP/s: 0.31 ms. Inputs, outputs and gradients are 1 MB, at the 36 GB/s of memory 0.03 ms; the 78
operations read and write 26 MB, all in the cache, where two cores copy at 140 GB/s: 0.19 ms. So these operations take
at least 0.5 ms; exact attention, 235 MFLOP, at least 1.2 ms. Measured are 1.6 ms to its 2.1 ms: two thirds go into
calls and waking the second thread, so fewer and larger operations help most.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from schoenbat.ops.reference import away_from_zero, divide, is_away_from_zero

CHUNK_ROWS = {"cpu": 4096}
"""Rows (tokens times heads times batch) of a chunk. On a CPU, 128 features of a chunk are 2 MB in float32."""
CHUNK_ROWS_ELSEWHERE = 2**18
FEW_ROWS = 4096
"""Up to so many rows of queries and keys together are handled at once."""


class Run(NamedTuple):
    """`length` products of as many coordinates as there are offsets."""

    offsets: tuple[int, ...]
    length: int
    weight: float


class Plan(NamedTuple):
    """The features in order: the constant (0 for none), the linear ones, the runs."""

    constant: float
    num_linear: int
    runs: tuple[Run, ...]


def expand(projected: Tensor, plan: Plan) -> Tensor:
    """The features [..., D] of projected rows [..., P]."""
    parts = [projected.new_full((*projected.shape[:-1], 1), plan.constant)] if plan.constant else []
    if plan.num_linear:
        parts.append(projected[..., : plan.num_linear])
    for run in plan.runs:
        product = _product(_factors(projected, run))
        parts.append(product if run.weight == 1 else product * run.weight)
    return torch.cat(parts, -1)


def pull_back(projected: Tensor, plan: Plan, grad: Tensor) -> Tensor:
    """The gradient [..., P] of the projected rows, from `grad` [..., D] of their features."""
    column = 1 if plan.constant else 0
    linear = grad[..., column : column + plan.num_linear]
    column += plan.num_linear
    # Under vmap, what is added to in place must have all batch dimensions from the start, and every term of a run has.
    out = None
    for run in plan.runs:
        factors = _factors(projected, run)
        own = grad[..., column : column + run.length]
        own = own if run.weight == 1 else own * run.weight
        for i, offset in enumerate(run.offsets):
            others = _product(factors[:i] + factors[i + 1 :])
            if out is None:
                out = F.pad(own * others, (0, projected.shape[-1] - run.length))
            else:
                out.narrow(-1, offset, run.length).add_(own * others)
        column += run.length
    if out is None:
        return F.pad(linear, (0, projected.shape[-1] - plan.num_linear))
    out.narrow(-1, 0, plan.num_linear).add_(linear)
    return out


def product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    plan: Plan,
    key_weight: Tensor | None,
) -> Tensor:
    """phi(Q) (phi(K)^T W V) / (phi(Q) phi(K)^T W 1), every query to every key.

    Args:
        query, key, value: [B, H, N, d], [B, H, M, d], [B, H, M, v].
        projection: [d, P], without a gradient.
        key_weight: the diagonal of W, broadcastable to [B, H, M, 1], or None for ones; 0 leaves a key out.
    """
    projection = projection.to(query.dtype)
    if key_weight is not None:
        key_weight = key_weight.expand(*value.shape[:-1], 1)
    if query.shape == key.shape and 2 * query.shape[:-1].numel() <= FEW_ROWS:
        return _AtOnce.apply(query, key, value, key_weight, projection, plan)[0]
    summed = _Sum.apply(key, _extended(value, key_weight), projection, plan)
    attended = _Apply.apply(query, summed, projection, plan)
    return divide(attended[..., :-1], attended[..., -1:])


class _AtOnce(torch.autograd.Function):
    """`product_attention` of as many queries as keys, stacked, with the features of both kept for the backward pass.

    Outputs after the first are what the backward pass needs. The last two, projected rows and features, carry no
    gradient, so a backward pass that is itself differentiated makes them anew.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, key_weight: Tensor | None, projection: Tensor, plan: Plan
    ) -> tuple[Tensor, ...]:
        projected = torch.stack([query, key]) @ projection
        features = expand(projected, plan)
        summed = features[1].mT @ _extended(value, key_weight)
        products = features[0] @ summed
        denominator = away_from_zero(products[..., -1:])
        return products[..., :-1] / denominator, denominator, summed, projected, features

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[3:])
        # As set_materialize_grads, which torch.compile does not know: no zeros the size of the features.
        ctx.materialize_grads = False

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
        grad_products = torch.cat([grad / denominator, below * is_away_from_zero(denominator)], -1)
        grad_summed = grad_summed + features[0].mT @ grad_products
        rows = torch.stack([grad_products, _extended(value, key_weight)])
        grad_features = rows @ torch.stack([summed, grad_summed]).mT
        grad_query, grad_key = pull_back(projected, ctx.plan, grad_features) @ projection.T
        grad_extended = features[1] @ grad_summed
        grad_value, grad_weight = grad_extended[..., :-1], None
        if ctx.needs_input_grad[3]:
            grad_weight = (grad_value * value).sum(-1, keepdim=True) + grad_extended[..., -1:]
        if key_weight is not None:
            grad_value = grad_value * key_weight
        return grad_query, grad_key, grad_value, grad_weight, None, None


class _Sum(torch.autograd.Function):
    """phi(K)^T V: [..., M, d], [..., M, v] to [..., D, v]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(key: Tensor, value: Tensor, projection: Tensor, plan: Plan) -> Tensor:
        parts = [expand(k @ projection, plan).transpose(-1, -2) @ v for k, v in _chunks(key, value)]
        return _total(parts)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        key, value, projection, plan = inputs
        ctx.save_for_backward(key, value, projection)
        ctx.plan = plan  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        key, value, projection = ctx.saved_tensors  # type: ignore[attr-defined]
        plan = ctx.plan  # type: ignore[attr-defined]
        grad_key, grad_value = [], []
        for k, v in _chunks(key, value):
            projected = k @ projection
            grad_key.append(pull_back(projected, plan, v @ grad.transpose(-1, -2)) @ projection.T)
            grad_value.append(expand(projected, plan) @ grad)
        return _joined(grad_key), _joined(grad_value), None, None


class _Apply(torch.autograd.Function):
    """phi(Q) S: [..., N, d], [..., D, v] to [..., N, v]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, summed: Tensor, projection: Tensor, plan: Plan) -> Tensor:
        return _joined([expand(q @ projection, plan) @ summed for (q,) in _chunks(query)])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, summed, projection, plan = inputs
        ctx.save_for_backward(query, summed, projection)
        ctx.plan = plan  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, summed, projection = ctx.saved_tensors  # type: ignore[attr-defined]
        plan = ctx.plan  # type: ignore[attr-defined]
        grad_query, grad_summed = [], []
        for q, g in _chunks(query, grad):
            projected = q @ projection
            grad_query.append(pull_back(projected, plan, g @ summed.transpose(-1, -2)) @ projection.T)
            grad_summed.append(expand(projected, plan).transpose(-1, -2) @ g)
        return _joined(grad_query), _total(grad_summed), None, None


def _extended(value: Tensor, weight: Tensor | None) -> Tensor:
    """W [V, 1]: numerators and denominators come out of the same products."""
    if weight is None:
        return F.pad(value, (0, 1), value=1.0)
    return torch.cat([value * weight, weight], -1)


def _factors(projected: Tensor, run: Run) -> list[Tensor]:
    return [projected[..., offset : offset + run.length] for offset in run.offsets]


def _product(factors: list[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the tokens of all tensors, at least one."""
    first = tensors[0]
    groups = max(1, first[..., 0, 0].numel()) if first.shape[-2] else 1
    size = max(64, CHUNK_ROWS.get(first.device.type, CHUNK_ROWS_ELSEWHERE) // groups)
    for start in range(0, max(1, first.shape[-2]), size):
        yield tuple(tensor[..., start : start + size, :] for tensor in tensors)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
