"""Attention as its definition says, quadratic in length: the truth that everything else is compared with.

Shapes here and in the sister modules: B batch, H heads, N queries, M keys, D features, d width of a query or key,
v width of a value. `key_mask` is [B, M], True = attend.

A kernel that takes both signs (`Kernel.is_signed`), such as x or sinh, makes the quotient ill-posed: its denominator
passes zero. One that is closer to 0 than `least_sum` is moved there with its sign, and what is added to it goes to the
mean value. Any other quotient is the formula, with a negative sum as a negative sum.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from schoenbat.errors import UserError
from schoenbat.kernels import Kernel

SMALLEST = 1e-6
"""Denominators closer to 0 than this part of what all keys together could weigh are moved there."""
SMALLEST_SHARE = 1e-3
"""For a kernel of both signs, the least denominator as a part of what arguments of one sign would give."""

HUGE = 1e6
"""More than any number of a query that means something."""


class AttentionInputs(NamedTuple):
    """The inputs of attention, in the order in which `schoenbat.ops.linear.attend` takes them.

    Attributes:
        query, key, value: [B, H, N, d], [B, Hk, M, d], [B, Hk, M, v]; consecutive H / Hk query heads share a key head.
        key_mask: bool [B, M], True = attend; None for all.
        is_causal: query i sees keys up to i; requires N = M.
        scale: the factor of dot products, not negative.
        self_attention: the queries are the tokens of the keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None = None
    is_causal: bool = False
    scale: float = 1.0
    self_attention: bool = False


def split(products: Tensor) -> tuple[Tensor, Tensor]:
    """Split [..., v + 1] into numerators and denominators [..., 1]; the gradient is put together in one pass."""
    numerator, denominator = products.split((products.shape[-1] - 1, 1), -1)
    return numerator, denominator


def divide(numerator: Tensor, denominator: Tensor, smallest: float = SMALLEST) -> Tensor:
    """Divide, where a denominator closer to 0 than `smallest` is moved there with its sign.

    A row that attends to nothing has 0 / 0 and gives 0.
    """
    return numerator / away_from_zero(denominator, smallest)


def away_from_zero(denominator: Tensor, smallest: float | Tensor) -> Tensor:
    """Move a denominator that is closer to 0 than `smallest` there, with its sign."""
    return torch.where(denominator < 0, denominator.clamp_max(-smallest), denominator.clamp_min(smallest))


def least_sum(kernel: Kernel, mean_square: Tensor) -> Tensor:
    """Return how far from 0 the mean weight of keys is kept, by the mean square of their arguments.

    It is a part of f, over its magnitude, at their root mean square, for a kernel of both signs, and 0 for others.
    """
    if not kernel.is_signed:
        return torch.zeros_like(mean_square)
    return SMALLEST_SHARE * kernel.relative(mean_square.clamp_min(torch.finfo(mean_square.dtype).tiny).sqrt())


def keep_from_zero(kernel: Kernel, denominator: Tensor, least: Tensor) -> Tensor:
    """Keep an estimated denominator at least `least`; that of a kernel of both signs so far from 0, with its sign."""
    return away_from_zero(denominator, least) if kernel.is_signed else torch.maximum(denominator, least)


def normalise(kernel: Kernel, scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Divide f(scores) where `allowed`, else 0, by its sum along the last axis.

    What `scores` holds where it is not allowed, NaN and infinity included, changes no bit of the result. Weights of any
    size are normalised alike, and always sum to 1; where all are 0 they come out uniform, and a row in which nothing is
    allowed comes out finite and means nothing.

    Args:
        kernel: f.
        scores: [..., M], below the radius of f in absolute value wherever allowed.
        allowed: bool, broadcastable to `scores`, or None for everywhere.
    """
    if kernel.is_exponential:
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1)
    if allowed is None:
        count: int | Tensor = scores.shape[-1]
        weights = kernel.relative(scores)
    else:
        # 0 lies inside every radius of convergence, so f is evaluated only where it is defined.
        scores, count = scores.masked_fill(~allowed, 0.0), allowed.sum(-1, keepdim=True).clamp_min(1)
        weights = kernel.relative(scores).masked_fill(~allowed, 0.0)
    total = weights.sum(-1, keepdim=True)
    kept = total
    if kernel.is_signed:
        kept = away_from_zero(total, count * least_sum(kernel, scores.square().sum(-1, keepdim=True) / count))
    kept = torch.where(kept == 0, 1.0, kept)
    weights = (weights / kept + (1 - total / kept) / count).to(scores.dtype)
    return weights if allowed is None else weights.masked_fill(~allowed, 0.0)


def fill_masked(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Fill x [B, H, M, n] with 0 wherever the mask is False: not by a product, so that NaN there does not matter."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0.0)


def tame_masked(query: Tensor, key_mask: Tensor | None) -> Tensor:
    """Fill numbers that are not finite, or above `HUGE`, in queries [B, H, N, d] where the mask of M = N keys is False.

    Where queries are the tokens of the keys, nobody looks at these outputs, but a NaN in one would make the gradients
    of all keys NaN. Where they are other tokens, all other numbers stay as they are.
    """
    if key_mask is None or key_mask.shape[-1] != query.shape[-2]:
        return query
    return query.masked_fill(~key_mask[:, None, :, None] & ~(query.abs() < HUGE), 0.0)


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Compute sum_j f(<q_i, k_j>) v_j / sum_j f(<q_i, k_j>), over the keys j that may be attended.

    Args:
        query, key, value: [B, H, N, d], [B, H, M, d], [B, H, M, v]; the argument of f is their dot product as it is.
        is_causal: query i sees keys up to i; requires N = M.

    Returns:
        [B, H, N, v]; 0 for a query that may attend to nothing.
    """
    key, value = fill_masked(key, key_mask), fill_masked(value, key_mask)
    scores = query @ key.transpose(-1, -2)
    allowed = None
    if key_mask is not None:
        allowed = key_mask[:, None, None, :]
    if is_causal:
        check_square(query, key)
        lower = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        allowed = lower if allowed is None else allowed & lower
    attended = normalise(kernel, scores, allowed) @ value
    return attended if allowed is None else attended.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


def check_square(query: Tensor, key: Tensor) -> None:
    """Raise UserError unless there are as many queries as keys."""
    if query.shape[-2] != key.shape[-2]:
        raise UserError(f"causal attention needs as many queries as keys, got {query.shape[-2]} and {key.shape[-2]}")
