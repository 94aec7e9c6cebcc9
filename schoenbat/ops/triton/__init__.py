r"""Attention through features on a GPU: what `schoenbat.ops.linear.attend` computes, in kernels of Triton.

Features are made and used up in registers, in the forward and in the backward pass. The kernels take attention that
is not causal, through a FeatureMap without bounds or one of exp with bounds. As no GPU has run them yet they are used
only where the environment variable SCHOENBAT_TRITON is 1 (`takes`). Elsewhere attention is made of torch's operations,
which also have forward-mode and higher derivatives.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from schoenbat.features.plan import FeatureMap

LARGEST_WIDTH = 64
"""Of queries, keys and values."""


def takes(features: FeatureMap | Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, bounded: bool) -> bool:
    """Return whether `attend` is there for these inputs and is to be used."""
    # In float32 they have only been interpreted so far.
    if query.device.type != "cuda" or query.dtype == torch.float32 or not _is_wanted():
        return False
    return can_take(features, query, key, value, bounded)


def can_take(
    features: FeatureMap | Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, bounded: bool
) -> bool:
    """Return whether the kernels compute this attention, wherever they may run."""
    if not isinstance(features, FeatureMap) or not features.plan.num_features:
        return False
    if bounded and (not features.centres or features.sketched == 1):
        return False
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if max(key.shape[-1], value.shape[-1]) > LARGEST_WIDTH or not all(x.numel() for x in (query, key, value)):
        return False
    # torch.func's transforms of a gradient, tangents and exported graphs are for torch's operations.
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
        return False
    return torch.compiler.is_compiling() or all(unpack_dual(x).tangent is None for x in (query, key, value))


def attend(
    features: FeatureMap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    self_attention: bool,
    bounded: bool,
) -> Tensor:
    """Do what `schoenbat.ops.linear.attend` does with the same arguments, where `can_take` says so."""
    from schoenbat.ops.triton.launch import attend as launch

    return launch(features, query, key, value, key_mask, scale, self_attention, bounded)


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_wanted() -> bool:
    return os.environ.get("SCHOENBAT_TRITON") == "1" and _is_installed()
