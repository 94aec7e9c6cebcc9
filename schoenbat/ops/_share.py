"""The share of exact attention that an estimate explains, on some queries (see `schoenbat.diagnosis`)."""

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from schoenbat.kernels import Kernel
from schoenbat.ops.reference import fill_masked

if TYPE_CHECKING:
    from schoenbat.estimate import Estimate

POOR = 0.5
_QUERIES = 64
"""Queries, spread over the sequence, on which outputs are compared."""
_SEEN: set["Estimate"] = set()


class PoorEstimateWarning(UserWarning):
    """A drop-in explains less than half of the attention that it stands for."""


def warn_if_poor(
    estimate: "Estimate",
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    self_attention: bool,
) -> None:
    """Warn, once for each Estimate, if `out`, of its first batch, explains less than half of the attention."""
    if estimate in _SEEN:
        return
    _SEEN.add(estimate)
    with torch.no_grad():
        out, query, key, value = (x.detach() for x in (out, query, key, value))
        exact = compare_exactly(estimate.function, query, key, value, key_mask, is_causal, scale, self_attention)
        try:
            (share,) = exact.share_explained(out, dim=(0, 1, 2, 3), keepdim=True)
        except RuntimeError:
            # Under vmap tensors have no values to look at.
            return
    if share < POOR:
        warnings.warn(
            f"{estimate.num_features} features explain {share:.0%} of the attention of this batch; "
            "schoenbat.diagnose says what would. Switch this off by "
            "warnings.simplefilter('ignore', schoenbat.PoorEstimateWarning)",
            PoorEstimateWarning,
            stacklevel=4,
        )


class Exact(NamedTuple):
    """What is compared with: exact attention and uniform weights, of some queries.

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
        """By `out` [B, H, N, v] of all queries, over the dimensions `dim`."""
        seen = self.allowed.any(-1, keepdim=True)
        error = (out[:, :, self.rows].to(self.truth.dtype) - self.truth).masked_fill(~seen, 0.0)
        error, distance, size = (x.square().sum(dim, keepdim) for x in (error, self.truth - self.uniform, self.truth))
        # Attention that is uniform is explained by anything.
        share = 1 - error / distance.clamp_min(torch.finfo(distance.dtype).tiny)
        return torch.where(error <= 1e-10 * size, 1.0, share).flatten().tolist()


def compare_exactly(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    self_attention: bool,
) -> Exact:
    """Exact attention of some queries; arguments as `schoenbat.Estimate.prepare` leaves them."""
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    k, v = (fill_masked(x.to(wide), key_mask).repeat_interleave(groups, 1) for x in (key, value))
    length, keys = query.shape[2], key.shape[2]
    rows = torch.linspace(0, length - 1, min(_QUERIES, length), device=query.device).long()
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
    return Exact(kernel.normalise(scores, allowed) @ v, allowed.to(wide) @ v / counts, scores, allowed, rows)
