"""Uniform attention: the control that shows how much of a result owes nothing to the weights."""

import torch
from torch import Tensor

from schoenbat.attention import Attention
from schoenbat.ops.reference import divide


class Mean(Attention):
    """The mean of the values that may be attended, the same for every query."""

    cost = "linear"
    paper = "V-Mean in arXiv 2112.05359"

    @classmethod
    def flops(cls, config: object, *, length: int, head_dim: int) -> float:
        return 2.0 * length * head_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        dtype = torch.promote_types(value.dtype, torch.float32)
        if key_mask is None:
            key_mask = torch.ones(value.shape[0], value.shape[2], dtype=torch.bool, device=value.device)
        weights = key_mask[:, None, :, None].to(dtype)
        weighted = value.to(dtype) * weights
        if is_causal:
            mean = divide(weighted.cumsum(-2), weights.cumsum(-2))
        else:
            mean = divide(weighted.sum(-2, keepdim=True), weights.sum(-2, keepdim=True)).expand_as(value)
        return mean.to(query.dtype)
