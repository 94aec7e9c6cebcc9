"""Linformer: softmax attention to learned combinations of keys."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from schoenbat.attention import Attention, check_positive
from schoenbat.kernels import Kernel


class Linformer(Attention):
    """softmax(q (E k)^T / sqrt(head_dim)) (F v), E and F [m, max_length] learned (arXiv 2006.04768, Eq. 7).

    One E for all heads of a layer, and F = E unless `share` is False. They are normal at first with variance 1 / m,
    which keeps inner products in expectation. Masked keys and values are 0 before E, and a sequence shorter than
    `max_length` takes the first columns of E. The result is no mean of values. Random E does not approach softmax
    attention as m grows below n.

    In the code behind Skyformer's figures E is no registered parameter, so that they are those of a frozen random
    projection.

    Time n m d and memory n m of a head.
    """

    @dataclass(frozen=True)
    class Config:
        """The size of the projections.

        Attributes:
            num_landmarks: m, the combined keys.
            max_length: tokens of the longest sequence.
            share: one projection for keys and values.
        """

        num_landmarks: int = 128
        max_length: int = 4096
        share: bool = True

        def __post_init__(self) -> None:
            check_positive(num_landmarks=self.num_landmarks, max_length=self.max_length)

    weights_sum_to_one = False
    ignores_key_order = False
    has_causal_form = False
    needs_max_length = True
    cost = "linear"
    paper = "Wang et al., arXiv 2006.04768"

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        shape = (config.num_landmarks, config.max_length)
        std = config.num_landmarks**-0.5
        self.project_key = nn.Parameter(torch.randn(shape, generator=generator) * std)
        self.project_value = self.project_key
        if not config.share:
            self.project_value = nn.Parameter(torch.randn(shape, generator=generator) * std)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        length = k.shape[-2]
        keys = self.project_key[:, :length].to(q.dtype) @ k
        values = self.project_value[:, :length].to(q.dtype) @ v
        return (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1) @ values
