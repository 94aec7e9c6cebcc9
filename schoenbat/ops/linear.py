"""Attention through features, linear in length: phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1).

Shapes as in `schoenbat.ops.reference`. Both forms see the values with a column of ones appended, so that numerator
and denominator come out of the same products.
"""

from torch import Tensor
from torch.nn import functional as F

from schoenbat.ops.reference import divide


def linear_attention(query_features: Tensor, key_features: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Every query sees every key.

    Args:
        query_features, key_features: [B, H, N, D], [B, H, M, D].
        value: [B, H, M, v].
        key_mask: [B, M], True = attend, or None.
    """
    summed = key_features.transpose(-1, -2) @ _with_ones(value, key_mask)
    return _normalise(query_features @ summed)


def causal_linear_attention(
    query_features: Tensor, key_features: Tensor, value: Tensor, key_mask: Tensor | None, chunk: int = 128
) -> Tensor:
    """Query i sees keys up to i; N = M.

    Within a chunk the products are taken pairwise under a triangular mask; between chunks they go through the running
    sum of phi(k) v^T, one [D, v + 1] matrix per chunk. Memory is linear in N as long as `chunk` is about D.
    """
    length = value.shape[-2]
    if query_features.shape[-2] != length:
        raise ValueError(f"causal attention needs as many queries as keys, got {query_features.shape[-2]} and {length}")
    padding = -length % chunk
    extended = _with_ones(value, key_mask)
    q, k, v = (
        F.pad(x, (0, 0, 0, padding)).unflatten(-2, (-1, chunk)) for x in (query_features, key_features, extended)
    )
    sums = k.transpose(-1, -2) @ v
    before = sums.cumsum(-3) - sums
    inside = (q @ k.transpose(-1, -2)).tril()
    out = (q @ before + inside @ v).flatten(-3, -2)
    return _normalise(out[..., :length, :])


def _with_ones(value: Tensor, key_mask: Tensor | None) -> Tensor:
    extended = F.pad(value, (0, 1), value=1.0)
    if key_mask is not None:
        extended = extended * key_mask[:, None, :, None].to(value.dtype)
    return extended


def _normalise(extended: Tensor) -> Tensor:
    return divide(extended[..., :-1], extended[..., -1:])
