"""The linear forms equal the quadratic definition on the same weights, in whole and in parts, with their gradients."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.features.plan import FeatureMap
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.ops import linear
from schoenbat.ops._causal import chunk_length
from schoenbat.ops.linear import State, attend, causal_linear_attention, extend, linear_attention
from schoenbat.ops.reference import divide, kernel_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
FORMS = [linear_attention, causal_linear_attention]
HEAD_DIM = 8


def given(length: int, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Positive features, so that no denominator is near zero, and values."""
    generator = torch.Generator().manual_seed(length)
    features = torch.rand(2, batch, 2, length, 5, generator=generator, dtype=torch.float64) + 0.1
    value = torch.randn(batch, 2, length, 3, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (*features, value)]


def mask_of(lengths: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def quadratic(form: Attend, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    weights = query @ key.transpose(-1, -2)
    if form is causal_linear_attention:
        weights = weights.tril()
    if key_mask is not None:
        weights = weights * key_mask[:, None, None, :]
    return divide(weights @ value, weights.sum(-1, keepdim=True))


def draw(name: str = "sketch", kernel: str | Kernel = "exp", num_features: int = 24, head_dim: int = 8) -> FeatureMap:
    """A feature map for vectors of any length."""
    generator = torch.Generator().manual_seed(0)
    f = KERNELS.get(kernel)() if isinstance(kernel, str) else kernel
    sizes = {"head_dim": head_dim, "num_features": num_features, "max_degree": 8}
    if name == "maclaurin":
        return RandomMaclaurin(f, **sizes, generator=generator)
    return Sketch(f, **sizes, scale=1.0 if f.radius > 1 else f.radius / 2, fixed_norm=False, generator=generator)


def inputs(length: int, *, heads: int = 2, dtype: torch.dtype = torch.float64, size: float = 0.4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, length, HEAD_DIM, generator=generator, dtype=torch.float64) * size
    key = torch.randn(2, heads, length, HEAD_DIM, generator=generator, dtype=torch.float64) * size
    value = torch.randn(2, heads, length, 3, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (query, key, value)]


WAYS = [(name, is_causal) for name in ("sketch", "maclaurin") for is_causal in (False, True)]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 2049])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_equal_the_quadratic_form_with_variable_lengths(form: Attend, length: int) -> None:
    mask = mask_of([length, (length + 1) // 2], length)
    results = []
    for either in (form, lambda *args: quadratic(form, *args)):
        leaves = [x.requires_grad_() for x in given(length)]
        out = either(*leaves, mask)
        (out * torch.linspace(-1, 1, 3, dtype=torch.float64)).square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_published_features_give_the_attention_of_their_products(length: int) -> None:
    features = draw("maclaurin")
    query, key, value = inputs(length, heads=4)
    mask = mask_of([length, (length + 1) // 2], length)
    for is_causal, form in ((False, linear_attention), (True, causal_linear_attention)):
        expected = quadratic(form, features(0.5 * query), features(0.5 * key), value, mask)
        found = attend(features, query, key, value, mask, is_causal, scale=0.25)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kernel", ["exp", "inverse", "power2"])
def test_within_a_chunk_causal_attention_is_exact(kernel: str) -> None:
    features = draw(kernel=kernel)
    query, key, value = inputs(64, heads=4, size=0.2)
    mask = mask_of([64, 40], 64)
    assert chunk_length(features) == 64
    expected = kernel_attention(0.5 * query, key, value, features.kernel, mask, True)
    torch.testing.assert_close(attend(features, query, key, value, mask, True, scale=0.5), expected)


@pytest.mark.parametrize("kernel", ["exp", "power2", "log"])
def test_complete_features_make_the_far_field_exact_too(kernel: str) -> None:
    # 2 coordinates: 45 monomials are all degrees up to 8, and the arguments stay below 0.1.
    features = draw(kernel=kernel, num_features=45, head_dim=2)
    generator = torch.Generator().manual_seed(5)
    query, key = torch.rand(2, 1, 2, 200, 2, generator=generator, dtype=torch.float64) * 0.2 + 0.02
    value = torch.randn(1, 2, 200, 3, generator=generator, dtype=torch.float64)
    expected = kernel_attention(query, key, value, features.kernel, None, True)
    torch.testing.assert_close(attend(features, query, key, value, None, True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "is_causal"), WAYS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_blocks_and_groups_give_the_same_outputs_and_gradients(name: str, heads: int, is_causal: bool) -> None:
    features = draw(name)
    mask = mask_of([150, 73], 150)
    results = []
    for block, repeat in ((None, True), (None, False), (7, False), (64, False)):
        query, key, value = (x.requires_grad_() for x in inputs(150, heads=heads))
        wide = [x.repeat_interleave(4 // heads, 1) if repeat else x for x in (key, value)]
        out = attend(features, query, *wide, mask, is_causal, block=block)
        out.square().sum().backward()
        results.append([out, query.grad, key.grad, value.grad])
    # Not causal, the mean query is that of all heads of a group.
    first = 1 if not is_causal and name == "sketch" else 0
    for other in results[first + 1 :]:
        for ours, theirs in zip(other, results[first], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["sketch", "maclaurin"])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_parts_equal_the_whole_and_the_state_keeps_its_size(name: str, is_recorded: bool) -> None:
    features = draw(name, num_features=40)
    query, key, value = inputs(500)
    mask = mask_of([500, 320], 500)
    expected = attend(features, query, key, value, mask, True, scale=0.7)
    state, outputs, start, largest = None, [], 0, 0
    for length in [1] * 70 + [0, 128, 3, 63, 64, 1, 100, 71]:
        part = slice(start, start + length)
        tensors = (x[:, :, part] for x in (query, key, value))
        with torch.set_grad_enabled(is_recorded):
            out, state = extend(features, state, *tensors, mask[:, part], scale=0.7)
        outputs.append(out)
        start += length
        assert isinstance(state, State)
        sizes: list[int] = []
        state.map(lambda x, sizes=sizes: sizes.append(x.numel()) or x)
        largest = max(largest, sum(sizes))
    assert start == 500
    torch.testing.assert_close(torch.cat(outputs, 2), expected)
    per_head = 41 * 4 + 4 + 9 * 8 + 8 + 64 * (8 + 4)
    assert largest <= 2 * 2 * per_head


def test_keys_alone_prime_the_state() -> None:
    features = draw()
    query, key, value = inputs(150)
    expected = attend(features, query, key, value, None, True)
    for first in (1, 64, 100):
        _, state = extend(features, None, query[:, :, :0], key[:, :, :first], value[:, :, :first])
        out, _ = extend(features, state, query[:, :, first:], key[:, :, first:], value[:, :, first:])
        torch.testing.assert_close(out, expected[:, :, first:])
        last, _ = extend(features, state, query[:, :, -1:], key[:, :, first:], value[:, :, first:])
        torch.testing.assert_close(last, expected[:, :, -1:])


@pytest.mark.parametrize("kernel", ["exp", "power2"])
def test_texts_that_go_on_from_one_state_do_not_disturb_each_other(kernel: str) -> None:
    features = draw(kernel=kernel)
    query, key, value = (x.float() for x in inputs(140, heads=4, size=0.2))
    other = [x.clone() for x in (query, key, value)]
    for x in other:
        x[:, :, 100:] = x[:, :, 100:].flip(2)
    with torch.no_grad():
        expected = [attend(features, *given, None, True) for given in ((query, key, value), other)]
        _, begun = extend(features, None, *(x[:, :, :99] for x in (query, key, value)))
        _, begun = extend(features, begun, *(x[:, :, 99:100] for x in (query, key, value)))
        states = [begun, begun]
        for i in range(100, 140):
            for which, given in enumerate(((query, key, value), other)):
                out, states[which] = extend(features, states[which], *(x[:, :, i : i + 1] for x in given))
                torch.testing.assert_close(out, expected[which][:, :, i : i + 1], rtol=1e-5, atol=1e-5)


def test_a_state_made_in_inference_mode_serves_outside_of_it() -> None:
    features = draw()
    query, key, value = inputs(40)
    with torch.inference_mode():
        _, state = extend(features, None, *(x[:, :, :38] for x in (query, key, value)))
        _, state = extend(features, state, *(x[:, :, 38:39] for x in (query, key, value)))
    expected = attend(features, query, key, value, None, True)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            out, _ = extend(features, state, *(x[:, :, 39:] for x in (query, key, value)))
        torch.testing.assert_close(out, expected[:, :, 39:])


@pytest.mark.parametrize(("name", "is_causal"), WAYS)
def test_no_batch_and_no_token_give_none(name: str, is_causal: bool) -> None:
    features = draw(name)
    for query, key, value in (
        [x[:0] for x in inputs(70)],
        [x[:, :, :0] for x in inputs(4)],
    ):
        assert attend(features, query, key, value, None, is_causal).shape == (*query.shape[:3], 3)
    query, key, value = inputs(4)
    if not is_causal:
        assert (attend(features, query, key[:, :, :0], value[:, :, :0]) == 0).all()
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert (attend(features, query, key, value, nothing, is_causal) == 0).all()


@pytest.mark.parametrize(("name", "is_causal"), WAYS)
def test_first_and_second_gradients_are_those_of_finite_differences(
    name: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("schoenbat.ops._causal.chunk_length", lambda _: 2)
    features = draw(name, num_features=14)
    leaves = tuple(x[:1, :1, :, :].clone().requires_grad_() for x in inputs(5, heads=4))
    mask = torch.tensor([[True, True, False, True, True]])

    def outputs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(features, query, key, value, mask, is_causal)

    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)


@pytest.mark.parametrize("size", ["at once", "in pieces"])
@pytest.mark.parametrize(("name", "is_causal"), WAYS)
def test_torch_func_passes_through(name: str, is_causal: bool, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schoenbat.ops._planned.FEW_ROWS", 2**20 if size == "at once" else 0)
    monkeypatch.setattr("schoenbat.ops._causal.chunk_length", lambda _: 4)
    features = draw(name, num_features=14)
    query, key, value = (x[:, :2] for x in inputs(9, heads=2))

    def loss(*one: Tensor) -> Tensor:
        return attend(features, *(x[None] for x in one), None, is_causal).square().sum()

    per_entry = vmap(grad(loss, argnums=(0, 1, 2)))(query, key, value)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    attend(features, *leaves, None, is_causal).square().sum().backward()
    for ours, leaf in zip(per_entry, leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad)

    one = tuple(x[0] for x in (query, key, value))
    tangents = tuple(torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype) for x in one)
    _, directional = jvp(loss, one, tangents)
    expected = sum((g * t).sum() for g, t in zip(grad(loss, argnums=(0, 1, 2))(*one), tangents, strict=True))
    torch.testing.assert_close(directional, expected)

    def of_query(q: Tensor) -> Tensor:
        return loss(q, *one[1:])

    second = hessian(of_query)(one[0])
    torch.testing.assert_close(second, torch.autograd.functional.hessian(of_query, one[0]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "is_causal"), WAYS)
def test_compiles_without_a_graph_break(name: str, is_causal: bool) -> None:
    features = draw(name)
    mask = mask_of([150, 33], 150)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(features, query, key, value, mask, is_causal).square().sum()

    results = []
    for form in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.requires_grad_() for x in inputs(150)]
        form(*leaves).backward()
        results.append([x.grad for x in leaves])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "is_causal"), WAYS)
def test_compiled_once_it_serves_all_lengths(name: str, is_causal: bool) -> None:
    """A few graphs at most, however many lengths come: one for less and one for more than a chunk."""
    features = draw(name)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def compiled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(features, query, key, value, None, is_causal)

    for length in [*range(5, 14), 70, 150, 200]:
        tensors = inputs(length)
        torch.testing.assert_close(compiled(*tensors), attend(features, *tensors, None, is_causal))
    assert len(graphs) <= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_summed_in_float32(form: Attend, dtype: torch.dtype) -> None:
    # 70,000 terms of about 1 lie beyond float16's range, and beyond the 8 bits of bfloat16.
    length = 70_000
    features = torch.ones(1, 1, length, 2, dtype=dtype)
    value = torch.randn(1, 1, length, 3, generator=torch.Generator().manual_seed(0)).add(1).to(dtype)
    out = form(features, features, value, None)
    assert out.dtype == dtype
    expected = value.double().mean(2)
    torch.testing.assert_close(out[:, :, -1].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "is_causal"), WAYS)
def test_half_precision_stays_close_and_keeps_its_dtype(name: str, dtype: torch.dtype, is_causal: bool) -> None:
    features = draw(name)
    half = [x.to(dtype) for x in inputs(3000)]
    out = attend(features, *half, None, is_causal)
    assert out.dtype == dtype
    # Inputs and output are rounded; what is in between is not.
    expected = attend(features, *(x.double() for x in half), None, is_causal)
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize(("name", "is_causal"), WAYS)
def test_autocast_does_not_reach_the_statistics(name: str, is_causal: bool) -> None:
    features = draw(name)
    tensors = inputs(90, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attend(features, *tensors, None, is_causal)
    assert torch.equal(inside, attend(features, *tensors, None, is_causal))


@pytest.mark.parametrize("soil", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(("name", "is_causal"), WAYS)
def test_masked_places_may_hold_anything(name: str, is_causal: bool, soil: float) -> None:
    features = draw(name)
    clean = inputs(150, heads=4)
    mask = mask_of([150, 81], 150)
    soiled = [x.masked_fill(~mask[:, None, :, None], soil) for x in clean]
    expected = attend(features, *clean, mask, is_causal)
    found = attend(features, *soiled, mask, is_causal)
    assert torch.equal(found.transpose(1, 2)[mask], expected.transpose(1, 2)[mask])


def test_a_kernel_of_both_signs_gives_the_same_within_a_chunk_exact_or_not_and_is_finite_beyond() -> None:
    sinh = Kernel.from_callable(torch.sinh)
    features = draw(kernel=sinh)
    query, key, value = inputs(200, heads=4, size=1.0)
    head = [x[:, :, :64] for x in (query, key, value)]
    exact = kernel_attention(*head, sinh, None, True)
    torch.testing.assert_close(attend(features, *head, None, True), exact)
    for is_causal in (False, True):
        whole = kernel_attention(query, key, value, sinh, None, is_causal)
        found = attend(features, query, key, value, None, is_causal)
        assert found.abs().max() < 10 * whole.abs().max() < torch.inf


@pytest.mark.parametrize("sum_of_weights", [0.0, -0.0, 1e-30, -1e-30, 1e-7, -1e-7])
@pytest.mark.parametrize("form", FORMS)
def test_a_denominator_near_zero_is_moved_away(form: Attend, sum_of_weights: float) -> None:
    """By the rule of `divide`: outputs and gradients stay finite, and the floor of 1e-6 has the sign of the sum."""
    query = torch.tensor([[[[1.0]]]], requires_grad=True)
    key = torch.tensor([[[[sum_of_weights]]]], requires_grad=True)
    value = torch.tensor([[[[2.0]]]], requires_grad=True)
    out = form(query, key, value, None)
    out.backward()
    expected = 2.0 * sum_of_weights / (-1e-6 if sum_of_weights < 0 else 1e-6)
    assert out.item() == pytest.approx(expected)
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))


def test_nan_at_an_attended_place_is_passed_on() -> None:
    query, key, value = given(4)
    value[0, 0, 1, 0] = torch.nan
    assert linear_attention(query, key, value, None).isnan().any()


def test_unequal_lengths_are_refused() -> None:
    query, key, value = given(4)
    with pytest.raises(ValueError, match="as many queries as keys, got 3 and 4"):
        causal_linear_attention(query[:, :, :3], key, value, None)


def test_without_a_gradient_blocks_are_the_default_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BLOCK", {"cpu": 256})
    for name in ("sketch", "maclaurin"):
        features = draw(name)
        tensors = inputs(900)
        with torch.no_grad():
            blocks = attend(features, *tensors, None, True)
        torch.testing.assert_close(blocks, attend(features, *tensors, None, True))


@pytest.mark.slow
def test_a_million_tokens_fit_into_little_memory() -> None:
    """32 wide with 128 features: 0.5 GB of inputs and output, 1 GB of features if they were all held."""
    code = """
import resource
import torch
from schoenbat import Estimate

torch.set_num_threads(1)
estimate = Estimate(num_features=128)
x = torch.randn(1, 1, 1_000_000, 32, generator=torch.Generator().manual_seed(1)) * 0.3
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    out = estimate.attend(x, x, x)
    causal = estimate.attend(x, x, x, is_causal=True)
assert torch.isfinite(out).all() and torch.isfinite(causal).all()
torch.testing.assert_close(out[:, :, -1], causal[:, :, -1], rtol=1e-2, atol=2e-3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux only")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 0.8, "GiB beyond the interpreter and the inputs"
