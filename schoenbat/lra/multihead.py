"""Projections around an attention mechanism, with or without SchoenbAt's normalisation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from schoenbat.attention import Attention, KernelAttention
from schoenbat.norm import PostSBN, pre_sbn

FORMERS = ("maclauformer", "transformer")


@dataclass(frozen=True)
class FormerConfig:
    """Options of a former; all belong to maclauformer.

    Attributes:
        power: post-SBN gets its exponent.
        gain: the argument of the kernel, cos(q, k) / sqrt(head_dim), is multiplied by this. An extension of the paper,
            in which pre-SBN confines the argument to a small interval where every kernel is nearly constant.
        temperature: that factor is learned, one per head, and is `gain` at first.
    """

    power: bool = False
    gain: float = 1.0
    temperature: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.gain < math.inf:
            raise ValueError(f"gain must be positive, not {self.gain:g}")


def largest_gain(attention: Attention, head_dim: int) -> float:
    """Return the factor at which unit vectors reach 0.99 of the radius of convergence of the kernel, if it has one."""
    radius = attention.kernel.radius if isinstance(attention, KernelAttention) else math.inf
    return 0.99 * radius * math.sqrt(head_dim)


class Temperature(nn.Module):
    """Queries times a learned positive factor per head: [B, num_heads, N, head_dim] to the same.

    The factor is `start` at first. For unit vectors the argument of a kernel with a finite radius of convergence stays
    below 0.99 of the radius.
    """

    def __init__(self, num_heads: int, head_dim: int, attention: Attention, start: float = 1.0) -> None:
        super().__init__()
        self.largest = largest_gain(attention, head_dim)
        assert start < self.largest
        logit = math.log(start) if math.isinf(self.largest) else -math.log(self.largest / start - 1)
        self.logit = nn.Parameter(torch.full((num_heads, 1, 1), logit))

    def forward(self, query: Tensor) -> Tensor:
        bounded = not math.isinf(self.largest)
        factor = self.largest * torch.sigmoid(self.logit) if bounded else torch.exp(self.logit)
        return query * factor.to(query.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention: [B, N, width] to the same.

    `former` maclauformer puts pre-SBN on query and key and post-SBN on the output of the mechanism; transformer does
    not. Where it is `causal`, a token attends to itself and earlier ones.

    Raises:
        ValueError: a gain or temperature beyond the radius of convergence of the kernel.
    """

    def __init__(
        self,
        attention: Attention,
        *,
        width: int,
        num_heads: int,
        former: str,
        config: FormerConfig,
        causal: bool = False,
    ) -> None:
        super().__init__()
        assert former in FORMERS
        assert width % num_heads == 0
        self.num_heads = num_heads
        self.causal = causal
        self.normalised = former == "maclauformer"
        self.attention = attention
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        head_dim = width // num_heads
        self.post_sbn = PostSBN(num_heads, head_dim, power=config.power) if self.normalised else nn.Identity()
        if config.gain >= largest_gain(attention, head_dim) and (config.temperature or config.gain != 1):
            raise ValueError(
                f"gain {config.gain:g} must stay below {largest_gain(attention, head_dim):.3g}, 0.99 of the kernel's "
                f"radius at head_dim {head_dim}"
            )
        if isinstance(attention, KernelAttention):
            attention.gets_units = self.normalised and config.gain <= 1 and not config.temperature
        self.gain = config.gain
        self.temperature = Temperature(num_heads, head_dim, attention, config.gain) if config.temperature else None

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        query, key, value = self.project_in(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.normalised:
            query, key = pre_sbn(query), pre_sbn(key)
        if self.temperature is not None:
            query = self.temperature(query)
        elif self.gain != 1:
            query = query * self.gain
        # Sums over thousands of tokens need the range and precision of float32, whatever the autocast dtype is.
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            attended = self.attention(query.to(wide), key.to(wide), value.to(wide), key_mask, self.causal)
            attended = self.post_sbn(attended).to(value.dtype)
        return self.project_out(attended.transpose(1, 2).flatten(-2))
