"""The linear forms equal the quadratic definition on the same weights, with their gradients and second gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from schoenbat.ops.linear import causal_linear_attention, continue_causally, linear_attention, step, summarise
from schoenbat.ops.reference import divide

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
FORMS = [linear_attention, causal_linear_attention]


def inputs(length: int, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Positive features, so that no denominator is near zero, and values."""
    generator = torch.Generator().manual_seed(length)
    features = torch.rand(2, batch, 2, length, 5, generator=generator, dtype=torch.float64) + 0.1
    value = torch.randn(batch, 2, length, 3, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (*features, value)]


def mask_of(lengths: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def quadratic(attend: Attend, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    weights = query @ key.transpose(-1, -2)
    if attend is causal_linear_attention:
        weights = weights.tril()
    if key_mask is not None:
        weights = weights * key_mask[:, None, None, :]
    return divide(weights @ value, weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 2049])
@pytest.mark.parametrize("attend", FORMS)
def test_outputs_and_gradients_equal_the_quadratic_form_with_variable_lengths(attend: Attend, length: int) -> None:
    mask = mask_of([length, (length + 1) // 2], length)
    results = []
    for form in (attend, lambda *args: quadratic(attend, *args)):
        leaves = [x.requires_grad_() for x in inputs(length)]
        out = form(*leaves, mask)
        (out * torch.linspace(-1, 1, 3, dtype=torch.float64)).square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_no_token_gives_no_output() -> None:
    query, key, value = inputs(4)
    assert causal_linear_attention(query[:, :, :0], key[:, :, :0], value[:, :, :0], None).shape == (2, 2, 0, 3)
    assert (linear_attention(query, key[:, :, :0], value[:, :, :0], None) == 0).all()


@pytest.mark.parametrize("attend", FORMS)
def test_first_and_second_gradients_are_those_of_finite_differences(attend: Attend) -> None:
    leaves = tuple(x[:, :1, :, :2].requires_grad_() for x in inputs(5, batch=1))
    mask = torch.tensor([[True, True, False, True, True]])

    def outputs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        extra = {"chunk": 2} if attend is causal_linear_attention else {}
        return attend(query, key, value, mask, **extra)

    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)


@pytest.mark.parametrize("attend", FORMS)
def test_torch_func_gives_the_gradient_of_each_batch_entry(attend: Attend) -> None:
    leaves = inputs(70, batch=3)

    def loss(*one: Tensor) -> Tensor:
        return attend(*(x[None] for x in one), None).square().sum()

    per_entry = vmap(grad(loss, argnums=(0, 1, 2)))(*leaves)
    leaves = [x.requires_grad_() for x in leaves]
    attend(*leaves, None).square().sum().backward()
    for ours, leaf in zip(per_entry, leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad)


@pytest.mark.parametrize("attend", FORMS)
def test_compiles_without_a_graph_break(attend: Attend) -> None:
    mask = mask_of([70, 33], 70)
    results = []
    for form in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = [x.requires_grad_() for x in inputs(70)]
        form(*leaves, mask).square().sum().backward()
        results.append([x.grad for x in leaves])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_thousand_steps_equal_the_chunked_form_and_the_state_keeps_its_size() -> None:
    query, key, value = inputs(1000)
    mask = mask_of([1000, 700], 1000)
    expected = causal_linear_attention(query, key, value, mask)
    state, outputs = None, []
    for i in range(1000):
        token = slice(i, i + 1)
        out, state = step(state, query[:, :, token], key[:, :, token], value[:, :, token], mask[:, token])
        outputs.append(out)
        assert state.shape == (2, 2, 5, 4)
    torch.testing.assert_close(torch.cat(outputs, 2), expected)
    torch.testing.assert_close(state, summarise(key, value, mask))


@pytest.mark.parametrize("first", [0, 1, 64, 100])
def test_a_prefix_primes_the_state(first: int) -> None:
    query, key, value = inputs(130)
    mask = mask_of([130, 90], 130)
    expected = causal_linear_attention(query, key, value, mask)
    head, state = continue_causally(
        None, query[:, :, :first], key[:, :, :first], value[:, :, :first], mask[:, :first], chunk=16
    )
    middle, state = continue_causally(
        state, query[:, :, first:129], key[:, :, first:129], value[:, :, first:129], mask[:, first:129], chunk=16
    )
    last, state = step(state, query[:, :, 129:], key[:, :, 129:], value[:, :, 129:], mask[:, 129:])
    torch.testing.assert_close(torch.cat([head, middle, last], 2), expected)
    torch.testing.assert_close(state, summarise(key, value, mask))


def test_gradients_flow_through_a_state() -> None:
    query, key, value = (x[:, :1].requires_grad_() for x in inputs(6, batch=1))

    def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        _, state = continue_causally(None, q[:, :, :3], k[:, :, :3], v[:, :, :3])
        return continue_causally(state, q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], chunk=2)

    assert torch.autograd.gradcheck(outputs, (query, key, value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attend", FORMS)
def test_half_precision_is_summed_in_float32(attend: Attend, dtype: torch.dtype) -> None:
    # 70,000 terms of about 1 lie beyond float16's range, and beyond the 8 bits of bfloat16.
    length = 70_000
    features = torch.ones(1, 1, length, 2, dtype=dtype)
    value = torch.randn(1, 1, length, 3, generator=torch.Generator().manual_seed(0)).add(1).to(dtype)
    out = attend(features, features, value, None)
    assert out.dtype == dtype
    expected = value.double().mean(2)
    torch.testing.assert_close(out[:, :, -1].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("attend", FORMS)
def test_what_stands_at_a_masked_value_does_not_matter(attend: Attend) -> None:
    query, key, value = inputs(9)
    mask = mask_of([9, 4], 9)
    soiled = value.masked_fill(~mask[:, None, :, None], torch.nan)
    torch.testing.assert_close(attend(query, key, soiled, mask), attend(query, key, value, mask))


@pytest.mark.parametrize("sum_of_weights", [0.0, -0.0, 1e-30, -1e-30, 1e-7, -1e-7])
@pytest.mark.parametrize("attend", FORMS)
def test_a_denominator_near_zero_is_moved_to_the_floor(attend: Attend, sum_of_weights: float) -> None:
    """By the rule of `divide`: outputs and gradients stay finite, and the floor of 1e-6 has the sign of the sum."""
    query = torch.tensor([[[[1.0]]]], requires_grad=True)
    key = torch.tensor([[[[sum_of_weights]]]], requires_grad=True)
    value = torch.tensor([[[[2.0]]]], requires_grad=True)
    out = attend(query, key, value, None)
    out.backward()
    expected = 2.0 * sum_of_weights / (-1e-6 if sum_of_weights < 0 else 1e-6)
    assert out.item() == pytest.approx(expected)
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))


def test_nan_at_an_attended_place_is_passed_on() -> None:
    query, key, value = inputs(4)
    value[0, 0, 1, 0] = torch.nan
    assert linear_attention(query, key, value, None).isnan().any()


def test_unequal_lengths_are_refused() -> None:
    query, key, value = inputs(4)
    with pytest.raises(ValueError, match="as many queries as keys and values, got 3, 4 and 4"):
        causal_linear_attention(query[:, :, :3], key, value, None)
    with pytest.raises(ValueError, match="a step takes one token, got 4"):
        step(None, query, key, value)
