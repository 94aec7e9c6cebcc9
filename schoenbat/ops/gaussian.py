"""The Gaussian kernel of width 1 between rows."""

from torch import Tensor


def gaussian_exponent(x: Tensor, y: Tensor) -> Tensor:
    """Compute -|x_i - y_j|^2 / 2, [..., n, d] and [..., m, d] to [..., n, m], at most 0 despite rounding."""
    lengths = x.square().sum(-1, keepdim=True) / 2 + y.square().sum(-1, keepdim=True).mT / 2
    return (x @ y.mT - lengths).clamp_max(0.0)
