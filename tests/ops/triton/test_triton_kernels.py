"""The kernels for GPUs compute the formulas: interpreted where there is no GPU."""

import types
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernel_cases import CASES, DEVICE, Case, assert_kernels_are_the_formulas, features_of, inputs_of, results

from schoenbat.errors import UserError
from schoenbat.ops import linear, triton
from schoenbat.ops.triton import launch

SMALL = Case("small", num_features=40, queries=9)


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


QUICK = ("several blocks", "masked", "unbounded", "bfloat16")
MARKED = [pytest.param(case, marks=[] if case.name in QUICK else [pytest.mark.slow]) for case in CASES]


@pytest.mark.parametrize("case", MARKED, ids=lambda case: case.name)
def test_kernels_are_the_formulas(case: Case) -> None:
    assert_kernels_are_the_formulas(case)


def attend(case: Case, *tensors: torch.Tensor) -> torch.Tensor:
    features, inputs = features_of(case).to(DEVICE), inputs_of(case)
    return triton.attend(features, *tensors, inputs.key_mask, inputs.scale, True, features.is_bounded)


@pytest.mark.parametrize("features", ["bounded", "maclaurin"])
def test_a_batch_entry_without_keys_gives_zero_and_finite_gradients(features: str) -> None:
    case = SMALL._replace(features=features, batch=2, masked=True)
    tensors = [torch.nan_to_num(x).requires_grad_() for x in inputs_of(case)[:3]]
    mask = torch.ones(2, case.queries, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    made = features_of(case).to(DEVICE)
    out = triton.attend(made, *tensors, mask, 1.0, True, made.is_bounded)
    assert out[0].any()
    assert not out[1].any()
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.square().sum(), tensors))


def test_splitting_the_sums_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("split", num_features=40, queries=200)
    found = []
    for programs in (0, 100):
        monkeypatch.setattr(launch, "PROGRAMS_PER_PROCESSOR", programs)
        found.append(results("kernels", case, case.dtype))
    assert all(float((a - b).norm() / b.norm()) < 1e-6 for a, b in zip(*found, strict=True))


def test_torch_compile_knows_the_operations() -> None:
    leaves = [x.requires_grad_() for x in inputs_of(SMALL)[:3]]
    features, found = features_of(SMALL).to(DEVICE), []

    def loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return triton.attend(features, query, key, value, None, 1.0, True, True).square().sum()

    for way in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        found.append(torch.autograd.grad(way(*leaves), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_buffer_that_changes_changes_the_features() -> None:
    features, inputs = features_of(SMALL).to(DEVICE), inputs_of(SMALL)
    arguments = (*inputs[:3], None, 1.0, True, True)
    before = triton.attend(features, *arguments)
    features.resample(torch.Generator().manual_seed(9))
    features.to(DEVICE)
    after = triton.attend(features, *arguments)
    expected = linear.attend(features, *inputs[:3], None, False, 1.0, True)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused_with_the_way_out() -> None:
    leaves = [x.requires_grad_() for x in inputs_of(SMALL)[:3]]
    (first,) = torch.autograd.grad(attend(SMALL, *leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(UserError, match="SCHOENBAT_TRITON unset"):
        first.sum().backward()


def test_torch_operations_are_taken_where_kernels_are_not_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    features, inputs = features_of(SMALL), inputs_of(SMALL)
    query, key, value = (x.cpu() for x in inputs[:3])
    assert triton.can_take(features, query, key, value, True)
    assert not triton.takes(features, query, key, value, True)
    linear_part = features_of(SMALL._replace(num_features=20))
    assert not triton.can_take(linear_part, query, key, value, True)
    assert not triton.can_take(features_of(SMALL._replace(features="inverse")), query, key, value, True)
    assert not triton.can_take(lambda x: x, query, key, value, False)
    assert not triton.can_take(features, query.double(), key.double(), value.double(), True)
    assert not triton.can_take(features, query, key[:, :, :0], value[:, :, :0], True)
    taken = []
    torch.func.vmap(lambda x: taken.append(triton.can_take(features, x, x, x, True)) or x)(query)
    assert taken == [False]
    monkeypatch.setattr(triton, "can_take", lambda *_: True)
    for dtype, wanted, expected in (
        (torch.bfloat16, "1", True),
        (torch.bfloat16, "", False),
        (torch.float32, "1", False),
    ):
        monkeypatch.setenv("SCHOENBAT_TRITON", wanted)
        on_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        assert triton.takes(features, on_gpu, key, value, True) == expected  # type: ignore[arg-type]
