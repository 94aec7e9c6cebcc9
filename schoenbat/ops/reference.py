"""Attention as its definition says, quadratic in length: the truth that everything else is compared with.

Shapes here and in the sister modules: B batch, H heads, N queries, M keys, D features, d width of a query or key,
v width of a value. `key_mask` is [B, M], True = attend.

A kernel that takes both signs (`Kernel.is_signed`), such as x or sinh, makes the quotient ill-posed: its denominator
passes zero. There a denominator is kept above what the first two moments of the arguments give (`two_point_mean`), and
what is added to it goes to the mean value.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from schoenbat.errors import UserError
from schoenbat.kernels import Kernel

SMALLEST = 1e-6
"""Denominators closer to 0 than this part of what all keys together could weigh are moved there."""
SIGNED_FLOOR = 0.1
"""For a kernel of both signs, the least denominator as a part of what arguments of one sign would give."""


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


def away_from_zero(denominator: Tensor, smallest: float = SMALLEST) -> Tensor:
    """Return the denominator that `divide` divides by."""
    return torch.where(denominator < 0, denominator.clamp_max(-smallest), denominator.clamp_min(smallest))


def two_point_mean(kernel: Kernel, mean: Tensor, mean_square: Tensor) -> Tensor:
    r"""Average f over the two points r and -r that have this mean and mean square:

        f_even(r) + f_odd(r) mean / r,    r^2 the mean square.

    Its even part is at most that of any other arguments with these moments, as an even f with non-negative coefficients
    is convex in x^2 (Jensen); for f of degree 2 it is the mean of all. It has the sign of f; for a kernel of both signs
    it is raised to at least a tenth of f(r).
    """
    root = mean_square.clamp_min(torch.finfo(mean.dtype).tiny).sqrt()
    plus, minus = kernel(root), kernel(-root)
    # Rounding may put the mean outside of what the mean square allows.
    share = (mean / root).clamp(-1, 1)
    found = (plus * (1 + share) + minus * (1 - share)) / 2
    return torch.maximum(found, SIGNED_FLOOR * plus) if kernel.is_signed else found


def settle(products: Tensor, least: Tensor, mean: Tensor) -> Tensor:
    """Divide numerators by denominators, [..., N, v + 1] to [..., N, v], where none may be below `least`.

    What a denominator lacks is the weight of keys whose share is not known: it goes to the `mean` value.
    """
    numerator, denominator = split(products)
    lacking = (least - denominator).clamp_min(0)
    total = denominator + lacking
    return (numerator + lacking * mean) / torch.where(total > 0, total, 1.0)


def fill_masked(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Fill x [B, H, M, n] with 0 wherever the mask is False: not by a product, so that NaN there does not matter."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0.0)


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
    if kernel.is_signed:
        return _attend_signed(scores, value, kernel, allowed)
    attended = kernel.normalise(scores, allowed) @ value
    return attended if allowed is None else attended.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


def _attend_signed(scores: Tensor, value: Tensor, kernel: Kernel, allowed: Tensor | None) -> Tensor:
    kept = torch.ones_like(scores) if allowed is None else allowed.to(scores.dtype).expand(scores.shape)
    scores = scores * kept
    extended = torch.nn.functional.pad(value, (0, 1), value=1.0)
    total = kept.sum(-1, keepdim=True)
    count = total.clamp_min(1)
    mean, mean_square = scores.sum(-1, keepdim=True) / count, scores.square().sum(-1, keepdim=True) / count
    least = total * two_point_mean(kernel, mean, mean_square)
    return settle((kernel(scores) * kept) @ extended, least, kept @ value / count)


def check_square(query: Tensor, key: Tensor) -> None:
    """Raise UserError unless there are as many queries as keys."""
    if query.shape[-2] != key.shape[-2]:
        raise UserError(f"causal attention needs as many queries as keys, got {query.shape[-2]} and {key.shape[-2]}")
