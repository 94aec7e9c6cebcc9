"""The gate of the kernels: each case is the formulas of `schoenbat.ops.naive` in float64, in values and gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.features.plan import FeatureMap
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import KERNELS
from schoenbat.ops import linear, triton
from schoenbat.ops.naive import naive_attention
from schoenbat.ops.reference import AttentionInputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = {torch.float32: 1e-6, torch.float16: 0.01, torch.bfloat16: 0.03}


class Case(NamedTuple):
    """An attention; `size` is the standard deviation of coordinates of queries and keys."""

    name: str
    features: str = "bounded"
    num_features: int = 128
    head_dim: int = 32
    queries: int = 63
    keys: int | None = None
    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    masked: bool = False
    self_attention: bool = True
    dtype: torch.dtype = torch.float32
    size: float = 1.0


CASES = [
    Case("plain"),
    Case("one token", queries=1),
    Case("several blocks", queries=200, size=2.0),
    Case("cooled", head_dim=64, size=2.5),
    Case("long", queries=1000, num_features=64, size=1.5),
    Case("complete degrees", num_features=561, queries=70, size=1.5),
    Case("head_dim 64", num_features=561, head_dim=64, queries=65, size=1.5),
    Case("odd head_dim", num_features=70, head_dim=40, queries=33),
    Case("masked", batch=2, masked=True, queries=70, size=1.5),
    Case("grouped heads", heads=4, key_heads=2, queries=66),
    Case("grouped and masked", batch=2, heads=2, masked=True, queries=130, size=1.5),
    Case("cross-attention", self_attention=False, queries=40, keys=90, masked=True, batch=2),
    Case("unbounded", features="unbounded", num_features=100, queries=80),
    Case("unbounded and masked", features="unbounded", batch=2, masked=True, heads=2, queries=70),
    Case("published features", features="maclaurin", num_features=64, queries=70, size=0.5),
    Case("published features, masked", features="maclaurin", batch=2, heads=2, masked=True, size=0.5),
    Case("another kernel", features="inverse", num_features=100, queries=50, size=0.1),
    Case("bfloat16", dtype=torch.bfloat16, queries=70, batch=2, masked=True),
    Case("bfloat16, published features", features="maclaurin", dtype=torch.bfloat16, size=0.2),
    Case("float16", dtype=torch.float16, head_dim=64),
]


def features_of(case: Case) -> FeatureMap:
    kernel = KERNELS.get("inverse" if case.features == "inverse" else "exp")()
    generator = torch.Generator().manual_seed(3)
    sizes = {"head_dim": case.head_dim, "num_features": case.num_features, "max_degree": 20, "generator": generator}
    if case.features == "maclaurin":
        return RandomMaclaurin(kernel, **sizes)
    return Sketch(kernel, **sizes, scale=0.5, fixed_norm=False, bounded=case.features == "bounded")


def inputs_of(case: Case) -> AttentionInputs:
    """Tensors of which some are not contiguous, with NaN for keys and values that are masked."""
    generator = torch.Generator().manual_seed(1)
    keys = case.keys or case.queries
    query, key, value = (
        torch.randn(case.batch, n, h, case.head_dim, generator=generator).transpose(1, 2)
        for n, h in ((case.queries, case.heads), (keys, case.key_heads), (keys, case.key_heads))
    )
    query, key = case.size * query + 0.3, case.size * key + 0.2
    mask = None
    if case.masked:
        mask = torch.ones(case.batch, keys, dtype=torch.bool)
        mask[0, keys // 2 :], mask[-1, 3::4] = False, False
        key, value = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (key, value + 0.5))
        mask = mask.to(DEVICE)
    tensors = [x.to(DEVICE, case.dtype) for x in (query, key, value)]
    return AttentionInputs(*tensors, mask, False, case.head_dim**-0.5, case.self_attention)


def results(way: str, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of query, key and value, in float64, as computed in `dtype`."""
    features, inputs = features_of(case).to(DEVICE), inputs_of(case)
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    inputs = AttentionInputs(*leaves, *inputs[3:])
    bounded = features.is_bounded
    if way == "kernels":
        assert triton.can_take(features, *leaves, bounded)
        out = triton.attend(features, *leaves, inputs.key_mask, inputs.scale, inputs.self_attention, bounded)
    elif way == "naive":
        out = naive_attention(features, inputs, bounded)
    else:
        out = linear.attend(features, *inputs, bounded=bounded)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves, weight.to(out))
    return [x.detach().double() for x in (out, *gradients)]


def assert_kernels_are_the_formulas(case: Case) -> None:
    """Check that they are off by their rounding, and where float32 says less, by some times what torch's form is."""
    expected, rough = results("naive", case, torch.float64), results("linear", case, torch.float32)
    found, names = results("kernels", case, case.dtype), ("output", "query", "key", "value")
    for name, a, b, c in zip(names, found, expected, rough, strict=True):
        off, by_rounding = (float((x - b).norm() / b.norm().clamp_min(0.01)) for x in (a, c))
        assert off <= ROUNDING[case.dtype] + 5 * by_rounding, f"{case.name}: {name} is off by {off:.1e}"
