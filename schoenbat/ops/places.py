"""Which keys may be attended, and which tokens a draw hits, both for each example alone.

A mechanism that draws tokens keeps uniform numbers or a seed and not places: numbers become places among the real
tokens of each example, so that neither the amount of padding nor the other examples of a batch change them.
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def allowed_pairs(
    key_mask: Tensor | None, is_causal: bool, num_queries: int, num_keys: int, device: torch.device
) -> Tensor:
    """Return where query i may attend to key j: bool, broadcastable to [B, H, N, M]."""
    pairs = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if is_causal:
        pairs = pairs.tril()
    pairs = pairs[None, None]
    return pairs if key_mask is None else pairs & key_mask[:, None, None, :]


def real_tokens(key_mask: Tensor | None, x: Tensor) -> Tensor:
    """Return the mask itself, or one of all tokens of x [B, H, M, d]: bool [B, M]."""
    if key_mask is not None:
        return key_mask
    return torch.ones(x.shape[0], x.shape[-2], dtype=torch.bool, device=x.device)


def places_of(uniform: Tensor, real: Tensor) -> Tensor:
    """Turn uniform numbers [m] in [0, 1) into places [B, m] among the real tokens of each example.

    Args:
        real: bool [B, M]; an example without any gets place 0.
    """
    count = real.sum(-1, keepdim=True)
    rank = (uniform.double() * count).long()
    # The r-th real token stands at place r of a stable sort that puts real tokens first.
    order = torch.argsort(~real, dim=-1, stable=True)
    return order.gather(-1, rank)


def gather_tokens(x: Tensor, places: Tensor) -> Tensor:
    """Gather tokens: [B, H, M, d] and [B, m] to [B, H, m, d]."""
    index = places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    return x.gather(-2, index)


def draw_seed(generator: torch.Generator) -> Tensor:
    """Draw a seed for `hashed_uniform`: int64, without dimensions."""
    return torch.randint(0, _MASK32, (), generator=generator)


def hashed_uniform(seed: Tensor, *indices: Tensor) -> Tensor:
    """Draw a number in (0, 1), float64, for each tuple of indices (broadcast), the same wherever it is asked for.

    For draws at as many places as a sequence happens to have. Each index is added and mixed in 32 bits by
    multiplications and shifts; the multiplier is below 2^27, so that no product leaves int64.
    """
    state = seed
    for index in (*indices, torch.zeros_like(seed)):
        state = (state + index * 0x9E3779B9 + 0x7F4A7C15) & _MASK32
        for _ in range(2):
            state = ((state >> 16) ^ state) * 0x45D9F3B & _MASK32
        state = (state >> 16) ^ state
    return (state.double() + 0.5) / (_MASK32 + 1)


def masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Take the softmax over the last axis among the allowed; all 0 where nothing is."""
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~allowed, lowest).softmax(-1).masked_fill(~allowed, 0.0)
