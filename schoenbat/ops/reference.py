"""Attention as its definition says, quadratic in length: the truth that everything else is compared with.

Shapes here and in the sister modules: B batch, H heads, N queries, M keys, D features, d width of a query or key,
v width of a value. `key_mask` is [B, M], True = attend.
"""

import torch
from torch import Tensor

from schoenbat.kernels import Kernel

SMALLEST_DENOMINATOR = 1e-6


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, where a denominator closer to 0 than 1e-6 is moved there with its sign.

    A row that attends to nothing has 0 / 0 and gives 0. For the kernels here a true denominator is at least
    f(-radius) > 0 per key, so the rule acts only on such rows and on estimates that are all noise.
    """
    return numerator / away_from_zero(denominator)


def away_from_zero(denominator: Tensor) -> Tensor:
    """The denominator that `divide` divides by."""
    return torch.where(
        denominator < 0, denominator.clamp_max(-SMALLEST_DENOMINATOR), denominator.clamp_min(SMALLEST_DENOMINATOR)
    )


def is_away_from_zero(moved: Tensor) -> Tensor:
    """Whether `away_from_zero` left it where it was."""
    return moved.abs() > SMALLEST_DENOMINATOR


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """sum_j f(<q_i, k_j>) v_j / sum_j f(<q_i, k_j>), over the keys j that may be attended.

    Args:
        query, key, value: [B, H, N, d], [B, H, M, d], [B, H, M, v]; the argument of f is their dot product as it is.
        is_causal: query i sees keys up to i; requires N = M.

    Returns:
        [B, H, N, v]; 0 for a query that may attend to nothing.
    """
    scores = query @ key.transpose(-1, -2)
    allowed = None
    if key_mask is not None:
        allowed = key_mask[:, None, None, :]
    if is_causal:
        _check_square(query, key)
        lower = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        allowed = lower if allowed is None else allowed & lower
    attended = kernel.normalise(scores, allowed) @ value
    return attended if allowed is None else attended * allowed.any(-1, keepdim=True)


def _check_square(query: Tensor, key: Tensor) -> None:
    if query.shape[-2] != key.shape[-2]:
        raise ValueError(f"causal attention needs as many queries as keys, got {query.shape[-2]} and {key.shape[-2]}")
