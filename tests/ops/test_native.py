"""The compiled form of attention is the formula, is chosen where it can be, and is built once by whoever asks first."""

import itertools
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_naive import CASES, SCALE, features_of, inputs_of
from torch import Tensor

from schoenbat import Estimate, UserError
from schoenbat.features.plan import FeatureMap, Products, expand
from schoenbat.kernels import Kernel
from schoenbat.ops import linear, native
from schoenbat.ops._planned import look_up, sum_keys
from schoenbat.ops.naive import naive_attention
from schoenbat.ops.native import build
from schoenbat.ops.reference import AttentionInputs

pytestmark = pytest.mark.skipif(build.load().library is None, reason=build.load().reason)

CAUSAL, SELF = False, True


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.VARIABLE, "compiled")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions in C++ that are called."""
    found: list[str] = []
    call = native._call

    def note(name: str, *rest: Any) -> bool:
        found.append(name)
        return call(name, *rest)

    monkeypatch.setattr(native, "_call", note)
    return found


def made(
    length: int, keys: int | None = None, *, heads: int = 2, key_heads: int = 2, width: int = 32, size: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((heads, length, width), (key_heads, keys or length, width), (key_heads, keys or length, 20))
    query, key, value = (torch.randn(2, *shape, generator=generator) for shape in shapes)
    return [query * size + 0.2, key * size - 0.1, value]


def results(attend: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the output and the gradients of all tensors."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out = attend(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weight)]


def assert_alike(found: list[Tensor], expected: list[Tensor], limit: float = 3e-6, case: str = "") -> None:
    """Within `limit`, relative to the size of each tensor as a whole."""
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-6)
        assert error < limit, f"{case}, tensor {place}: {error:.1e}"


@pytest.mark.parametrize(("kernel", "name"), CASES, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
@pytest.mark.parametrize("bounded", [False, True])
def test_it_is_the_formula_for_every_plan_and_kernel(
    kernel: Kernel, name: str, bounded: bool, calls: list[str]
) -> None:
    features = features_of(name, kernel)
    if bounded and not (features.is_bounded and features.centres and features.sketched != 1):
        pytest.skip("left to the torch form")
    short = not (bounded and kernel.is_exponential)
    for (masked, groups), itself in itertools.product(((False, 1), (True, 2)), (False, True)):
        inputs = inputs_of(short, masked, CAUSAL, itself, groups)
        rest = (inputs.key_mask, CAUSAL, SCALE, itself)

        def formula(*tensors: Tensor, rest: tuple = rest) -> Tensor:
            return naive_attention(features, AttentionInputs(*tensors, *rest), bounded)

        def form(*tensors: Tensor, rest: tuple = rest) -> Tensor:
            return linear.attend(features, *tensors, *rest, bounded=bounded)

        calls.clear()
        found, expected = results(form, list(inputs[:3])), results(formula, list(inputs[:3]), torch.float64)
        assert calls == ["schoenbat_forward", "schoenbat_backward"]
        # Where denominators come near 0, float32 is not better in the torch form.
        limit = 1e-5 if kernel.is_exponential else 1e-4
        assert_alike(found, expected, limit, f"masked {masked}, self-attention {itself}, {groups} queries a head")


@pytest.mark.parametrize("num_features", [33, 128, 600])
@pytest.mark.parametrize("length", [1, 2, 16, 191, 192, 193, 450])
def test_it_is_the_torch_form_at_every_length(num_features: int, length: int) -> None:
    features = Estimate(num_features=num_features).make(32)
    for keys, itself, heads, bounded in ((None, True, 2, True), (77, False, 4, True), (None, True, 4, False)):
        tensors = made(length, keys, heads=heads, size=1.5 if bounded else 0.7)
        mask = torch.rand(2, keys or length, generator=torch.Generator().manual_seed(3)) < 0.7
        for key_mask in (None, mask):
            rest = (key_mask, CAUSAL, 32**-0.5, itself)

            def form(*tensors: Tensor, rest: tuple = rest, bounded: bool = bounded) -> Tensor:
                return linear.attend(features, *tensors, *rest, bounded=bounded)

            case = f"keys {keys}, masked {key_mask is not None}, bounded {bounded}"
            assert_alike(results(form, tensors), results(form, tensors, torch.float64), case=case)


@pytest.mark.parametrize("heads", [1, 3])
def test_threads_change_nothing_but_the_order_of_sums(heads: int) -> None:
    """Where there are fewer heads than threads their tokens are shared out."""
    features = Estimate(num_features=128).make(32)
    tensors = [x[:1] for x in made(1000, heads=heads, key_heads=heads)]
    mask = torch.rand(1, 1000, generator=torch.Generator().manual_seed(3)) < 0.7

    def form(*tensors: Tensor) -> Tensor:
        return linear.attend(features, *tensors, mask, scale=0.2, self_attention=SELF)

    expected = results(form, tensors)
    torch.set_num_threads(3)
    try:
        found = results(form, tensors)
    finally:
        torch.set_num_threads(1)
    assert_alike(found, expected, 1e-6)
    if heads == 1:
        assert not all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("width", [1, 3, 17, 64, 100])
def test_it_is_the_torch_form_at_every_width(width: int) -> None:
    for estimator in ("sketch", "maclaurin"):
        features = Estimate(num_features=2 * width + 9, estimator=estimator).make(width)

        def form(*tensors: Tensor, features: FeatureMap = features) -> Tensor:
            return linear.attend(features, *tensors, scale=0.5 / width, self_attention=SELF)

        tensors = made(70, width=width, size=0.3)
        assert_alike(results(form, tensors), results(form, tensors, torch.float64), 1e-5)


def test_tensors_need_not_lie_in_one_piece() -> None:
    features = Estimate(num_features=128).make(32)
    tensors = made(60, heads=4)
    mask = torch.tensor([[True], [False]]).expand(2, 60)

    def form(*tensors: Tensor) -> Tensor:
        return linear.attend(features, *tensors, mask, scale=0.2, self_attention=SELF)

    def turned(*tensors: Tensor) -> Tensor:
        query, key, value = tensors
        apart = query.transpose(1, 2).contiguous().transpose(1, 2), key.mT.contiguous().mT, value[..., ::2]
        return form(*apart)

    expected = results(lambda q, k, v: form(q, k, v[..., ::2].contiguous()), tensors)
    for ours, theirs in zip(results(turned, tensors), expected, strict=True):
        assert torch.equal(ours, theirs)
    spread = torch.autograd.grad(turned(*(x.requires_grad_() for x in tensors)).sum(), tensors[0])[0]
    assert spread.shape == tensors[0].shape


@pytest.mark.parametrize("soil", [float("nan"), float("inf")])
@pytest.mark.parametrize("bounded", [False, True])
def test_masked_places_may_hold_anything_in_gradients_too(soil: float, bounded: bool) -> None:
    features = Estimate(num_features=128).make(32)
    clean = made(250)
    mask = torch.arange(250) < torch.tensor([250, 131])[:, None]

    def form(*tensors: Tensor) -> Tensor:
        out = linear.attend(features, *tensors, mask, scale=0.2, self_attention=SELF, bounded=bounded)
        return out.transpose(1, 2)[mask]

    soiled = [x.masked_fill(~mask[:, None, :, None], soil) for x in clean]
    out, *grads = results(form, soiled)
    expected, *others = results(form, clean)
    assert torch.equal(out, expected)
    for ours, theirs in zip(grads, others, strict=True):
        assert torch.equal(ours.transpose(1, 2)[mask], theirs.transpose(1, 2)[mask])
        assert (ours.transpose(1, 2)[~mask] == 0).all()


def test_nan_at_an_attended_place_is_passed_on() -> None:
    features = Estimate(num_features=128).make(32)
    query, key, value = made(20)
    value[0, 0, 3] = torch.nan
    out = linear.attend(features, query, key, value, scale=0.2)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("itself", [False, True])
def test_nothing_to_attend_to_gives_zero(itself: bool, bounded: bool) -> None:
    features = Estimate(num_features=128).make(32)
    query, key, value = made(20)
    mask = torch.tensor([[True], [False]]).expand(2, 20)

    def form(*tensors: Tensor) -> Tensor:
        return linear.attend(features, *tensors, mask, scale=0.2, self_attention=itself, bounded=bounded)

    out, *grads = results(form, [query, key, value])
    assert (out[1] == 0).all()
    assert all(x.isfinite().all() for x in (out, *grads))
    assert all((x[1] == 0).all() for x in grads[1:])
    for tensors in ([x[:0] for x in (query, key, value)], [x[:, :, :0] for x in (query, key, value)]):
        found = linear.attend(features, *tensors, scale=0.2, self_attention=itself, bounded=bounded)
        assert found.shape == (*tensors[0].shape[:3], 20)
    out = linear.attend(features, query, key[:, :, :0], value[:, :, :0], bounded=bounded)
    assert (out == 0).all()


def test_vectors_of_length_zero_have_finite_gradients() -> None:
    features = Estimate(num_features=128).make(32)
    _, key, value = made(20)
    for tensors in ([torch.zeros(2, 2, 20, 32), key, value], [torch.zeros(2, 2, 20, 32)] * 2 + [value]):
        found = results(lambda *x: linear.attend(features, *x, scale=0.2), tensors)
        assert all(x.isfinite().all() for x in found)


def test_coordinates_that_would_overflow_are_clamped_as_in_the_torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Estimate(num_features=128).make(32)
    query, key, value = made(20)
    query[0, 0, 3, 5], key[0, 1, 2, 7] = 1e30, -1e25

    def form(*tensors: Tensor) -> Tensor:
        return linear.attend(features, *tensors, scale=0.2)

    found = results(form, [query, key, value])
    monkeypatch.setenv(build.VARIABLE, "torch")
    expected = results(form, [query, key, value])
    assert all(x.isfinite().all() for x in found)
    assert found[1][0, 0, 3, 5] == found[2][0, 1, 2, 7] == 0
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_through_it_and_comes_back(dtype: torch.dtype, calls: list[str]) -> None:
    features = Estimate(num_features=128).make(32)
    tensors = [x.to(dtype) for x in made(100)]
    found = results(lambda *x: linear.attend(features, *x, scale=0.2, self_attention=SELF), tensors, dtype)
    assert calls == ["schoenbat_forward", "schoenbat_backward"]
    assert all(x.dtype == dtype for x in found)
    expected = results(lambda *x: linear.attend(features, *x, scale=0.2, self_attention=SELF), tensors, torch.float64)
    assert_alike(found, expected, 2 * torch.finfo(dtype).eps)


def test_what_it_does_not_compute_is_left_to_the_torch_form(calls: list[str]) -> None:
    features = Estimate(num_features=128).make(32)
    tensors = made(20)

    def attend(*tensors: Tensor) -> Tensor:
        return linear.attend(features, *tensors, scale=0.2)

    attend(*(x.double() for x in tensors))
    torch.func.grad(lambda x: attend(x, *tensors[1:]).sum())(tensors[0])
    torch.func.jvp(lambda x: attend(x, *tensors[1:]), (tensors[0],), (tensors[0],))
    with torch.autograd.forward_ad.dual_level():
        assert not calls
        attend(torch.autograd.forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])
    assert "schoenbat_forward" not in calls


def test_gradients_can_be_differentiated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Estimate(num_features=40).make(8)
    tensors = [x[:1, :1, :, :8] * 0.5 for x in made(7)]

    def second(*tensors: Tensor) -> Tensor:
        out = linear.attend(features, *tensors, self_attention=SELF)
        return torch.cat([x.flatten() for x in torch.autograd.grad(out.square().sum(), tensors, create_graph=True)])

    found = results(second, tensors)
    monkeypatch.setenv(build.VARIABLE, "torch")
    assert_alike(found, results(second, tensors), 1e-5)


def operation(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor], key_mask: Tensor | None) -> tuple:
    """The arguments of the registered operation, for a call of `attend`."""
    seen: list[tuple] = []
    forward = native._forward
    with monkeypatch.context() as patch:
        patch.setattr(native, "_forward", lambda *args: seen.append(args) or forward(*args))
        features = Estimate(num_features=20).make(tensors[0].shape[-1])
        linear.attend(features, *tensors, key_mask, self_attention=SELF)
    return (*seen[0][:-1], True)


def test_the_operation_keeps_the_rules_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    for key_mask in (None, mask):
        tensors = [x[:, :, :, :8].requires_grad_() for x in made(9)]
        args = (*tensors, *operation(monkeypatch, tensors, key_mask)[3:])
        torch.library.opcheck(torch.ops.schoenbat.attend, args)
        out, *kept = torch.ops.schoenbat.attend(*args)
        query, key, value, key_mask, projection, plan, numbers, _ = args
        given = (query, key, value, key_mask, projection, *kept, plan, numbers)
        given = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
        torch.library.opcheck(torch.ops.schoenbat.attend_backward, (torch.ones_like(out), *given))


@pytest.mark.parametrize("is_masked", [False, True])
def test_nothing_that_is_kept_depends_on_what_the_memory_held(monkeypatch: pytest.MonkeyPatch, is_masked: bool) -> None:
    mask = torch.tensor([[True] * 9, [True] * 4 + [False] * 5]) if is_masked else None
    tensors = [x[..., :8] for x in made(9)]
    _, _, _, _, projection, plan, numbers, _ = operation(monkeypatch, tensors, mask)
    found = []
    for held in (0.0, math.nan):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", lambda x, *size, held=held: x.new_full(size, held))
            found.append(torch.ops.schoenbat.attend(*tensors, mask, projection, plan, numbers, True))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_the_operation_can_be_mapped_over_and_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [x[..., :8] for x in made(9)]
    mask = torch.rand(3, 2, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    _, _, _, _, projection, plan, numbers, _ = operation(monkeypatch, tensors, mask[0])
    query = torch.stack([tensors[0] * factor for factor in (1, 0.5, 2)])

    def one(query: Tensor, mask: Tensor) -> Tensor:
        return torch.ops.schoenbat.attend(query, *tensors[1:], mask, projection, plan, numbers, True)[0]

    expected = torch.stack([one(*each) for each in zip(query, mask, strict=True)])
    assert torch.equal(torch.func.vmap(one)(query, mask), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(one(query[0], mask[0]), expected[0])


@pytest.mark.slow
def test_it_stands_in_a_compiled_graph_as_one_operation() -> None:
    features = Estimate(num_features=40).make(8)
    graphs = []

    def note(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def form(*tensors: Tensor) -> Tensor:
        return linear.attend(features, *tensors, self_attention=SELF)

    torch._dynamo.reset()
    graph = torch.compile(form, fullgraph=True, backend=note, dynamic=True)
    for length in (9, 30, 31):
        tensors = [x[..., :8] for x in made(length)]
        assert torch.equal(graph(*tensors), form(*tensors))
    assert len(graphs) == 1
    assert "schoenbat.attend" in graphs[0].code
    trained = torch.compile(form, fullgraph=True, backend="aot_eager")
    assert_alike(results(trained, tensors), results(form, tensors))


def test_an_exported_program_is_made_of_operations_of_torch() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = Estimate(num_features=40).make(8)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return linear.attend(self.features, query, key, value)

    program = torch.export.export(Layer(), tuple(x[..., :8] for x in made(9)))
    assert "schoenbat" not in program.graph_module.code


def test_nothing_of_the_size_of_features_is_kept() -> None:
    features = Estimate(num_features=561).make(32)
    tensors = [x.requires_grad_() for x in made(2000)]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        out = linear.attend(features, *tensors, scale=0.2, self_attention=SELF)
    assert sum(sizes) < 1.3 * (sum(x.numel() for x in tensors) + out.numel())


@pytest.mark.parametrize("kernel", ["exp", "inverse", "power2"])
@pytest.mark.parametrize(("num_features", "is_causal"), [(20, False), (128, False), (128, True), (600, True)])
def test_the_forms_that_are_not_one_operation_sum_up_and_look_up_in_it(
    kernel: str, num_features: int, is_causal: bool, calls: list[str]
) -> None:
    features = Estimate(kernel, num_features, normalize=True).make(32)
    # Inside the radius of convergence of the others.
    tensors = made(400, heads=4, size=1.0 if kernel == "exp" else 0.15)
    mask = torch.rand(2, 400, generator=torch.Generator().manual_seed(3)) < 0.7
    # Each query sees a key.
    mask[:, 0] = True

    def form(*tensors: Tensor) -> Tensor:
        return linear.attend(features, *tensors, mask, is_causal, scale=0.2, bounded=True)

    found = results(form, tensors)
    if is_causal or kernel != "exp" or num_features < 33:
        assert {"schoenbat_sum_keys", "schoenbat_look_up_backward"} < set(calls)
    assert_alike(found, results(form, tensors, torch.float64), 1e-5)


@pytest.mark.parametrize(("num_features", "width"), [(1, 3), (9, 8), (45, 8), (300, 17)])
@pytest.mark.parametrize("length", [1, 64, 200, 1000])
def test_sums_over_keys_and_look_ups_are_those_of_the_features(num_features: int, width: int, length: int) -> None:
    products = Estimate("inverse", num_features, normalize=True).make(width).products(torch.float64, 0.5)
    query, key, value = (x[..., :width] for x in made(length, width=max(width, 20), heads=1, key_heads=1, size=0.5))
    for part in (products, *products.split(2)):
        if not part.plan.num_features:
            continue
        single = part._replace(projection=part.projection.float(), squares=part.squares.float())

        def form(*x: Tensor, part: Products = part, single: Products = single) -> Tensor:
            own = single if x[0].dtype == torch.float32 else part
            return look_up(x[0].mT.contiguous().mT, sum_keys(x[1], x[2], own), own)

        expected = expand(query.double() @ part.projection, part.plan) * part.squares.T
        expected = expected @ expand(key.double() @ part.projection, part.plan).mT @ value.double()
        found = results(form, [query, key, value])
        assert_alike([found[0], *found[1:]], results(form, [query, key, value], torch.float64), 1e-5)
        assert_alike(found[:1], [expected], 1e-5)


# ---- the choice of a form, and how it is built


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._load.cache_clear()
    yield tmp_path / "schoenbat"
    build._load.cache_clear()


def test_the_variable_chooses(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    features, tensors = Estimate(num_features=128).make(32), made(20)
    expected = linear.attend(features, *tensors, scale=0.2)
    assert calls.pop() == "schoenbat_forward"
    monkeypatch.setenv(build.VARIABLE, "torch")
    torch.testing.assert_close(linear.attend(features, *tensors, scale=0.2), expected)
    assert not calls
    assert build.load().reason == "SCHOENBAT_OPS is torch"
    monkeypatch.setenv(build.VARIABLE, "fast")
    with pytest.raises(UserError, match="SCHOENBAT_OPS must be one of torch, compiled, not 'fast'"):
        linear.attend(features, *tensors, scale=0.2)


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "/bin/false"])
def test_without_a_compiler_that_works_the_torch_form_does(
    compiler: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(UserError, match=r"SCHOENBAT_OPS is compiled, but (there is no compiler|/bin/false fails)"):
        build.load()
    monkeypatch.delenv(build.VARIABLE)
    features, tensors = Estimate(num_features=128).make(32), made(20)
    assert linear.attend(features, *tensors, scale=0.2).isfinite().all()
    assert build.load().library is None
    assert not list(empty_cache.glob("*.so"))


def test_a_source_that_does_not_compile_is_one_line(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(build.VARIABLE)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-fno-such-flag"))
    with caplog.at_level(logging.WARNING):
        assert build.load().library is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "-fno-such-flag" in caplog.messages[1]
    assert not list(empty_cache.glob("*.so"))


@pytest.mark.slow
def test_processes_that_start_together_build_it_once(empty_cache: Path) -> None:
    code = """
import torch
from schoenbat import Estimate
x = torch.randn(1, 1, 9, 8)
assert torch.isfinite(Estimate(num_features=20).attend(x, x, x)).all()
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(empty_cache.parent), "PYTHONWARNINGS": "ignore"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert "".join(said).count("compiling attention for this processor") == 1
    assert [path.suffix for path in sorted(empty_cache.iterdir())] == [".lock", ".so"]


def test_importing_builds_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import schoenbat.estimate"], env=environment, check=True)
    assert not list(tmp_path.iterdir())
