"""The two normalisations around SchoenbAt's kernelised attention (ppSBN in arXiv 2505.12252)."""

import torch
from torch import Tensor, nn


def pre_sbn(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Put each token's query or key on the unit sphere, per head.

    Over the last axis: subtract the mean, divide by sqrt(biased variance + eps), divide by the L2 norm. A constant
    vector has no direction and becomes 0.

    Args:
        x: [..., head_dim], any float dtype; computed in float32 or wider.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    # Dividing by the standard deviation first is a no-op for the direction, except that it fixes the scale at
    # which eps acts: below sqrt(eps) the length goes to 0 instead of amplifying rounding errors.
    scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    squared_norm = scaled.square().sum(-1, keepdim=True)
    return (scaled * torch.rsqrt(squared_norm.clamp_min(eps))).to(x.dtype)


class PostSBN(nn.Module):
    """gamma * x on the attention output, or sign(gamma x) |gamma x|^beta with `power`.

    gamma is learned, one per feature of each head, 1 at first; beta likewise. The power is kept finite in value and
    gradient at 0 by shifting it: sign(y) ((|y| + eps)^beta - eps^beta).

    Shape: [B, num_heads, N, head_dim] to the same.
    """

    def __init__(self, num_heads: int, head_dim: int, *, power: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(num_heads, 1, head_dim))
        self.beta = nn.Parameter(torch.ones(num_heads, 1, head_dim)) if power else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * x
        if self.beta is None:
            return y
        return torch.sign(y) * ((y.abs() + self.eps) ** self.beta - self.eps**self.beta)
