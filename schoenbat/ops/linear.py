"""Attention through features, linear in length: phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1).

Shapes as in `schoenbat.ops.reference`. All forms see the values with a column of ones appended, so that numerator
and denominator come out of the same products; sums are taken in float32 or wider and the result has the dtype of
`value`. A denominator near zero follows the rule of `schoenbat.ops.reference.divide`.

The state of causal attention after some tokens is their sum of phi(k) [v, 1]^T, one tensor [B, H, D, v + 1] in float32
or wider, whatever their number; None stands for no token yet.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from schoenbat.ops.reference import divide

_GROUP = 32


def linear_attention(query_features: Tensor, key_features: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Every query sees every key.

    Args:
        query_features, key_features: [B, H, N, D], [B, H, M, D].
        value: [B, H, M, v].
        key_mask: [B, M], True = attend, or None.
    """
    return read(query_features, summarise(key_features, value, key_mask)).to(value.dtype)


def summarise(key_features: Tensor, value: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The state after these tokens: [B, H, M, D] and [B, H, M, v] to [B, H, D, v + 1]."""
    key_features, extended = _widen(key_features), _with_ones(value, key_mask)
    return key_features.transpose(-1, -2) @ extended


def read(query_features: Tensor, state: Tensor) -> Tensor:
    """What queries [B, H, N, D] get from the tokens summed up in `state`: [B, H, N, v], in the dtype of `state`."""
    return _normalise(_widen(query_features) @ state)


def causal_linear_attention(
    query_features: Tensor, key_features: Tensor, value: Tensor, key_mask: Tensor | None, chunk: int = 64
) -> Tensor:
    """Query i sees keys up to i; N = M.

    Within a chunk the products are taken pairwise under a triangular mask; between chunks they go through the running
    sum of phi(k) [v, 1]^T, one [D, v + 1] matrix per chunk. Memory is N (chunk + D (v + 1) / chunk) numbers on top of
    the features.
    """
    return continue_causally(None, query_features, key_features, value, key_mask, chunk)[0]


def continue_causally(
    state: Tensor | None,
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Causal attention over N further tokens, after those summed up in `state`: their outputs, and the new state."""
    length = value.shape[-2]
    if not query_features.shape[-2] == key_features.shape[-2] == length:
        raise ValueError(
            "causal attention needs as many queries as keys and values, got "
            f"{query_features.shape[-2]}, {key_features.shape[-2]} and {length}"
        )
    extended = _with_ones(value, key_mask)
    batch = extended.shape[:-2]
    if state is None:
        state = extended.new_zeros(*batch, key_features.shape[-1], extended.shape[-1])
    if length == 0:
        return value, state
    chunk = min(chunk, length)
    q, k, v = (_cut(x, chunk) for x in (_widen(query_features), _widen(key_features), extended))
    out, last, _, _ = _CausalSums.apply(q, k, v, state.flatten(0, -3))
    out = out.unflatten(0, (*batch, -1)).flatten(-3, -2)[..., :length, :]
    return _normalise(out).to(value.dtype), last.unflatten(0, batch)


def step(
    state: Tensor | None,
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One further token: [B, H, 1, D] twice and [B, H, 1, v] to its output [B, H, 1, v] and the new state.

    With grouped queries, `query_features` may hold all G queries of a key's group: [B, H, G, D] to [B, H, G, v].
    """
    if key_features.shape[-2] != 1:
        raise ValueError(f"a step takes one token, got {key_features.shape[-2]}")
    added = summarise(key_features, value, key_mask)
    state = added if state is None else state + added
    return read(query_features, state).to(value.dtype), state


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _with_ones(value: Tensor, key_mask: Tensor | None) -> Tensor:
    extended = F.pad(_widen(value), (0, 1), value=1.0)
    if key_mask is not None:
        # Filled, not multiplied: whatever stands at a masked place, NaN included, must not matter.
        extended = extended.masked_fill(~key_mask[:, None, :, None], 0.0)
    return extended


def _normalise(extended: Tensor) -> Tensor:
    return divide(extended[..., :-1], extended[..., -1:])


def _cut(x: Tensor, chunk: int) -> Tensor:
    """[B, H, N, n] to [B H chunks, chunk, n], padded by zeros."""
    padding = -x.shape[-2] % chunk
    padded = F.pad(x, (0, 0, 0, padding)) if padding else x
    return padded.unflatten(-2, (-1, chunk)).flatten(0, -3)


class _CausalSums(torch.autograd.Function):
    """The undivided sums of causal attention, in chunks.

    Composed from separate operations, the two uses of q and of k would each write a gradient of the size of the
    features and a third pass would add them; here the second product adds into the first.

    Args:
        q, k, v: [G chunks, C, D] twice and [G chunks, C, v], the chunks of a sequence one after another.
        state: [G, D, v].

    Returns:
        The sums [G chunks, C, v], the state after the last chunk, and what the backward pass takes up again: the state
        before each chunk [G chunks, D, v] and the products within each [G chunks, C, C].
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        before, last = _states(k, v, state)
        inside = torch.bmm(q, k.mT).tril()
        out = _add_product(torch.bmm(q, before), inside, v)
        return out, last, before, inside

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        _, _, before, inside = output
        ctx.mark_non_differentiable(before, inside)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, before, inside)

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad: Tensor | None, grad_last: Tensor | None, *unused: None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, state, before, inside = ctx.saved_tensors  # type: ignore[attr-defined]
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: what was kept must be a function of the inputs again.
            before, _ = _states(k, v, state)
            inside = torch.bmm(q, k.mT).tril()
        if grad is None:
            grad = torch.zeros_like(v)
        if grad_last is None:
            grad_last = torch.zeros_like(state)
        after, grad_state = _states(q, grad, grad_last, backwards=True)
        weights = torch.bmm(grad, v.mT).tril()
        grad_q = _add_product(torch.bmm(grad, before.mT), weights, k)
        grad_k = _add_product(torch.bmm(v, after.mT), weights.mT, q)
        grad_v = _add_product(torch.bmm(k, after), inside.mT, grad)
        return grad_q, grad_k, grad_v, grad_state

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int | None, ...], *inputs: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size: int = info.batch_size  # type: ignore[attr-defined]
        merged = [
            (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip(inputs, in_dims, strict=True)
        ]
        outputs = _CausalSums.apply(*merged)
        return tuple(x.unflatten(0, (size, -1)) for x in outputs), (0, 0, 0, 0)


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b, in place of x where no gradient is recorded: only then has torch no need of x again."""
    return torch.baddbmm(x, a, b) if torch.is_grad_enabled() else x.baddbmm_(a, b)


def _states(k: Tensor, v: Tensor, state: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """The states before each chunk [G chunks, D, v] and after all [G, D, v]; `backwards` begins at the last chunk."""
    sums = torch.bmm(k.mT, v)
    per_sequence = sums.unflatten(0, (len(state), -1)).flatten(-2)
    before = _exclusive_prefix_sums(per_sequence, backwards) + state.flatten(-2).unsqueeze(1)
    end = 0 if backwards else -1
    last = (before[:, end] + per_sequence[:, end]).view_as(state)
    return before.flatten(0, 1).view_as(sums), last


def _exclusive_prefix_sums(x: Tensor, backwards: bool) -> Tensor:
    """Along the second axis of [G, n, P], entry i is the sum of those before it, or after it if `backwards`.

    By products with a triangle of ones: a scan over such long rows waits for memory.
    """
    length = x.shape[1]
    size = min(length, _GROUP)
    triangle = torch.ones(size, size, dtype=x.dtype, device=x.device)
    triangle = triangle.triu(1) if backwards else triangle.tril(-1)
    if length <= _GROUP:
        return triangle @ x
    padding = -length % _GROUP
    grouped = (F.pad(x, (0, 0, 0, padding)) if padding else x).unflatten(1, (-1, _GROUP))
    others = _exclusive_prefix_sums(grouped.sum(2), backwards)
    return (triangle @ grouped + others.unsqueeze(2)).flatten(1, 2)[:, :length]
