"""Attention mechanisms: one file per mechanism, found by its exact name.

A mechanism sees heads only: query [B, H, N, head_dim], key and value [B, H, M, head_dim], and a key mask [B, M] with
True = attend. It knows nothing of projections, normalisation around it, or the encoder. What it promises and what it
costs are class variables of `Attention`; the contract tests ask of each mechanism exactly what it promises.
"""

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from schoenbat.errors import UserError
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.ops.reference import tame_masked
from schoenbat.registry import Registry

Cost = Literal["linear", "quadratic"]
FLOAT_BYTES = 4
MAX_FEATURES, MAX_DEGREE = 2**16, 100
"""Bounds of what an experiment may ask for; a random feature of a degree above 100 is drawn once in 2^100."""


@dataclass(frozen=True)
class NoConfig:
    """The options of a mechanism that has none."""


class Attention(nn.Module, ABC):
    """One attention mechanism.

    A subclass nests a frozen dataclass `Config` (the section `attention.NAME` of params.yaml) if it has options, says
    with the class variables below where it differs from softmax attention, and defines `attend`, or `forward` where
    the preparations of this class cost more than they give.

    Args:
        config: an instance of `Config`.
        head_dim: width of a head.
        kernel: the dot-product kernel where `needs_kernel`, else None.
        generator: source of everything random that is fixed at construction.

    Attributes:
        needs_kernel: it evaluates or estimates a dot-product kernel.
        weights_sum_to_one: the weights of a query sum to one, so that values that are all the same come back.
        sees_every_key: the output of every query depends on every key that may be attended, wherever it stands; only
            what query and key are may make a weight 0.
        ignores_key_order: the same permutation of keys and values changes no output.
        has_causal_form: it takes `is_causal`.
        has_cross_form: it takes keys that are other tokens than the queries. Without this form `key_mask` says which
            queries are there, too: a mechanism may choose or average among them.
        is_random: what it computes depends on the generator.
        needs_max_length: its Config has a `max_length`, and longer sequences are an error.
        cost: how time and memory grow with the length.
        paper: a short citation of what it implements.
    """

    Config: ClassVar[type] = NoConfig
    needs_kernel: ClassVar[bool] = False
    weights_sum_to_one: ClassVar[bool] = True
    sees_every_key: ClassVar[bool] = True
    ignores_key_order: ClassVar[bool] = True
    has_causal_form: ClassVar[bool] = True
    has_cross_form: ClassVar[bool] = True
    is_random: ClassVar[bool] = False
    needs_max_length: ClassVar[bool] = False
    cost: ClassVar[Cost] = "quadratic"
    paper: ClassVar[str] = ""

    def __init__(self, config: Any, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__()
        assert (kernel is not None) == self.needs_kernel
        self.config = config

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        """Return the largest size in bytes of the causal state over `length` tokens, of one head in float32.

        This default is that of the keys and values of all tokens.
        """
        return kept_bytes(length, head_dim)

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
            query: [B, H, N, head_dim], unscaled; the mechanism divides the dot products by sqrt(head_dim) itself
                where it takes any.
            key, value: [B, H, M, head_dim].
            key_mask: bool [B, M], True = attend; None = attend to all. What stands at masked places does not matter,
                be it NaN.
            is_causal: token i sees tokens up to i; needs N = M.

        Returns:
            [B, H, N, head_dim] in the dtype of `query`; 0 where a token may attend to nothing.

        Raises:
            UserError: a use that the mechanism has no form for.
        """
        self._check(query.shape[-2], key.shape[-2], is_causal)
        wide = torch.promote_types(query.dtype, torch.float32)
        q, k, v = query.to(wide), key.to(wide), value.to(wide)
        if key_mask is not None:
            absent = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
            q = tame_masked(q, key_mask) if self.has_cross_form else q.masked_fill(absent, 0.0)
        with torch.autocast(query.device.type, enabled=False):
            return self.attend(q, k, v, key_mask, is_causal).to(query.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Attend, for tensors of float32 or wider that are 0 at masked places, in a use that there is a form for.

        Masked queries are 0 only where `has_cross_form` is False. Autocast is off.
        """
        raise NotImplementedError(f"{type(self).__qualname__} defines neither attend nor forward")

    def _check(self, num_queries: int, num_keys: int, is_causal: bool) -> None:
        name = type(self).__module__.rpartition(".")[2]
        if is_causal and not self.has_causal_form:
            raise UserError(f"attn {name!r} has no causal form: a token would learn of later ones")
        if num_queries != num_keys and not self.has_cross_form:
            raise UserError(
                f"attn {name!r} has no form for other keys than the queries: {num_queries} queries, {num_keys} keys"
            )
        if num_queries != num_keys and is_causal:
            raise UserError(f"causal attention needs as many queries as keys, not {num_queries} and {num_keys}")
        check_length(name, type(self), self.config, max(num_queries, num_keys))


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


ATTENTIONS: Registry[Attention] = Registry("attn", "schoenbat.attention", Attention, has_variants=True)


def check_kernel(attn: str, dotf: str | None) -> None:
    """Raise UserError for an unknown name, and for a mechanism that lacks a kernel or has no use for one."""
    needs_kernel = ATTENTIONS.get(attn).needs_kernel
    if dotf is not None:
        KERNELS.get(dotf)
    if needs_kernel and dotf is None:
        raise UserError(f"attn {attn!r} needs a kernel; choose dotf from: {', '.join(KERNELS.names())}")
    if not needs_kernel and dotf is not None:
        raise UserError(f"attn {attn!r} takes no kernel; leave out dotf {dotf!r}")


def check_length(name: str, attention: type[Attention], config: Any, length: int) -> None:
    """Raise UserError where the mechanism called `name`, with this Config, takes fewer tokens than `length`."""
    if attention.needs_max_length and length > config.max_length:
        raise UserError(
            f"attn {name!r} was made for {config.max_length} tokens at most, not for {length}: raise max_length"
        )


def check_positive(**counts: int) -> None:
    """Raise ValueError for a count below 1; for the `__post_init__` of a Config."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")


def kept_bytes(tokens: int, head_dim: int) -> int:
    """Return the size in bytes of a key-value cache of `tokens` tokens."""
    return FLOAT_BYTES * tokens * 2 * head_dim


def sums_bytes(num_features: int, head_dim: int) -> int:
    """Return the size in bytes of the sums of phi(k) [v, 1]^T and [v, 1] over all tokens."""
    return FLOAT_BYTES * (num_features + 1) * (head_dim + 1)


def scale_and_widen(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply query and key by head_dim^(-1/4) each, all in float32 or wider, where sums over tokens are safe."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.25
    return query.to(dtype) * scale, key.to(dtype) * scale, value.to(dtype)
