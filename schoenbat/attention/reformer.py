"""Reformer's LSH attention: softmax among tokens whose directions fall into the same bucket."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from schoenbat.attention import Attention, check_positive
from schoenbat.kernels import Kernel
from schoenbat.ops.places import real_tokens


class Reformer(Attention):
    """Attention of shared queries and keys within chunks of tokens sorted by bucket (arXiv 2001.04451, Sec. 2).

    **The key is ignored**: the key of token j is q_j / |q_j|, the logit <q_i, q_j / |q_j|>, and a token attends to
    itself only where there is nothing else. In each round the bucket of a token is argmax [q R, -q R], R
    [head_dim, b / 2] normal; tokens are sorted by bucket and position and cut into chunks of c; a token attends to its
    chunk and the one before. Rounds are weighted by the softmax of their logsumexps. Rotations are those of the layer,
    for all heads.

    Masked tokens come last in each round and take no part. The first chunk looks back to the last one with a real
    token of its own round; in published code, to the last chunk of the round before, padding or not.

    There is no causal form here: published code masks later tokens, but which of the earlier ones share a chunk still
    depends on the later ones. No gradient goes through the buckets.

    Time r n (b + c) d, plus sorting, and memory n c of a head, r rounds.
    """

    @dataclass(frozen=True)
    class Config:
        """Rounds, buckets and chunks.

        Attributes:
            num_hashes: rounds.
            num_buckets: b of a round, even.
            chunk_size: c, tokens of a chunk.
        """

        num_hashes: int = 2
        num_buckets: int = 64
        chunk_size: int = 64

        def __post_init__(self) -> None:
            check_positive(num_hashes=self.num_hashes, num_buckets=self.num_buckets, chunk_size=self.chunk_size)
            if self.num_buckets % 2:
                raise ValueError(f"num_buckets must be even, not {self.num_buckets}")

    sees_every_key = False
    ignores_key_order = False
    has_causal_form = False
    has_cross_form = False
    is_random = True
    cost = "linear"
    paper = "Kitaev et al., ICLR 2020, arXiv 2001.04451"
    rotations: Tensor

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        shape = (config.num_hashes, head_dim, config.num_buckets // 2)
        self.register_buffer("rotations", torch.randn(shape, generator=generator))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        real = real_tokens(key_mask, q)
        length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        keys = q / torch.where(length == 0, 1.0, length)
        rounds = [self._round(rotation.to(q.dtype), q, keys, v, real) for rotation in self.rotations]
        outputs, logs = (torch.stack(parts) for parts in zip(*rounds, strict=True))
        return (outputs * logs.softmax(0)).sum(0)

    def _round(self, rotation: Tensor, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return output [B, H, N, d] and logsumexp [B, H, N, 1] of one round."""
        size, length = self.config.chunk_size, q.shape[-2]
        order = _sorted_by_bucket(q, rotation, real)
        q, k, v = (x.gather(-2, order[..., None].expand_as(x)) for x in (q, k, v))
        there = real[:, None].expand_as(order).gather(-1, order)
        end = -length % size
        q, k, v = (F.pad(x, (0, 0, 0, end)).unflatten(-2, (-1, size)) for x in (q, k, v))
        there = F.pad(there, (0, end)).unflatten(-1, (-1, size))

        index = torch.arange(q.shape[2], device=q.device)
        last = (index * there.any(-1)).amax(-1, keepdim=True)
        before = torch.where(index == 0, last, index - 1)
        allowed = torch.cat([_chunks(there[..., None], before)[..., 0] & (before != index)[..., None], there], -1)
        scores = q @ torch.cat([_chunks(k, before), k], -2).mT
        own = torch.eye(size, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(F.pad(own, (size, 0)), -1e5).masked_fill(~allowed[..., None, :], -1e9)
        log = scores.logsumexp(-1, keepdim=True)
        weights = (scores - log).exp().masked_fill(~allowed[..., None, :], 0.0)
        attended = weights @ torch.cat([_chunks(v, before), v], -2)

        position = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=q.device).expand_as(order))
        attended, log = (x.flatten(-3, -2)[..., :length, :] for x in (attended, log))
        place = position[..., None]
        return attended.gather(-2, place.expand_as(attended)), log.gather(-2, place)


def _sorted_by_bucket(q: Tensor, rotation: Tensor, real: Tensor) -> Tensor:
    """Sort the tokens [B, H, N] by bucket and position, masked ones last."""
    with torch.no_grad():
        projected = q @ rotation
        bucket = torch.cat([projected, -projected], -1).argmax(-1)
        bucket = bucket.masked_fill(~real[:, None], 2 * rotation.shape[-1])
        return bucket.argsort(dim=-1, stable=True)


def _chunks(x: Tensor, index: Tensor) -> Tensor:
    """Gather the chunks [B, H, n, c, d] at the places [B, H, n]."""
    return x.gather(2, index[..., None, None].expand_as(x))
