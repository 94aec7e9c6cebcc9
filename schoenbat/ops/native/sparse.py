"""The compiled form of attention with near and heavy keys: `schoenbat.ops.sparse` without a gradient."""

import ctypes

import torch
from torch import Tensor

from schoenbat.features.plan import FeatureMap
from schoenbat.ops import native
from schoenbat.ops.native.build import load
from schoenbat.ops.places import real_tokens
from schoenbat.ops.reference import AttentionInputs


def serves(features: FeatureMap, inputs: AttentionInputs, kernels: Tensor | None) -> bool:
    """Return whether the compiled form computes this; the torch form computes everything."""
    query, key, value = inputs[:3]
    known = (query, key, value) if kernels is None else (query, key, value, kernels)
    is_kept = torch.is_grad_enabled() and any(x.requires_grad for x in known)
    if is_kept or torch.compiler.is_compiling() or not inputs.self_attention or not query.shape[2]:
        return False
    return native.serves(features, query, key, value, bounded=False)


def attend(features: FeatureMap, inputs: AttentionInputs, window: int, heavy: int, kernels: Tensor | None) -> Tensor:
    """Do what `schoenbat.ops.sparse.attend` does in self-attention that is not causal.

    Args:
        window, heavy: at least 1 token, and any number of heavy keys.
        kernels: a, b, c of the heads [H, 3]; None for exp.
    """
    query, key, value, key_mask, _, scale, _ = inputs
    library = load().library
    assert library is not None
    (batch, heads, length, width), (_, key_heads, _, values) = query.shape, value.shape
    # Features above the first degree, which is complete: sums over the keys themselves say the same.
    _, products = features.products(torch.float32, 1.0).split(2)
    runs = [number for run in products.plan.runs for number in (*run.offsets, run.length)]
    squares = [run.weight**2 for run in products.plan.runs]
    if kernels is None:
        kernels = query.new_ones(heads, 3)
    described = torch.cat([kernels[:, :1].log(), kernels[:, 1:]], -1).expand(batch, heads, 3)
    real = real_tokens(key_mask, key)[:, None].expand(batch, key_heads, length)
    arrays = [x.contiguous() for x in (query, key, value, real, described, products.projection.T)]
    out = query.new_empty(batch, heads, length, values)
    sizes = [batch * key_heads, heads // key_heads, length, width, values, min(window, length), min(heavy, length)]
    sizes += [len(squares), products.projection.shape[1], torch.get_num_threads()]
    numbers = [scale, features.shares.get(2, 1.0), max(1.0, features.reach), features.unexplained]
    library.schoenbat_attend_sparse(
        (ctypes.c_int * len(sizes))(*sizes),
        (ctypes.c_float * len(numbers))(*numbers),
        (ctypes.c_int * len(runs))(*runs),
        (ctypes.c_float * len(squares))(*squares),
        *(ctypes.c_void_p(x.data_ptr()) for x in (*arrays, out)),
    )
    return out
