"""Attention through features as one compiled operation, for float32 on a CPU.

`schoenbat::attend` computes what `schoenbat.ops.linear.attend` does where it is not causal, and its gradients, from the
inputs alone: no features are kept. attention.cpp says how; `schoenbat.ops.native.build` how it is compiled.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from schoenbat.features.plan import FeatureMap, Plan, Run
from schoenbat.ops.native.build import is_compiled, load
from schoenbat.ops.reference import SMALLEST

_NO_SKETCH = 2**31 - 1
_LARGEST = 5
"""The place of the largest coordinate among the numbers of a plan."""
_VECTOR = 16
"""The most numbers that a row in C++ is padded to a multiple of."""


def serves(features: FeatureMap, query: Tensor, key: Tensor, value: Tensor, bounded: bool) -> bool:
    """Return whether the compiled form computes this; the torch form computes everything."""
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in (query, key, value)):
        return False
    if bounded and (not features.centres or features.sketched == 1):
        return False
    # torch.func's transforms of a gradient, and tangents, are for the torch form.
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting() and is_compiled()
    return all(unpack_dual(x).tangent is None for x in (query, key, value)) and is_compiled()


def attend(
    features: FeatureMap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    self_attention: bool,
    bounded: bool,
    in_torch: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Do what `schoenbat.ops.linear.attend` does, for tensors as they come.

    Args:
        in_torch: the torch form of it, for gradients that are to be differentiated themselves.
    """
    plan, shares = features.plan, features.shares
    degrees = range(max(shares) + 1)
    runs = [Run((0,), plan.num_linear, plan.linear_weight), *plan.runs]
    largest = features.largest_coordinate if features.near else math.inf
    # In the order of `Plan` in C++.
    whole = [features.centres, features.centres and self_attention, bounded, features.projection_bits.shape[1]]
    whole += [_NO_SKETCH if features.sketched is None else features.sketched, len(degrees), len(runs)]
    for run in runs:
        whole += [len(run.offsets), run.length, *run.offsets]
    numbers = [plan.constant, scale, SMALLEST * plan.unit, features.unexplained, features.reach, largest]
    numbers += [shares.get(degree, 0.0) for degree in degrees] + [run.weight for run in runs]
    given = (key_mask, features.projection(torch.float32), whole, numbers)
    is_kept = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if torch.compiler.is_compiling():
        return _attend(query, key, value, *given, is_kept)[0]
    if is_kept:
        return _Attend.apply(query, key, value, given, in_torch)
    return _forward(query, key, value, *given, is_kept)[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    projection: Tensor,
    plan: Sequence[int],
    numbers: Sequence[float],
    is_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output and, if it is kept for the gradient, what stands in `results`, `weights` and `Head` in C++.

    Args:
        query, key, value, key_mask: as for `schoenbat.ops.linear.attend`.
        projection, plan, numbers: the feature map.
    """
    outputs = _empty(query, key, value, key_mask, projection, plan, numbers, is_kept)
    tensors = [_with_rows(x) for x in (query, key, value)]
    call = ("schoenbat_forward", plan, numbers, projection)
    if not _call(*call, tensors, key_mask, outputs[:1], outputs[1:]):
        _call(*call, _clamp(tensors, numbers), key_mask, outputs[:1], outputs[1:])
    return outputs


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    projection: Tensor,
    results: Tensor,
    weights: Tensor,
    head: Tensor,
    plan: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    grads = _empty_like(grad, query, key, value)
    grad, *tensors = (_with_rows(x) for x in (grad, query, key, value))
    call, kept = ("schoenbat_backward", plan, numbers, projection), (results, weights, head)
    if not _call(*call, tensors, key_mask, (grad, *grads), kept):
        _call(*call, _clamp(tensors, numbers), key_mask, (grad, *grads), kept)
        for x, own in zip(tensors[:2], grads, strict=False):
            own.masked_fill_(x.abs() > numbers[_LARGEST], 0.0)
    return grads


def _call(
    name: str,
    plan: Sequence[int],
    numbers: Sequence[float],
    projection: Tensor,
    inputs: Sequence[Tensor],
    key_mask: Tensor | None,
    others: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> bool:
    """Return whether all coordinates were as small as features and moments need it; else what was computed is void."""
    library = load().library
    assert library is not None
    (batch, heads, length, width), (_, key_heads, keys, values) = inputs[0].shape, inputs[2].shape
    # In the order of `Call` in C++.
    sizes = [batch, key_heads, heads // key_heads, length, keys, width, values, torch.get_num_threads()]
    sizes += [stride for x in (*inputs, *others) for stride in x.stride()[:3]]
    arrays = (
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_int * len(plan))(*plan),
        (ctypes.c_float * len(numbers))(*numbers),
    )
    mask = None if key_mask is None else key_mask.contiguous()
    places = (None if x is None else x.data_ptr() for x in (projection, *inputs, mask, *others, *kept))
    return bool(getattr(library, name)(*arrays, *map(ctypes.c_void_p, places)))


def _clamp(tensors: Sequence[Tensor], numbers: Sequence[float]) -> list[Tensor]:
    """Clamp coordinates of queries and keys, as `schoenbat.ops.linear` does."""
    query, key, value = tensors
    largest = numbers[_LARGEST]
    return [query.clamp(-largest, largest), key.clamp(-largest, largest), value]


def _empty(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    projection: Tensor,
    plan: Sequence[int],
    numbers: Sequence[float],
    is_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, heads, length, width), (_, key_heads, keys, values) = query.shape, value.shape
    _, itself, _, _, _, _, num_runs, *runs = plan
    num_features = int(numbers[0] != 0)
    for _ in range(num_runs):
        degree, run, *runs = runs
        num_features, runs = num_features + run, runs[degree:]
    padded = -(-width // _VECTOR) * _VECTOR
    of_head = 2 + 2 * width + values + width * padded + num_features * (values + 1)
    return (
        query.new_empty(batch, heads, length, values),
        query.new_empty(batch, heads if is_kept else 0, length, values + 1),
        query.new_empty(batch, key_heads, keys if itself else 0),
        # Where vectors are shorter not all of it is written.
        query.new_zeros(batch, key_heads, of_head),
    )


def _empty_like(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Not of the strides of the inputs, which may lie on each other.
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _with_rows(x: Tensor) -> Tensor:
    """Make rows of numbers that lie one after another; other strides may be any."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Attend(torch.autograd.Function):
    """The operation where nothing is compiled; to call it directly takes less time than to look it up."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        given: tuple[Tensor | None, Tensor, list[int], list[float]],
        in_torch: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        out, *kept = _forward(query, key, value, *given, True)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.given, ctx.in_torch = given, in_torch
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, results, weights, head = ctx.saved_tensors
        if torch.is_grad_enabled():
            leaves = [x for x in (query, key, value) if x.requires_grad]
            found = iter(torch.autograd.grad(ctx.in_torch(query, key, value), leaves, grad, create_graph=True))
            return *(next(found) if x.requires_grad else None for x in (query, key, value)), None, None
        key_mask, projection, plan, numbers = ctx.given
        inputs = (query, key, value, key_mask, projection)
        return *_backward(grad, *inputs, results, weights, head, plan, numbers), None, None


def serves_plainly(*tensors: Tensor) -> bool:
    """Return whether `sum_keys` and `look_up` compute this, where no gradient is recorded."""
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in tensors):
        return False
    return not (torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()) and is_compiled()


def sum_keys(key: Tensor, value: Tensor, projection: Tensor, plan: Plan) -> Tensor:
    """Sum up W^2 psi(K)^T V: [G, M, d], [G, M, v] to [G, D, v]."""
    sums = key.new_empty(len(key), plan.num_features, value.shape[-1])
    _call_plainly("schoenbat_sum_keys", plan, projection, (key[:, :0], key, value), (), (sums,))
    return sums


def sum_keys_backward(
    grad: Tensor, key: Tensor, value: Tensor, projection: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Return the gradients of key and value."""
    grads = key.new_empty(key.shape), value.new_empty(value.shape)
    kept = (grad.contiguous(),)
    _call_plainly("schoenbat_sum_keys_backward", plan, projection, (key[:, :0], key, value), grads, kept)
    return grads


def look_up(query: Tensor, summed: Tensor, projection: Tensor, plan: Plan) -> Tensor:
    """Compute psi(Q) S: [G, N, d], [G, D, v] to [G, N, v]."""
    out = query.new_empty(*query.shape[:-1], summed.shape[-1])
    inputs = (query, query[:, :0], summed[:, :0])
    _call_plainly("schoenbat_look_up", plan, projection, inputs, (out,), (summed.contiguous(),))
    return out


def look_up_backward(
    grad: Tensor, query: Tensor, summed: Tensor, projection: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and summed."""
    grads = query.new_empty(query.shape), summed.new_empty(summed.shape)
    inputs, others = (query, query[:, :0], summed[:, :0]), (_with_rows(grad), grads[0])
    _call_plainly("schoenbat_look_up_backward", plan, projection, inputs, others, (summed.contiguous(), grads[1]))
    return grads


def _call_plainly(
    name: str,
    plan: Plan,
    projection: Tensor,
    inputs: Sequence[Tensor],
    others: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> None:
    """Call what works on vectors as they come; G stands for the batch, and there is one head."""
    runs = [Run((0,), plan.num_linear, plan.linear_weight), *plan.runs]
    whole = [0, 0, 0, projection.shape[1], _NO_SKETCH, 0, len(runs)]
    for run in runs:
        whole += [len(run.offsets), run.length, *run.offsets]
    numbers = [plan.constant, 1.0, 0.0, 0.0, 0.0, math.inf, *(run.weight for run in runs)]
    tensors = [_with_rows(x).unsqueeze(1) for x in inputs]
    _call(name, whole, numbers, projection.contiguous(), tensors, None, [x.unsqueeze(1) for x in others], kept)


_attend = torch.library.custom_op("schoenbat::attend", _forward, mutates_args=(), device_types="cpu")
_attend_backward = torch.library.custom_op("schoenbat::attend_backward", _backward, mutates_args=(), device_types="cpu")
_attend.register_fake(_empty)
_attend_backward.register_fake(_empty_like)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.plan, ctx.numbers, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _pull_back(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    return *_attend_backward(grad, *ctx.saved_tensors, ctx.plan, ctx.numbers), *(None,) * 5


_attend.register_autograd(_pull_back, setup_context=_keep)
_attend.register_autocast("cpu", torch.float32)


def _over_batch(operation: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Make the rule of vmap: the dimension that is mapped over becomes a part of the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        given = list(args)
        for place, (x, dim) in enumerate(zip(args, in_dims, strict=True)):
            # The projection alone has no batch.
            if isinstance(x, Tensor) and (dim is not None or x.ndim != 2 or x.dtype == torch.bool):
                given[place] = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                given[place] = given[place].flatten(0, 1)
        found = operation(*given)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0,) * len(found)

    return rule


_attend.register_vmap(_over_batch(_attend))
_attend_backward.register_vmap(_over_batch(_attend_backward))
