"""Softmax attention to the tokens nearby."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from schoenbat.attention import Attention, kept_bytes
from schoenbat.ops.places import masked_softmax


class Window(Attention):
    """softmax(q k^T / sqrt(head_dim)) v over |i - j| <= window / 2; causal over 0 <= i - j <= window.

    That is the sliding window of arXiv 2004.05150, Sec. 3.1, without global tokens, which have projections of their own
    there. Tokens are taken in blocks of half a window (a whole one if causal), each with its neighbours. Distances
    count masked tokens.

    Time n w d and memory n w of a head.
    """

    @dataclass(frozen=True)
    class Config:
        """The reach.

        Attributes:
            window: keys within half of this to each side; in causal attention, so many before.
        """

        window: int = 128

        def __post_init__(self) -> None:
            if self.window < 2 or self.window % 2:
                raise ValueError(f"window must be even and at least 2, half of it to each side, not {self.window}")

    sees_every_key = False
    ignores_key_order = False
    has_cross_form = False
    cost = "linear"
    paper = "Beltagy et al. (Longformer), arXiv 2004.05150"

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        return kept_bytes(min(length, self.config.window + 1), head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        length, width = q.shape[-2:]
        reach = self.config.window if is_causal else self.config.window // 2
        blocks = 2 if is_causal else 3
        end = -length % reach
        after = end if is_causal else end + reach

        def surrounding(x: Tensor) -> Tensor:
            """Gather each block with its neighbours: [..., N, e] to [..., N / reach, blocks * reach, e]."""
            padded = F.pad(x, (0, 0, reach, after))
            return padded.unfold(-2, blocks * reach, reach).mT

        q = F.pad(q, (0, 0, 0, end)).unflatten(-2, (-1, reach)) * width**-0.5
        there = torch.ones(1, length, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
        distance = torch.arange(blocks * reach, device=q.device) - reach - torch.arange(reach, device=q.device)[:, None]
        near = (distance <= 0) & (distance >= -reach) if is_causal else distance.abs() <= reach
        allowed = near & surrounding(there[:, None, :, None]).mT
        weights = masked_softmax(q @ surrounding(k).mT, allowed)
        return (weights @ surrounding(v)).flatten(-3, -2)[..., :length, :]
