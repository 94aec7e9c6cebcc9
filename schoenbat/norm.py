"""The two normalisations around SchoenbAt's kernelised attention (ppSBN in arXiv 2505.12252)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pre_sbn(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Put each token's query or key on the unit sphere, per head.

    Over the last axis: subtract the mean and divide by the L2 norm; the standard deviation, by which the paper divides
    in between, cancels. A constant vector has no direction and becomes 0, and the length of a vector that is shorter
    than about `eps` goes to 0 with it.

    Args:
        x: [..., head_dim], any float dtype; computed in float32 or wider.
    """
    head_dim = x.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (F.layer_norm(wide, (head_dim,), eps=eps**2 / head_dim) * head_dim**-0.5).to(x.dtype)


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
