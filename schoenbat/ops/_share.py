"""The share of exact attention that an estimate explains, on some queries (see `schoenbat.diagnosis`)."""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from schoenbat.features.plan import FeatureMap
from schoenbat.ops.linear import attend
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    features: FeatureMap,
) -> None:
    """Warn, once for each Estimate, if the first batch shows that it explains less than half of the attention."""
    if estimate in _SEEN:
        return
    _SEEN.add(estimate)
    with torch.no_grad():
        query, key, value = query.detach(), key.detach(), fill_masked(value.detach(), key_mask)
        # A prepared query has been normalised.
        plain = replace(estimate, normalize=False)
        truth, uniform, _, rows, _ = compare_exactly(plain, query, key, value, key_mask, is_causal, scale)
        found = attend(features, query, key, value, key_mask, is_causal, scale)[:, :, rows]
        try:
            (share,) = share_explained(found, truth, uniform, dim=(0, 1, 2, 3), keepdim=True)
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


def compare_exactly(
    estimate: "Estimate",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of some queries: exact and uniform outputs, the kernel's arguments [B, H, n, M], which queries, what they see."""
    q, k, positive = estimate.prepare(query, key, scale, key_mask)
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    k, v = (fill_masked(x.to(wide), key_mask).repeat_interleave(groups, 1) for x in (k, value))
    length, keys = query.shape[2], key.shape[2]
    rows = torch.linspace(0, length - 1, min(_QUERIES, length), device=query.device).long()
    allowed = torch.ones(len(rows), keys, dtype=torch.bool, device=query.device)
    if is_causal:
        allowed = torch.arange(keys, device=query.device) <= rows[:, None]
    allowed = allowed.expand(query.shape[0], 1, len(rows), keys)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    scores = positive * (q[:, :, rows].to(wide) @ k.mT).masked_fill(~allowed, 0.0)
    truth = estimate.function.normalise(scores, allowed) @ v
    counts = allowed.sum(-1, keepdim=True).clamp_min(1)
    return truth, allowed.to(wide) @ v / counts, scores, rows, allowed


def share_explained(
    found: Tensor, truth: Tensor, uniform: Tensor, dim: tuple[int, ...], keepdim: bool = False
) -> list[float]:
    error = (found.to(truth.dtype) - truth).square().sum(dim, keepdim)
    distance = (truth - uniform).square().sum(dim, keepdim)
    # Attention that is uniform is explained by anything.
    share = 1 - error / distance.clamp_min(torch.finfo(truth.dtype).tiny)
    return torch.where(error <= 1e-10 * truth.square().sum(dim, keepdim), 1.0, share).flatten().tolist()
