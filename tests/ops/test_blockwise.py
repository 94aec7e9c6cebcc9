"""Blocks change memory, and nothing else."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.kernels import KERNELS
from schoenbat.ops.blockwise import attend, centre_keys
from schoenbat.ops.softmax import softmax_attention


def feature_map(num_features: int = 24, head_dim: int = 8) -> RandomMaclaurin:
    generator = torch.Generator().manual_seed(0)
    return RandomMaclaurin(
        KERNELS.get("exp")(), head_dim=head_dim, num_features=num_features, max_degree=8, generator=generator
    )


def inputs(length: int, *, heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, length, 8, generator=generator, dtype=torch.float64) * 0.4
    key = torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64) * 0.4
    value = torch.randn(2, heads, length, 3, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (query, key, value)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_blocks_and_groups_give_the_same_outputs_and_gradients(heads: int, is_causal: bool) -> None:
    features = feature_map()
    mask = torch.arange(50) < torch.tensor([50, 23])[:, None]
    results = []
    for block, repeat in ((None, True), (None, False), (7, False), (64, False)):
        query, key, value = (x.requires_grad_() for x in inputs(50, heads=heads))
        wide = [x.repeat_interleave(4 // heads, 1) if repeat else x for x in (key, value)]
        out = attend(features, query, *wide, mask, is_causal, block)
        out.square().sum().backward()
        results.append([out, query.grad, key.grad, value.grad])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_without_a_gradient_blocks_are_the_default_and_agree() -> None:
    features = feature_map()
    query, key, value = inputs(9000)
    for is_causal in (False, True):
        with torch.no_grad():
            blocks = attend(features, query, key, value, None, is_causal)
        torch.testing.assert_close(blocks, attend(features, query, key, value, None, is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
def test_double_backward_passes_through_blocks(is_causal: bool) -> None:
    features = feature_map(6)
    leaves = tuple(x[:1, :1].detach().requires_grad_() for x in inputs(3, heads=1))
    assert torch.autograd.gradgradcheck(
        lambda query, key, value: attend(features, query, key, value, None, is_causal, block=2), leaves
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_torch_func_and_compile_pass_through_the_whole_route(is_causal: bool) -> None:
    features = feature_map()
    leaves = inputs(12)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(features, query, key, value, None, is_causal).square().sum()

    together = grad(loss, argnums=(0, 1, 2))(*leaves)
    each = vmap(grad(lambda *one: loss(*(x[None] for x in one)), argnums=(0, 1, 2)))(*leaves)
    compiled_leaves = [x.clone().requires_grad_() for x in leaves]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled_leaves).backward()
    for a, b, c in zip(together, each, compiled_leaves, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision_stays_close_and_keeps_its_dtype(dtype: torch.dtype, is_causal: bool) -> None:
    features = feature_map()
    exact = inputs(3000)
    half = [x.to(dtype) for x in exact]
    out = attend(features, *half, None, is_causal)
    assert out.dtype == dtype
    # Inputs and output are rounded; what is in between is not.
    expected = attend(features, *(x.double() for x in half), None, is_causal)
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_autocast_does_not_reach_the_statistics() -> None:
    features = feature_map()
    leaves = inputs(64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attend(features, *leaves)
    assert torch.equal(inside, attend(features, *leaves))


def test_masked_places_may_hold_anything() -> None:
    features = feature_map()
    query, key, value = inputs(20)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    soiled = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (key, value)]
    for is_causal in (False, True):
        clean = attend(features, query, key, value, mask, is_causal)
        torch.testing.assert_close(attend(features, query, *soiled, mask, is_causal), clean)


@pytest.mark.parametrize("masked", [False, True])
def test_centred_keys_have_no_mean_and_change_no_softmax(masked: bool) -> None:
    query, key, value = inputs(20, heads=4)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None] if masked else None
    shifted = key + 3
    if mask is not None:
        shifted = shifted.masked_fill(~mask[:, None, :, None], torch.nan)
    centred = centre_keys(shifted, mask)
    means = centred.nansum(-2)
    torch.testing.assert_close(means, torch.zeros_like(means))
    expected = softmax_attention(query, key, value, mask)
    torch.testing.assert_close(softmax_attention(query, centred.nan_to_num(), value, mask), expected)


def test_keys_of_which_none_counts_stay_finite() -> None:
    _, key, _ = inputs(5)
    assert torch.isfinite(centre_keys(key, torch.zeros(2, 5, dtype=torch.bool))).all()


def test_a_million_tokens_fit_into_little_memory() -> None:
    """32 wide with 128 features: 0.5 GB of inputs and output, 1 GB of features if they were all held."""
    code = """
import resource
import torch
from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.kernels import KERNELS
from schoenbat.ops.blockwise import attend

torch.set_num_threads(1)
features = RandomMaclaurin(
    KERNELS.get("exp")(), head_dim=32, num_features=128, max_degree=20, generator=torch.Generator().manual_seed(0)
)
x = torch.randn(1, 1, 1_000_000, 32, generator=torch.Generator().manual_seed(1)) * 0.3
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    out = attend(features, x, x, x)
    causal = attend(features, x, x, x, is_causal=True)
assert torch.isfinite(out).all() and torch.isfinite(causal).all()
torch.testing.assert_close(out[:, :, -1], causal[:, :, -1], rtol=1e-3, atol=1e-4)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux only")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.0, "GiB beyond the interpreter and the inputs"
