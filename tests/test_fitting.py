"""Kernels of heads fitted to exact attention: what they gain, and what they leave alone."""

import pytest
import torch
from torch import Tensor

from schoenbat import Estimate, UserError, fit_kernels
from schoenbat.ops._share import compare_exactly
from schoenbat.ops.sparse import HeadKernels

HEADS, HEAD_DIM = 4, 8
SPARSE = Estimate(num_features=1 + 8 + 36, window=8, heavy=4, sinks=1)


def draw(seed: int, size: float = 2.0, length: int = 96, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Draw heads whose arguments have heavier tails than two degrees describe, with one key head for two heads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, heads, length, HEAD_DIM) for heads in (HEADS, HEADS // 2, HEADS // 2)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return [size * query, key, value + key]


def shares_of(kernels: HeadKernels | None, tensors: list[Tensor], causal: bool = False) -> Tensor:
    out = SPARSE.attend(*tensors, is_causal=causal, self_attention=True, kernels=kernels)
    inputs = SPARSE.prepare(*tensors, is_causal=causal, self_attention=True)
    return torch.tensor(compare_exactly(SPARSE.function, inputs).share_explained(out, (0, 2, 3)))


@pytest.mark.parametrize("causal", [False, True])
def test_fitted_kernels_explain_more_of_other_tensors(causal: bool) -> None:
    kernels = fit_kernels(*draw(0), is_causal=causal, self_attention=True, estimate=SPARSE)
    before, after = (shares_of(used, draw(1), causal) for used in (None, kernels))
    assert (before < 0.95).all()
    assert ((1 - after) < 0.95 * (1 - before)).all(), (before, after)


def test_no_small_change_explains_more() -> None:
    tensors = draw(0)
    kernels = fit_kernels(*tensors, self_attention=True, estimate=SPARSE, steps=30)
    best = shares_of(kernels, tensors)
    for change in torch.eye(3).repeat(2, 1) * torch.tensor([0.1, -0.1]).repeat_interleave(3)[:, None]:
        moved = HeadKernels(HEADS)
        with torch.no_grad():
            moved.logarithms.copy_((kernels.logarithms + change).clamp(-5, 5))
        assert (shares_of(moved, tensors) <= best + 1e-6).all()


def test_what_padding_holds_does_not_matter() -> None:
    tensors = draw(0)
    mask = torch.ones(3, 96, dtype=torch.bool)
    mask[1, 70:] = mask[2, :9] = False
    holes = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in tensors[1:]]
    clean, dirty = (
        fit_kernels(*given, key_mask=mask, self_attention=True, estimate=SPARSE)
        for given in (tensors, [tensors[0], *holes])
    )
    assert clean.logarithms.abs().max() > 0.01
    assert torch.equal(clean.logarithms, dirty.logarithms)


def test_kernels_are_positive_and_known_as_kernels() -> None:
    kernels = fit_kernels(*draw(0, size=4.0), self_attention=True, estimate=SPARSE)
    assert kernels.logarithms.requires_grad
    assert (kernels() > 0).all()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for head, (a, b, c) in enumerate(kernels().tolist()):
        kernel = kernels.kernel(head)
        torch.testing.assert_close(kernel(x), a * (1 + b * x + c * x**2 / 2))
        assert [kernel.coefficient(n) for n in range(4)] == pytest.approx([a, a * b, a * c / 2, 0.0], abs=1e-9 * a * c)


def test_heads_without_other_keys_keep_exp() -> None:
    few = [x[:, :, :10] for x in draw(0)]
    kernels = fit_kernels(*few, self_attention=True, estimate=SPARSE)
    assert (kernels.logarithms == 0).all()


def test_settings_without_exact_keys_have_no_kernels_to_fit() -> None:
    with pytest.raises(UserError, match="no window"):
        fit_kernels(*draw(0), estimate=Estimate())
