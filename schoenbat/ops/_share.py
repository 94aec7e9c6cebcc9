"""The share of exact attention that an estimate explains, on some queries (see `schoenbat.diagnosis`)."""

from typing import NamedTuple

import torch
from torch import Tensor

from schoenbat.kernels import Kernel
from schoenbat.ops.reference import AttentionInputs, fill_masked, normalise

POOR = 0.5
_QUERIES = 64
"""Queries, spread over the sequence, on which outputs are compared: fewer where all scores were more than _SCORES."""
_SCORES = 2**24


class PoorEstimateWarning(UserWarning):
    """A drop-in explains less than half of the attention that it stands for."""


class Exact(NamedTuple):
    """Exact attention and uniform attention of some queries, to compare an output with.

    Attributes:
        truth, uniform: outputs [B, H, n, v].
        scores: the kernel's arguments [B, H, n, M], 0 where a query may not attend.
        allowed: bool [B, 1, n, M], where it may; nowhere for a query that is padding.
        rows: [n], which queries.
    """

    truth: Tensor
    uniform: Tensor
    scores: Tensor
    allowed: Tensor
    rows: Tensor

    def share_explained(self, out: Tensor, dim: tuple[int, ...], keepdim: bool = False) -> list[float]:
        """Compute the share that `out` [B, H, N, v] of all queries explains, over the dimensions `dim`."""
        seen = self.allowed.any(-1, keepdim=True)
        error = out[:, :, self.rows].to(self.truth.dtype) - self.truth
        # What a query that sees nothing has for an output means nothing.
        error, distance, size = (
            x.masked_fill(~seen, 0.0).square().sum(dim, keepdim) for x in (error, self.truth - self.uniform, self.truth)
        )
        # Attention that is uniform is explained by anything.
        share = 1 - error / distance.clamp_min(torch.finfo(distance.dtype).tiny)
        return torch.where(error <= 1e-10 * size, 1.0, share).flatten().tolist()


def compare_exactly(kernel: Kernel, inputs: AttentionInputs) -> Exact:
    """Compute exact attention of some queries."""
    query, key, value, key_mask, is_causal, scale, self_attention = inputs
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    k, v = (fill_masked(x.to(wide), key_mask).repeat_interleave(groups, 1) for x in (key, value))
    length, keys = query.shape[2], key.shape[2]
    number = min(_QUERIES, max(8, _SCORES // max(1, query.shape[0] * query.shape[1] * keys)), length)
    rows = torch.linspace(0, length - 1, number, device=query.device).long()
    allowed = torch.ones(len(rows), keys, dtype=torch.bool, device=query.device)
    if is_causal:
        allowed = torch.arange(keys, device=query.device) <= rows[:, None]
    allowed = allowed.expand(query.shape[0], 1, len(rows), keys)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
        if self_attention or is_causal:
            allowed = allowed & key_mask[:, None, rows, None]
    scores = scale * (query[:, :, rows].to(wide) @ k.mT).masked_fill(~allowed, 0.0)
    counts = allowed.sum(-1, keepdim=True).clamp_min(1)
    return Exact(normalise(kernel, scores, allowed) @ v, allowed.to(wide) @ v / counts, scores, allowed, rows)
