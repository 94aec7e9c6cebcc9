"""Projections around an attention mechanism, with or without SchoenbAt's normalisation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from schoenbat.attention import Attention
from schoenbat.norm import PostSBN, pre_sbn

FORMERS = ("maclauformer", "transformer")


@dataclass(frozen=True)
class FormerConfig:
    """Options of a former; `power` adds the exponent of post-SBN and belongs to maclauformer."""

    power: bool = False


class SelfAttention(nn.Module):
    """Multi-head self-attention: [B, N, width] to the same.

    `former` maclauformer puts pre-SBN on query and key and post-SBN on the output of the mechanism; transformer does
    not.
    """

    def __init__(self, attention: Attention, *, width: int, num_heads: int, former: str, config: FormerConfig) -> None:
        super().__init__()
        assert former in FORMERS
        assert width % num_heads == 0
        self.num_heads = num_heads
        self.normalised = former == "maclauformer"
        self.attention = attention
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.post_sbn = PostSBN(num_heads, width // num_heads, power=config.power) if self.normalised else nn.Identity()

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        query, key, value = self.project_in(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.normalised:
            query, key = pre_sbn(query), pre_sbn(key)
        # Sums over thousands of tokens need the range and precision of float32, whatever the autocast dtype is.
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            attended = self.attention(query.to(wide), key.to(wide), value.to(wide), key_mask)
            attended = self.post_sbn(attended).to(value.dtype)
        return self.project_out(attended.transpose(1, 2).flatten(-2))
