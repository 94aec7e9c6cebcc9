"""Attention mechanisms: one file per mechanism, found by its exact name.

A mechanism sees heads only: query and key [B, H, N, head_dim], value [B, H, N, head_dim], and a key mask [B, N] with
True = attend. It knows nothing of projections, normalisation around it, or the encoder.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from schoenbat.errors import UserError
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.registry import Registry

MAX_FEATURES, MAX_DEGREE = 2**16, 100
"""Of what an experiment may ask for; a random feature of a degree above 100 is drawn once in 2^100."""


@dataclass(frozen=True)
class NoConfig:
    """The options of a mechanism that has none."""


class Attention(nn.Module, ABC):
    """One attention mechanism.

    A subclass nests a frozen dataclass `Config` (the section `attention.NAME` of params.yaml) if it has options.

    Args:
        config: an instance of `Config`.
        head_dim: width of a head.
        kernel: the dot-product kernel where `needs_kernel`, else None.
        generator: source of everything random that is fixed at construction.
    """

    Config: ClassVar[type] = NoConfig
    needs_kernel: ClassVar[bool] = False

    def __init__(self, config: Any, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__()
        assert (kernel is not None) == self.needs_kernel
        self.config = config

    @abstractmethod
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            query, key, value: [B, H, N, head_dim], unscaled; the mechanism divides the dot products by
                sqrt(head_dim) itself where it takes any.
            key_mask: bool [B, N], True = attend; None = attend to all.
            is_causal: token i sees tokens up to i.

        Returns:
            [B, H, N, head_dim] in the dtype of `query`; 0 where a token may attend to nothing.
        """


class KernelAttention(Attention):
    """A mechanism that evaluates or estimates a dot-product kernel, kept as `kernel`.

    `gets_units` is set where every query and key is a unit vector, so that the kernel's argument is known to be small.
    """

    needs_kernel = True
    gets_units = False

    def __init__(self, config: Any, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        assert kernel is not None
        self.kernel = kernel


ATTENTIONS: Registry[Attention] = Registry("attn", "schoenbat.attention", Attention)  # type: ignore[type-abstract]


def check_kernel(attn: str, dotf: str | None) -> None:
    """Raise UserError for an unknown name, and for a mechanism that lacks a kernel or has no use for one."""
    needs_kernel = ATTENTIONS.get(attn).needs_kernel
    if dotf is not None:
        KERNELS.get(dotf)
    if needs_kernel and dotf is None:
        raise UserError(f"attn {attn!r} needs a kernel; choose dotf from: {', '.join(KERNELS.names())}")
    if not needs_kernel and dotf is not None:
        raise UserError(f"attn {attn!r} takes no kernel; leave out dotf {dotf!r}")


def scale_and_widen(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply query and key by head_dim^(-1/4) each, all in float32 or wider, where sums over tokens are safe."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.25
    return query.to(dtype) * scale, key.to(dtype) * scale, value.to(dtype)
