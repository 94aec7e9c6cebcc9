"""Exact attention of exp within chunks of a sequence, whose scores never leave the cache.

Powers of 2 stand for those of e: where weights underflow, as those of keys that are not seen, torch.exp takes 6 to 18
times as long on a CPU.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOWEST = -1e30
"""The score of a key that is not seen. Twice as much is still a float32, and half as much is below any other score."""
PIECE = {"cpu": 2**18}
"""Scores handled at a time. On a CPU, 1 MB in float32."""
PIECE_ELSEWHERE = 2**26


def near_of_exp(query: Tensor, key: Tensor, extended: Tensor, lower: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute exp(Q K^T - t) V over the keys that are seen, and t, each query's largest score, without a gradient.

    Args:
        query, key: [..., R, d] and [..., M, d], whose dot products are the scores.
        extended: V [..., M, v + 1]; its last column is 0 for keys that are not there.
        lower: bool [R, M], which keys a query sees; None for all.

    Returns:
        [..., R, v + 1] and [..., R, 1].
    """
    query = query / math.log(2)
    unseen = None
    if lower is not None:
        unseen = torch.zeros(lower.shape, dtype=query.dtype, device=query.device).masked_fill(~lower, LOWEST)
    if unseen is None or torch.compiler.is_compiling():
        absent = torch.where(extended[..., -1:] > 0, 0.0, LOWEST).mT
        scores = query @ key.mT + (absent if unseen is None else absent + unseen)
        top = _top(scores)
        return torch.exp2(scores - top) @ extended, top * math.log(2)
    shape = query.shape[:-2]
    products, top = _Near.apply(query.flatten(0, -3), key.flatten(0, -3), extended.flatten(0, -3), unseen)
    return products.unflatten(0, shape), (top * math.log(2)).unflatten(0, shape)


class _Near(torch.autograd.Function):
    """2^(Q K^T - t) V and t, for [G, R, d], [G, M, d], [G, M, v + 1] and what is added to scores [R, M]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, extended: Tensor, unseen: Tensor) -> tuple[Tensor, Tensor]:
        products, tops = [], []
        for i in _pieces(query, key):
            scores = _scores(query[i], key[i], extended[i], unseen)
            tops.append(_top(scores))
            products.append(scores.sub_(tops[-1]).exp2_() @ extended[i])
        return torch.cat(products), torch.cat(tops)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def jvp(
        ctx: Any, d_query: Tensor | None, d_key: Tensor | None, d_extended: Tensor | None, _: None
    ) -> tuple[Tensor, None]:
        query, key, extended, unseen, top = ctx.saved_tensors
        weights = (_scores(query, key, extended, unseen) - top).exp2()
        out = torch.zeros_like(extended[..., :1, :]) if d_extended is None else weights @ d_extended
        if d_query is not None:
            out = out + math.log(2) * (weights * (d_query @ key.mT)) @ extended
        if d_key is not None:
            out = out + math.log(2) * (weights * (query @ d_key.mT)) @ extended
        return out, None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, extended, unseen, top = ctx.saved_tensors
        grad_query, grad_key, grad_extended = [], [], []
        for i in _pieces(query, key):
            weights = _scores(query[i], key[i], extended[i], unseen).sub_(top[i]).exp2_()
            grad_scores = (math.log(2) * grad[i] @ extended[i].mT) * weights
            grad_query.append(grad_scores @ key[i])
            grad_key.append(grad_scores.mT @ query[i])
            grad_extended.append(weights.mT @ grad[i])
        return torch.cat(grad_query), torch.cat(grad_key), torch.cat(grad_extended), None


def _scores(query: Tensor, key: Tensor, extended: Tensor, unseen: Tensor) -> Tensor:
    """Compute Q K^T, with `LOWEST` added where a key is not seen and where it is not there."""
    absent = torch.where(extended[..., -1:] > 0, 0.0, LOWEST)
    query, key = F.pad(query, (0, 1), value=1.0), torch.cat([key, absent], -1)
    return torch.baddbmm(unseen.expand(len(query), -1, -1), query, key.mT)


def _top(scores: Tensor) -> Tensor:
    # What is not seen comes out as exp(LOWEST - top) = 0, also where nothing is.
    return scores.detach().amax(-1, keepdim=True).clamp_min(LOWEST / 2)


def _pieces(query: Tensor, key: Tensor) -> Iterator[slice]:
    size = max(1, query.shape[-2] * key.shape[-2])
    together = max(1, PIECE.get(query.device.type, PIECE_ELSEWHERE) // size)
    for first in range(0, max(1, len(query)), together):
        yield slice(first, first + together)
