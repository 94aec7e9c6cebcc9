"""BigBird: softmax attention to neighbouring, global and random blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from schoenbat.attention import Attention, check_positive
from schoenbat.kernels import Kernel
from schoenbat.ops.places import draw_seed, hashed_uniform, masked_softmax, real_tokens


class Bigbird(Attention):
    """softmax(q k^T / sqrt(head_dim)) v over a set of blocks for each block of queries.

    Source: arXiv 2007.14062, Sec. 2, App. D. Block i attends to the blocks i - 1, i, i + 1, to the global ones, which
    are the first and the last with a real token, and to r others, uniform over the blocks not yet in the set. Tokens of
    global blocks attend to everything. Each block counts once: published code may name one several times, which
    multiplies its weight, and draws random ones from a part of the sequence only. The random blocks are those of the
    layer, for all heads and examples, as far as the blocks are there. Padding stands at the end.

    Time n s (5 + r) d + n s d and memory n (s (5 + r) + d) of a head, plus (n / s)^2 for choosing blocks.
    """

    @dataclass(frozen=True)
    class Config:
        """Sizes of the blocks that a query attends to.

        Attributes:
            block_size: tokens of a block.
            num_random_blocks: r, beside the two neighbours and the two global ones.
        """

        block_size: int = 64
        num_random_blocks: int = 3

        def __post_init__(self) -> None:
            check_positive(block_size=self.block_size)
            if self.num_random_blocks < 0:
                raise ValueError(f"num_random_blocks must not be negative, not {self.num_random_blocks}")

    sees_every_key = False
    ignores_key_order = False
    has_causal_form = False
    has_cross_form = False
    is_random = True
    cost = "linear"
    paper = "Zaheer et al., NeurIPS 2020, arXiv 2007.14062"
    seed: Tensor

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        self.register_buffer("seed", draw_seed(generator))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        length, width = q.shape[-2:]
        size = self.config.block_size
        end = -length % size
        q, k, v = (F.pad(x, (0, 0, 0, end)).unflatten(-2, (-1, size)) for x in (q * width**-0.5, k, v))
        there = F.pad(real_tokens(key_mask, q.flatten(-3, -2)[..., :length, :]), (0, end)).unflatten(-1, (-1, size))
        chosen, used = self.blocks(there.any(-1))
        allowed = there.gather(1, chosen.flatten(1)[..., None].expand(-1, -1, size)).unflatten(1, chosen.shape[1:])
        allowed = (allowed & used[..., None]).flatten(-2)[:, None, :, None]
        weights = masked_softmax(q @ _take(k, chosen).mT, allowed)
        out = weights @ _take(v, chosen)

        index = torch.arange(q.shape[2], device=q.device)
        last = (index * there.any(-1)).amax(-1)
        ends = torch.stack([torch.zeros_like(last), last], -1)[..., None]
        everything = masked_softmax(
            _take(q, ends) @ k.flatten(-3, -2)[:, :, None].mT, there.flatten(1)[:, None, None, None]
        )
        seen = everything @ v.flatten(-3, -2)[:, :, None]
        out = torch.where((index == 0)[:, None, None], seen[:, :, :1], out)
        out = torch.where((index == last[:, None])[:, None, :, None, None], seen[:, :, 1:], out)
        return out.flatten(-3, -2)[..., :length, :]

    def blocks(self, filled: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the blocks that each block attends to.

        Args:
            filled: bool [B, n], the blocks with a real token.

        Returns:
            Indices [B, n, 5 + r], and bool of the same shape: False for what is not there or stands before already.
        """
        index = torch.arange(filled.shape[-1], device=filled.device)
        row, column = index[:, None], index[None]
        last = (index * filled).amax(-1)[:, None, None]
        window = (row + torch.arange(-1, 2, device=filled.device)).expand(len(filled), -1, -1)
        ends = torch.cat([torch.zeros_like(last), last], -1).expand(-1, len(index), -1)
        kept = torch.cat([(window >= 0) & (window <= last), (ends - row).abs() > 1], -1)
        kept[..., -1:] &= last > 0
        drawn = hashed_uniform(self.seed, row, column).expand(len(filled), -1, -1)
        others = ((row - column).abs() > 1) & (column > 0) & (column < last)
        scores, random = drawn.masked_fill(~others, -1.0).topk(min(self.config.num_random_blocks, len(index)), -1)
        chosen = torch.cat([window.clamp(0, len(index) - 1), ends, random], -1)
        return chosen, torch.cat([kept, scores > 0], -1)


def _take(x: Tensor, blocks: Tensor) -> Tensor:
    """Gather blocks: [B, H, n, s, d] and [B, a, b] to [B, H, a, b * s, d]."""
    index = blocks.flatten(1)[:, None, :, None, None].expand(-1, x.shape[1], -1, *x.shape[-2:])
    return x.gather(2, index).unflatten(2, blocks.shape[1:]).flatten(3, 4)
