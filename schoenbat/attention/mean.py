"""Uniform attention, the control."""

import torch
from torch import Tensor

from schoenbat.attention import Attention, sums_bytes
from schoenbat.ops.reference import fill_masked


class Mean(Attention):
    """The mean of the values that may be attended, the same for every query."""

    cost = "linear"
    paper = "V-Mean in arXiv 2112.05359"

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        return sums_bytes(0, head_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        ones = torch.ones_like(wide[..., :1])
        if is_causal:
            mean = fill_masked(wide, key_mask).cumsum(-2) / fill_masked(ones, key_mask).cumsum(-2).clamp_min(1)
        else:
            count = fill_masked(ones, key_mask).sum(-2, keepdim=True).clamp_min(1)
            mean = (fill_masked(wide, key_mask).sum(-2, keepdim=True) / count).expand(*query.shape[:-1], -1)
        return mean.to(query.dtype)
