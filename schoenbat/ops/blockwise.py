"""Attention of query, key and value through a feature map, a block of tokens at a time.

phi of all tokens is D / d times as large as query and key together. In blocks it exists for one of them only, also in
the backward pass, which then computes it once more.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from schoenbat.ops.linear import continue_causally, read, step, summarise

_BLOCK = 4096


def attend(
    features: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    block: int | None = None,
) -> Tensor:
    """phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1), in float32 or wider from phi on.

    Args:
        features: phi, [B, H, n, d] to [B, H, n, D], token by token.
        query, key, value: [B, H, N, d], [B, Hk, M, d], [B, Hk, M, v], scaled already; H is a multiple of Hk, and
            consecutive H / Hk query heads share a key head.
        key_mask: [B, M], True = attend, or None. What stands at masked places does not matter, be it NaN.
        is_causal: query i sees keys up to i; requires N = M.
        block: tokens whose features are held at a time. None takes all at once where a gradient is recorded (memory for
            time: about 0.7 of it) or torch.compile is at work, else blocks of 4,096. The transformations of torch.func
            know no recomputation, and need None.

    Returns:
        [B, H, N, v] in the dtype of `query`.
    """
    groups = query.shape[1] // key.shape[1]
    if block is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        block = _BLOCK
    with torch.autocast(query.device.type, enabled=False):
        if is_causal:
            return _causal(features, query, key, value, key_mask, block)
        # Queries of one group see the same keys: they are further queries of one head.
        grouped = query.unflatten(1, (-1, groups)).flatten(2, 3)
        state = None
        for start, stop in _blocks(key.shape[-2], block):
            mask = None if key_mask is None else key_mask[:, start:stop]
            added = _recomputed(block, summarise_keys, features, key[:, :, start:stop], value[:, :, start:stop], mask)
            state = added if state is None else state + added
        outputs = [
            _recomputed(block, _look_up, features, grouped[:, :, start:stop], state)
            for start, stop in _blocks(grouped.shape[-2], block)
        ]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return out.unflatten(2, (groups, query.shape[2])).flatten(1, 2)


def extend(
    features: Callable[[Tensor], Tensor],
    state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over further tokens, after those summed up in `state`.

    Args:
        state: [B, Hk, D, v + 1] as in `schoenbat.ops.linear`, or None for no token yet.
        features, query, key, value, key_mask: as for `attend`, with N = M.

    Returns:
        [B, H, N, v] in the dtype of `query`, and the new state.
    """
    groups = query.shape[1] // key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        query_features, key_features = _features(features, query), _features(features, key, key_mask)
        if query.shape[2] == key.shape[2] == 1:
            one_head = query_features.unflatten(1, (-1, groups)).squeeze(3)
            out, state = step(state, one_head, key_features, value, key_mask)
            return out.flatten(1, 2).unsqueeze(2).to(query.dtype), state
        if groups > 1:
            key_features, value = (x.repeat_interleave(groups, dim=1) for x in (key_features, value))
            state = None if state is None else state.repeat_interleave(groups, dim=1)
        out, state = continue_causally(state, query_features, key_features, value, key_mask)
        if groups > 1:
            state = state[:, ::groups].contiguous()
        return out.to(query.dtype), state


def centre_keys(key: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Keys [B, H, M, d] less their mean over the tokens that count.

    exp(<q, k>) = exp(<q, c>) exp(<q, k - c>), and the first factor is the same for all keys: no softmax changes, but an
    estimate of the second has less error, as keys that share a direction or a bias become shorter. Not for causal
    attention, in which c would tell a token of later ones.
    """
    if key_mask is None:
        return key - key.mean(-2, keepdim=True)
    counts = key_mask[:, None, :, None]
    total = key.masked_fill(~counts, 0.0).sum(-2, keepdim=True)
    return key - total / counts.sum(-2, keepdim=True).clamp_min(1)


def summarise_keys(
    features: Callable[[Tensor], Tensor], key: Tensor, value: Tensor, key_mask: Tensor | None = None
) -> Tensor:
    """The state after these tokens, [B, Hk, D, v + 1]; arguments as for `attend`."""
    with torch.autocast(key.device.type, enabled=False):
        return summarise(_features(features, key, key_mask), value, key_mask)


def _features(features: Callable[[Tensor], Tensor], x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """phi(x) computed in float32 or wider, of 0 at the places of [B, M] that are False."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, None, :, None], 0.0)
    return features(x)


def _causal(
    features: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    block: int | None,
) -> Tensor:
    state, outputs = None, []
    for start, stop in _blocks(value.shape[-2], block):
        mask = None if key_mask is None else key_mask[:, start:stop]
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        out, state = _recomputed(block, extend, features, state, q, k, v, mask)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _look_up(features: Callable[[Tensor], Tensor], query: Tensor, state: Tensor) -> Tensor:
    return read(_features(features, query), state).to(query.dtype)


def _blocks(length: int, block: int | None) -> list[tuple[int, int]]:
    """Where blocks begin and end; one empty block for no token."""
    size = length if block is None else block
    return [(start, min(start + size, length)) for start in range(0, max(length, 1), max(size, 1))]


def _recomputed(block: int | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), of which only the arguments are kept for the backward pass where there are blocks."""
    if block is None or not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
