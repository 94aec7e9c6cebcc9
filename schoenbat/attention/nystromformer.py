"""Nyströmformer: softmax attention through the means of segments."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schoenbat.attention import Attention, check_positive
from schoenbat.kernels import Kernel
from schoenbat.ops.inverse import iterated_inverse
from schoenbat.ops.places import masked_softmax, real_tokens


class Nystromformer(Attention):
    """softmax(q K~^T) inv6(softmax(Q~ K~^T)) softmax(Q~ k^T) v + conv(v) (arXiv 2102.03902, Algorithm 1).

    q and k are scaled by head_dim^(-1/4). Q~ and K~ are the means of m segments of the real tokens of an example, cut
    at floor(a L / m); with at most m real tokens it is exact softmax. inv6 is six steps of `schoenbat.ops.inverse`. The
    matrix is nearly singular, six steps are far from its inverse, and the error of the output is lower for it: their
    number is part of the mechanism. conv is an optional depthwise convolution over positions, one learned filter for
    all heads, without bias.

    Published code cuts segments of the padded sequence, so that segments of padding become landmarks of full weight,
    and starts the inverse from a maximum over the batch.

    Time n m d + m^3 and memory n m of a head.
    """

    @dataclass(frozen=True)
    class Config:
        """Landmarks and convolution.

        Attributes:
            num_landmarks: m, the segments whose means are landmarks.
            conv_size: tokens under the filter, odd, or 0 for no convolution; the authors have 35, Skyformer's
                experiments none.
        """

        num_landmarks: int = 128
        conv_size: int = 0

        def __post_init__(self) -> None:
            check_positive(num_landmarks=self.num_landmarks)
            if self.conv_size < 0 or (self.conv_size and self.conv_size % 2 == 0):
                raise ValueError(f"conv_size must be odd, or 0 for none, not {self.conv_size}")

    weights_sum_to_one = False
    ignores_key_order = False
    has_causal_form = False
    has_cross_form = False
    cost = "linear"
    paper = "Xiong et al., AAAI 2021, arXiv 2102.03902"

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        self.filter: nn.Parameter | None = None
        if config.conv_size:
            # As torch's convolutions start.
            uniform = torch.rand(config.conv_size, generator=generator)
            self.filter = nn.Parameter((2 * uniform - 1) / math.sqrt(config.conv_size))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        scale = q.shape[-1] ** -0.25
        real = real_tokens(key_mask, k)
        segments = _segments(real, min(self.config.num_landmarks, k.shape[-2]))
        share = segments.to(q.dtype) / segments.sum(-1, keepdim=True).clamp_min(1)
        q, k = q * scale, k * scale
        q_landmarks, k_landmarks = share @ q, share @ k
        # With no more real tokens than landmarks each of these is a token, and the product of the two right factors is
        # the values themselves.
        filled = segments.any(-1)
        few = (real.sum(-1) <= segments.shape[-2])[:, None, None, None]
        identity = torch.eye(filled.shape[-1], dtype=q.dtype, device=q.device)
        middle = torch.where(few, identity, masked_softmax(q_landmarks @ k_landmarks.mT, filled[..., None, :]))
        right = masked_softmax(q_landmarks @ k.mT, real[:, None, None]) @ v
        summary = torch.where(few, share @ v, iterated_inverse(middle) @ right)
        out = masked_softmax(q @ k_landmarks.mT, filled[..., None, :]) @ summary
        return out if self.filter is None else out + self._convolved(v)

    def _convolved(self, v: Tensor) -> Tensor:
        assert self.filter is not None
        columns = v.mT.flatten(1, 2)
        weight = self.filter.to(v.dtype).expand(columns.shape[1], 1, -1)
        # A group for each column: one convolution of all would be in TF32 on a GPU.
        return F.conv1d(columns, weight, padding=len(self.filter) // 2, groups=len(weight)).view_as(v.mT).mT


def _segments(real: Tensor, number: int) -> Tensor:
    """Cut the real tokens into segments: bool [B, 1, number, M]; up to `number` of them are a segment each."""
    count = real.sum(-1, keepdim=True)
    rank = real.cumsum(-1) - 1
    # The segment a with floor(a L / number) <= rank < floor((a + 1) L / number).
    segment = torch.where(count > number, ((rank + 1) * number - 1) // count.clamp_min(1), rank)
    index = torch.arange(number, device=real.device)[:, None]
    return ((segment[:, None] == index) & real[:, None])[:, None]
