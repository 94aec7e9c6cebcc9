"""Every attention mechanism with each of its kernels, made small, and inputs for them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from schoenbat.attention import ATTENTIONS, Attention
from schoenbat.errors import UserError
from schoenbat.kernels import KERNELS
from schoenbat.norm import pre_sbn

HEAD_DIM = 8

SMALL: dict[str, dict[str, Any]] = {
    "bigbird": {"block_size": 4, "num_random_blocks": 1},
    "informer": {"num_samples": 7},
    "linformer": {"num_landmarks": 8, "max_length": 4096},
    "nystromformer": {"num_landmarks": 8, "conv_size": 3},
    "reformer": {"num_buckets": 4, "chunk_size": 4},
    "skeinformer": {"num_samples": 7},
    "skyformer": {"num_landmarks": 16},
    "window": {"window": 8},
}
"""Budgets at which few tokens are already more than the mechanism takes exactly."""


def takes(name: str, dotf: str | None) -> bool:
    """Whether the mechanism can be made for this kernel."""
    try:
        make(name, dotf)
    except UserError:
        return False
    return True


def every(where: str | None = None, is_there: bool = True) -> pytest.MarkDecorator:
    """Each mechanism with each of its kernels; only those whose promise `where` is or is not there, if it is given."""
    cases = [case for case in CASES if where is None or getattr(ATTENTIONS.get(case[0]), where) is is_there]
    ids = ["-".join(filter(None, case)) for case in cases]
    return pytest.mark.parametrize(("name", "dotf"), cases, ids=ids)


def of_cost(cost: str) -> pytest.MarkDecorator:
    """Each mechanism of this cost, with its first kernel only."""
    names = [name for name in ATTENTIONS.names() if ATTENTIONS.get(name).cost == cost]
    return pytest.mark.parametrize(("name", "dotf"), [next(case for case in CASES if case[0] == n) for n in names])


def make(
    name: str, dotf: str | None, seed: int = 0, *, head_dim: int = HEAD_DIM, budget: dict[str, Any] | None = None
) -> Attention:
    attention_class = ATTENTIONS.get(name)
    return attention_class(
        attention_class.Config(**(SMALL.get(name, {}) if budget is None else budget)),
        head_dim=head_dim,
        kernel=None if dotf is None else KERNELS.get(dotf)(),
        generator=torch.Generator().manual_seed(seed),
    )


CASES = [
    (name, dotf)
    for name in ATTENTIONS.names()
    for dotf in (KERNELS.names() if ATTENTIONS.get(name).needs_kernel else [None])
    if takes(name, dotf)
]


def inputs(
    length: int, *, seed: int = 0, batch: int = 2, heads: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Query and key on the unit sphere, inside every kernel's domain, and a value."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, heads, length, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return [x.to(dtype) for x in (pre_sbn(query), pre_sbn(key), value)]


def mask_of(lengths: list[int], padded: int) -> Tensor:
    return torch.arange(padded) < torch.tensor(lengths)[:, None]


def assert_half_precision_is_close(attention: Attention, device: torch.device, dtype: torch.dtype) -> None:
    """Outputs on `device` in `dtype` keep it and are those in float32, within 0.05 of the largest."""
    attention = attention.to(device)
    # Both see the same rounded numbers: a choice among tokens may hang on the last bit.
    query, key, value = (x.to(device, dtype) for x in inputs(3000, batch=1))
    exact = attention(query.float(), key.float(), value.float())
    half = attention(query, key, value)
    assert half.dtype == dtype
    size = float(exact.detach().abs().amax().clamp_min(1))
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05 * size)
