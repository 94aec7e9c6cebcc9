"""cosFormer: positive products, re-weighted by the cosine of the distance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schoenbat.attention import Attention, check_positive, sums_bytes
from schoenbat.ops.linear import causal_linear_attention, linear_attention


class Cosformer(Attention):
    """Weights <relu(q_i), relu(k_j)> cos(pi (i - j) / (2 M)), normalised (arXiv 2202.08791, re-weighted similarity).

    By the cosine of a difference this is exact with the 2 head_dim features [relu(x) cos, relu(x) sin](pi i / (2 M)). M
    is `max_length` and not the length at hand, so that neither padding nor later tokens change a weight; published code
    takes the padded length. The smallest factor is cos of nearly pi / 2, at the distance M.

    A query without a positive entry, or one that shares none with any key, gets 0 and no gradient. Time n d^2 and
    memory n d of a head.
    """

    @dataclass(frozen=True)
    class Config:
        """The period of the re-weighting.

        Attributes:
            max_length: M, at least the longest sequence.
        """

        max_length: int = 4096

        def __post_init__(self) -> None:
            check_positive(max_length=self.max_length)

    ignores_key_order = False
    needs_max_length = True
    cost = "linear"
    paper = "Qin et al., ICLR 2022, arXiv 2202.08791"

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        return sums_bytes(2 * head_dim, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        attention = causal_linear_attention if is_causal else linear_attention
        return attention(self._features(q), self._features(k), v, key_mask)

    def _features(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[-2], dtype=torch.float64, device=x.device)
        angle = (positions * (math.pi / (2 * self.config.max_length))).to(x.dtype)[:, None]
        positive = x.relu()
        return torch.cat([positive * angle.cos(), positive * angle.sin()], -1)
