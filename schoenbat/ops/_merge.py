"""What lies near and what lies far put together: one quotient of two sums whose weights have factors of their own."""

from typing import Any

import torch
from torch import Tensor

from schoenbat.ops.reference import split


def merge(
    near: Tensor,
    top: Tensor,
    far: Tensor,
    level: Tensor,
    least: Tensor | None = None,
    kept: Tensor | None = None,
    average: Tensor | None = None,
) -> Tensor:
    """(e^t N + e^l F) over its last column, for N `near`, F `far`, t `top` and l `level`; 0 where that column is 0.

    With `least` no denominator of F is below it, and its numerators go towards those of the mean value, of the same
    denominator: (k n - k d a + d' a, d') stands for (n, d), with d' = max(d, least), k `kept` and a `average`.

    Args:
        near, far: [..., R, v + 1], the denominators last.
        top, level: [..., R, 1]; the former without a gradient.
        least, kept: [..., R, 1] and [..., 1, 1], the latter without a gradient.
        average: [..., 1, v].

    Returns:
        [..., R, v].
    """
    merged = _Merge.forward if torch.compiler.is_compiling() else _Merge.apply
    return merged(near, top, far, level, least, kept, average)


class _Merge(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        near: Tensor,
        top: Tensor,
        far: Tensor,
        level: Tensor,
        least: Tensor | None,
        kept: Tensor | None,
        average: Tensor | None,
    ) -> Tensor:
        own, other = _factors(top, level)
        rest, denominator = _settle(far, least, kept, average)
        numerator, total = split(near)
        total = own * total + other * denominator
        return torch.addcmul(own * numerator, other, rest) / torch.where(total > 0, total, 1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        near, top, far, level, least, kept, average, out = ctx.saved_tensors
        d_near, _, d_far, d_level, d_least, _, d_average = (
            torch.zeros_like(x) if d is None and x is not None else d
            for x, d in zip((near, top, far, level, least, kept, average), tangents, strict=True)
        )
        own, other = _factors(top, level)
        rest, denominator = _settle(far, least, kept, average)
        d_rest, d_denominator = split(d_far)
        if least is not None:
            found, d_found = far[..., -1:], d_denominator
            d_denominator = torch.where(found > least, d_found, d_least)
            d_rest = (
                kept * d_rest + average * (d_denominator - kept * d_found) + d_average * (denominator - kept * found)
            )
        total = own * near[..., -1:] + other * denominator
        d_total = own * d_near[..., -1:] + other * (d_denominator + d_level * denominator)
        d_numerator = own * d_near[..., :-1] + other * (d_rest + d_level * rest)
        return (d_numerator - out * d_total) / torch.where(total > 0, total, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        near, top, far, level, least, kept, average, out = ctx.saved_tensors
        own, other = _factors(top, level)
        rest, denominator = _settle(far, least, kept, average)
        total = own * near[..., -1:] + other * denominator
        grad = grad / torch.where(total > 0, total, 1.0)
        of_total = -(grad * out).sum(-1, keepdim=True)
        grad_near = own * torch.cat([grad, of_total], -1)
        grad, of_total = other * grad, other * of_total
        grad_level = (grad * rest).sum(-1, keepdim=True) + of_total * denominator
        if least is None:
            return grad_near, None, torch.cat([grad, of_total], -1), grad_level, None, None, None
        found = far[..., -1:]
        of_average = (grad * average).sum(-1, keepdim=True)
        of_denominator = of_total + of_average
        is_found = found > least
        grad_far = torch.cat([kept * grad, of_denominator * is_found - kept * of_average], -1)
        grad_average = (denominator - kept * found).mT @ grad
        return grad_near, None, grad_far, grad_level, of_denominator * ~is_found, None, grad_average


def _factors(top: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    highest = torch.maximum(top, level.detach())
    return torch.exp(top - highest), torch.exp(level - highest)


def _settle(far: Tensor, least: Tensor | None, kept: Tensor | None, average: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numerators and denominators of what lies far."""
    numerator, found = split(far)
    if least is None or kept is None or average is None:
        return numerator, found
    denominator = torch.maximum(found, least)
    return torch.addcmul(kept * numerator, denominator - kept * found, average), denominator
