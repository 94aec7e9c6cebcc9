"""What every attention mechanism promises, on the GPU: the same results as on the CPU, and no wait for a number.

Two results are the same here if the norm of their difference is at most 1e-5 of the norm, and where float32 itself says
less, at most 30 times what the CPU's float32 result is off from that in float64: some estimates divide by sums that
nearly vanish.
"""

import functools
import math
from collections.abc import Sequence

import pytest
import torch
from gpu_device import DEVICE, no_waiting
from mechanisms import HEAD_DIM, assert_half_precision_is_close, every, inputs, make, mask_of, of_cost
from torch import Tensor

from schoenbat.attention import ATTENTIONS
from schoenbat.estimate import Estimate
from schoenbat.nn.mha import MultiheadKernelAttention

pytestmark = pytest.mark.gpu

LENGTHS = (200, 131)


def has_form(name: str, is_causal: bool) -> bool:
    return not is_causal or ATTENTIONS.get(name).has_causal_form


def results(
    name: str, dotf: str | None, is_causal: bool, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Outputs of two examples, and the gradients of query, key, value and parameters, on the CPU in float64."""
    attention = make(name, dotf).to(device, dtype)
    query, key, value = (x.to(device, dtype).requires_grad_() for x in inputs(max(LENGTHS)))
    mask = mask_of(list(LENGTHS), max(LENGTHS)).to(device)
    out = attention(query, key, value, mask, is_causal).masked_fill(~mask[:, None, :, None], 0.0)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = [query, key, value, *attention.parameters()]
    gradients = torch.autograd.grad((out * weight.to(device, dtype)).sum(), wanted, allow_unused=True)
    return [x.detach().cpu().double() for x in (out, *gradients) if x is not None]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


@functools.cache
def rounding(name: str, dotf: str | None, is_causal: bool) -> tuple[float, ...]:
    """By how much float32 on the CPU misses float64, for each of `results`."""
    cpu = torch.device("cpu")
    rough, exact = (results(name, dotf, is_causal, cpu, dtype) for dtype in (torch.float32, torch.float64))
    return tuple(map(distance, rough, exact))


def assert_same(found: Tensor, expected: Tensor, name: str, dotf: str | None, is_causal: bool = False) -> None:
    """The same outputs (see the module)."""
    assert distance(found, expected) <= 1e-5 + 30 * rounding(name, dotf, is_causal)[0]


def on_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.to(DEVICE) for x in tensors]


@every()
@pytest.mark.parametrize("is_causal", [False, True])
def test_outputs_and_gradients_are_those_of_the_cpu(name: str, dotf: str | None, is_causal: bool) -> None:
    if not has_form(name, is_causal):
        return
    expected = results(name, dotf, is_causal, torch.device("cpu"))
    found = results(name, dotf, is_causal, DEVICE)
    for ours, theirs, lost in zip(found, expected, rounding(name, dotf, is_causal), strict=True):
        assert torch.isfinite(ours).all()
        assert distance(ours, theirs) <= 1e-5 + 30 * lost


@every()
@pytest.mark.parametrize("length", [1, 63, 257])
def test_amount_of_padding_changes_nothing_on_a_gpu(name: str, dotf: str | None, length: int) -> None:
    attention = make(name, dotf).to(DEVICE)
    query, key, value = on_device(inputs(length + 9))
    mask = mask_of([length, length], length + 9).to(DEVICE)
    short = attention(query[:, :, :length], key[:, :, :length], value[:, :, :length], mask[:, :length])
    without = attention(query[:, :, :length], key[:, :, :length], value[:, :, :length])
    padded = attention(query, key, value, mask)[:, :, :length]
    assert_same(padded, short, name, dotf)
    assert_same(without, short, name, dotf)


@every()
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("filling", [math.nan, math.inf, 1e30])
def test_what_padding_holds_changes_no_output_and_no_gradient_on_a_gpu(
    name: str, dotf: str | None, filling: float, is_causal: bool
) -> None:
    if not has_form(name, is_causal):
        return
    attention = make(name, dotf).to(DEVICE)
    tensors = on_device(inputs(70))
    mask = mask_of([40, 70], 70).to(DEVICE)
    real = mask[:, None, :, None].expand_as(tensors[0])
    filled = [x.masked_fill(~real, filling) for x in tensors]
    assert_same(attention(*filled, mask, is_causal)[real], attention(*tensors, mask, is_causal)[real], name, dotf)

    def gradients(key: Tensor, value: Tensor) -> list[Tensor]:
        # A masked query is a query all the same, where there is a form for queries that are no keys.
        wanted = [x.detach().requires_grad_() for x in (tensors[0], key, value)]
        out = attention(*wanted, mask, is_causal)[real]
        return [x[real] for x in torch.autograd.grad(out.square().sum(), wanted, allow_unused=True) if x is not None]

    allowed = 1e-5 + 30 * max(rounding(name, dotf, is_causal))
    for found, expected in zip(gradients(*filled[1:]), gradients(*tensors[1:]), strict=True):
        assert distance(found, expected) <= allowed


@every()
def test_an_example_gives_the_same_alone_and_in_a_batch_on_a_gpu(name: str, dotf: str | None) -> None:
    attention = make(name, dotf).to(DEVICE)
    query, key, value = on_device(inputs(90, batch=3))
    mask = mask_of([90, 31, 1], 90).to(DEVICE)
    together = attention(query, key, value, mask)
    for i, length in enumerate((90, 31, 1)):
        alone = attention(*(x[i : i + 1, :, :length] for x in (query, key, value)))
        assert_same(together[i : i + 1, :, :length], alone, name, dotf)
    for head in range(2):
        alone = attention(*(x[:, head : head + 1] for x in (query, key, value)), mask)
        real = mask[:, None, :, None].expand_as(alone)
        assert_same(together[:, head : head + 1][real], alone[real], name, dotf)


@every("has_causal_form")
def test_causal_token_sees_no_later_token_on_a_gpu(name: str, dotf: str | None) -> None:
    attention = make(name, dotf).to(DEVICE)
    query, key, value = on_device(inputs(200))
    full = attention(query, key, value, is_causal=True)
    for length in (1, 64, 129):
        later = torch.arange(200, device=DEVICE)[:, None] >= length
        others = [torch.where(later, x.flip(0), x) for x in (query, key, value)]
        others[2] = torch.where(later, 1e6, others[2])
        found = attention(*others, is_causal=True)[:, :, :length]
        assert_same(found, full[:, :, :length], name, dotf, is_causal=True)


@every()
@pytest.mark.parametrize("length", [1, 2, 63, 1000])
def test_gradients_are_finite_at_any_length_on_a_gpu(name: str, dotf: str | None, length: int) -> None:
    attention = make(name, dotf).to(DEVICE)
    query, key, value = (x.to(DEVICE).requires_grad_() for x in inputs(length, batch=1, heads=1))
    out = attention(query, key, value)
    assert out.shape == query.shape
    out.square().sum().backward()
    assert value.grad is not None
    used = [x.grad for x in (query, key, value, *attention.parameters()) if x.grad is not None]
    assert all(torch.isfinite(x).all() for x in [out, *used])


@of_cost("linear")
def test_16384_tokens_with_nan_at_masked_places_have_finite_gradients_on_a_gpu(name: str, dotf: str | None) -> None:
    budget = {"max_length": 16384} if ATTENTIONS.get(name).needs_max_length else {}
    attention = make(name, dotf, budget=budget).to(DEVICE)
    mask = mask_of([16000], 16384).to(DEVICE)
    real = mask[:, None, :, None]
    query, *others = on_device(inputs(16384, batch=1, heads=1))
    tensors = [x.requires_grad_() for x in (query, *(x.masked_fill(~real, math.nan) for x in others))]
    out = attention(*tensors, mask)[:, :, :16000]
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert all(x.grad is None or torch.isfinite(x.grad[:, :, :16000]).all() for x in tensors)
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in attention.parameters())


@every()
@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_to_attend_to_gives_zero_on_a_gpu(name: str, dotf: str | None, is_causal: bool) -> None:
    if not has_form(name, is_causal):
        return
    attention = make(name, dotf).to(DEVICE)
    query, key, value = (x.to(DEVICE).requires_grad_() for x in inputs(6))
    mask = torch.tensor([[True] * 6, [False] * 6], device=DEVICE)
    out = attention(query, key, value, mask, is_causal)
    out.sum().backward()
    assert (out[1] == 0).all()
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in (query, key, value))


@every()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close_on_a_gpu(name: str, dotf: str | None, dtype: torch.dtype) -> None:
    assert_half_precision_is_close(make(name, dotf), DEVICE, dtype)


@every()
def test_autocast_changes_nothing_on_a_gpu(name: str, dotf: str | None) -> None:
    attention = make(name, dotf).to(DEVICE)
    query, key, value = on_device(inputs(50))
    expected = attention(query, key, value)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = attention(query, key, value)
    assert found.dtype == torch.float32
    assert_same(found, expected, name, dotf)


@every()
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_host_never_waits_for_a_number(name: str, dotf: str | None, is_causal: bool) -> None:
    if not has_form(name, is_causal):
        return
    attention = make(name, dotf).to(DEVICE)
    query, key, value = (x.to(DEVICE).requires_grad_() for x in inputs(max(LENGTHS)))
    mask = mask_of(list(LENGTHS), max(LENGTHS)).to(DEVICE)
    with no_waiting():
        attention(query, key, value, mask, is_causal).sum().backward()


@every()
def test_a_generator_of_the_gpu_is_left_alone(name: str, dotf: str | None) -> None:
    def state() -> Tensor:
        return torch.cuda.get_rng_state(DEVICE) if DEVICE.type == "cuda" else torch.get_rng_state()

    attention = make(name, dotf).to(DEVICE)
    before = state()
    attention(*on_device(inputs(60)))
    assert torch.equal(state(), before)


SETTINGS = [
    Estimate("exp"),
    Estimate("exp", estimator="maclaurin"),
    Estimate("inverse", normalize=True, num_features=100),
    Estimate("sqrt", normalize=True, estimator="maclaurin", seed=3),
    Estimate("yat", normalize=True, num_features=1000),
]


@pytest.mark.parametrize("estimate", SETTINGS, ids=lambda estimate: f"{estimate.kernel}-{estimate.estimator}")
def test_a_draw_is_the_same_on_every_device(estimate: Estimate) -> None:
    expected = estimate.make(HEAD_DIM)
    with torch.device(DEVICE):
        made = estimate.make(HEAD_DIM)
    module = MultiheadKernelAttention(
        2 * HEAD_DIM,
        2,
        device=DEVICE,
        kernel=estimate.kernel,
        num_features=estimate.num_features,
        estimator=estimate.estimator,
        seed=estimate.seed,
        normalize=estimate.normalize,
    )
    assert module.features is not None
    for found in (estimate.draw(HEAD_DIM, device=DEVICE), made, module.features):
        assert found.plan == expected.plan
        assert torch.equal(found.projection(torch.float32).cpu(), expected.projection(torch.float32))
        assert found.state_dict().keys() == expected.state_dict().keys()
        for name, tensor in found.state_dict().items():
            assert torch.equal(tensor.cpu(), expected.state_dict()[name])
