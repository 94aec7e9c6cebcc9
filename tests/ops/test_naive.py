"""Every fast form of attention through features is its formula, in values and gradients."""

import itertools

import pytest
import torch
from torch import Tensor

from schoenbat.calibration import FittedFeatures
from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.features.plan import FeatureMap
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.ops import _causal, linear
from schoenbat.ops.naive import naive_attention
from schoenbat.ops.reference import AttentionInputs

LENGTH, HEAD_DIM, CHUNK, SCALE = 22, 4, 4, 0.7
SINH = Kernel.from_callable(lambda x: torch.sinh(x) + 0.3)
"""Of both signs, so that its denominators have a floor of their own."""


def features_of(name: str, kernel: Kernel) -> FeatureMap:
    generator = torch.Generator().manual_seed(3)
    if name == "fitted":
        return FittedFeatures(kernel, num_features=9, max_degree=4, spread=(0.9, 0.5, 0.3, 0.1))
    if name == "maclaurin":
        return RandomMaclaurin(kernel, head_dim=HEAD_DIM, num_features=9, max_degree=4, generator=generator)
    # With 3 features the linear degree is incomplete, with 11 the quadratic one, with 35 no degree but the last.
    num_features, scale = int(name), min(1.0, kernel.radius / 2)
    return Sketch(
        kernel,
        head_dim=HEAD_DIM,
        num_features=num_features,
        max_degree=4,
        scale=scale,
        fixed_norm=False,
        generator=generator,
    )


def inputs_of(short: bool, masked: bool, is_causal: bool, self_attention: bool, groups: int) -> AttentionInputs:
    """Tensors in float64: `short` vectors inside every radius, or long ones, which a bounded estimate of exp cools."""
    generator = torch.Generator().manual_seed(1)
    heads = (2 * groups, 2, 2)
    query, key, value = (
        torch.randn(2, h, LENGTH, HEAD_DIM, generator=generator, dtype=torch.float64) + 0.3 for h in heads
    )
    if short:
        query, key = (0.9 * x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    # The first token stays, so that each query sees one.
    mask[0, 15:], mask[1, 3::4] = False, False
    leaves = [x.requires_grad_() for x in (query, key, value)]
    return AttentionInputs(*leaves, mask if masked else None, is_causal, SCALE, self_attention)


def gradients(out: Tensor, inputs: AttentionInputs) -> tuple[Tensor, ...]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return torch.autograd.grad(out, inputs[:3], weight)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_causal, "chunk_length", lambda _: CHUNK)
    monkeypatch.setattr("schoenbat.ops.naive.chunk_length", lambda _: CHUNK)


CASES = [
    (kernel, name)
    for kernel in (KERNELS.get("exp")(), KERNELS.get("inverse")(), SINH)
    for name in ("3", "11", "35", "fitted", "maclaurin")
]


def parts(features: FeatureMap, inputs: AttentionInputs) -> Tensor:
    """Attend causally, a few tokens at a time."""
    state, found = None, []
    for start, end in itertools.pairwise((0, 5, 6, 7, LENGTH)):
        tensors = (x[:, :, start:end] for x in inputs[:3])
        mask = None if inputs.key_mask is None else inputs.key_mask[:, start:end]
        out, state = linear.extend(features, state, *tensors, mask, SCALE)
        found.append(out)
    return torch.cat(found, 2)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("kernel", "name"), CASES, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
@pytest.mark.parametrize("bounded", [False, True])
def test_fast_forms_are_the_formulas(kernel: Kernel, name: str, bounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(name, kernel)
    if bounded and not features.is_bounded:
        pytest.skip("published features are not bounded")
    short = not (bounded and kernel.is_exponential)
    for (masked, groups), is_causal, itself in itertools.product(((False, 1), (True, 2)), (False, True), (False, True)):
        inputs = inputs_of(short, masked, is_causal, itself, groups)
        expected = naive_attention(features, inputs, bounded)
        wanted = (expected, *gradients(expected, inputs))
        found = {"at once": linear.attend(features, *inputs, bounded=bounded)}
        with monkeypatch.context() as patch:
            patch.setattr("schoenbat.ops._planned.FEW_ROWS", 0)
            found["in pieces"] = linear.attend(features, *inputs, bounded=bounded)
        if is_causal and bounded == features.is_bounded:
            found["in parts"] = parts(features, inputs)
        for way, out in found.items():
            case = f"{way}, masked {masked}, causal {is_causal}, self-attention {itself}, {groups} queries a head"
            for a, b in zip((out, *gradients(out, inputs)), wanted, strict=True):
                # The drawn basis is orthogonal to the precision of float32, in which it is kept.
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, case=case: f"{case}: {m}")
