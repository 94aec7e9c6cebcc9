"""Coefficients computed from a function alone: right within their stated error, or refused with the reason."""

import math
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from schoenbat.attention import ATTENTIONS
from schoenbat.errors import UserError
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.kernels._series import MAX_DEGREE
from schoenbat.ops.reference import normalise

Function = Callable[[Tensor], Tensor]


def bessel(x: Tensor) -> Tensor:
    """I_0(x), which torch does not evaluate for complex x; 60 terms are exact for abs(x) < 20."""
    term = torch.ones_like(x)
    total = term
    for m in range(1, 60):
        term = term * (x / (2 * m)) ** 2
        total = total + term
    return total


def even(coefficient: Callable[[int], float]) -> Callable[[int], float]:
    return lambda degree: 0.0 if degree % 2 else coefficient(degree // 2)


KNOWN: dict[str, tuple[Function, float, Callable[[int], float]]] = {
    "exp": (torch.exp, math.inf, lambda n: 1 / math.factorial(n)),
    "sinh + cosh": (lambda x: torch.sinh(x) + torch.cosh(x), math.inf, lambda n: 1 / math.factorial(n)),
    "cosh": (torch.cosh, math.inf, even(lambda m: 1 / math.factorial(2 * m))),
    "exp(x^2 / 2)": (lambda x: torch.exp(x * x / 2), math.inf, even(lambda m: 1 / (2**m * math.factorial(m)))),
    "exp(100 x)": (lambda x: torch.exp(100 * x), math.inf, lambda n: 100**n / math.factorial(n)),
    "exp(x / 100)": (lambda x: torch.exp(x / 100), math.inf, lambda n: 1 / (100**n * math.factorial(n))),
    "exp(x^10)": (
        lambda x: torch.exp(x**10),
        math.inf,
        lambda n: 0.0 if n % 10 else 1 / math.factorial(n // 10),
    ),
    "I_0": (bessel, 20.0, even(lambda m: 1 / (4**m * math.factorial(m) ** 2))),
    "polynomial": (lambda x: 1 + 3 * x**7, math.inf, lambda n: {0: 1.0, 7: 3.0}.get(n, 0.0)),
    "constant": (lambda x: torch.full_like(x, 2.0), math.inf, lambda n: 0.0 if n else 2.0),
    "1 / (1 - x)": (lambda x: 1 / (1 - x), 1.0, lambda n: 1.0),
    "1 / (1 - 50 x)": (lambda x: 1 / (1 - 50 * x), 0.02, lambda n: 50.0**n),
    "(1 - x)^-20": (lambda x: (1 - x) ** -20, 1.0, lambda n: math.comb(n + 19, 19)),
    "1 - log(1 - x)": (lambda x: 1 - torch.log(1 - x), 1.0, lambda n: 1 / n if n else 1.0),
    "2 - sqrt(1 - x)": (lambda x: 2 - torch.sqrt(1 - x), 1.0, lambda n: KERNELS.get("sqrt")().coefficient(n)),
    "exp within 2": (torch.exp, 2.0, lambda n: 1 / math.factorial(n)),
    "1e-8 exp": (lambda x: 1e-8 * torch.exp(x), math.inf, lambda n: 1e-8 / math.factorial(n)),
    "exp(x - 20)": (lambda x: torch.exp(x - 20), math.inf, lambda n: math.exp(-20) / math.factorial(n)),
    "exp(x - 600)": (lambda x: torch.exp(x - 600), math.inf, lambda n: math.exp(-600) / math.factorial(n)),
    "(1 + x)^40": (lambda x: (1 + x) ** 40, math.inf, lambda n: math.comb(40, n)),
    "(1 + x)^400": (lambda x: (1 + x) ** 400, math.inf, lambda n: math.comb(400, n)),
    "(0.3 + x)^40": (lambda x: (0.3 + x) ** 40, math.inf, lambda n: math.comb(40, n) * 0.3 ** max(40 - n, 0)),
    "exp in place": (lambda x: x.exp_(), math.inf, lambda n: 1 / math.factorial(n)),
    "x": (lambda x: x, math.inf, lambda n: float(n == 1)),
    "x^2": (lambda x: x**2, math.inf, lambda n: float(n == 2)),
    "x^4": (lambda x: x**4, math.inf, lambda n: float(n == 4)),
    "x^40 + x^80": (lambda x: x**40 + x**80, math.inf, lambda n: float(n in (40, 80))),
    "1e-200 x^2 cosh(x)": (
        lambda x: 1e-200 * x**2 * torch.cosh(x),
        math.inf,
        lambda n: 0.0 if n % 2 or n < 2 else 1e-200 / math.factorial(n - 2),
    ),
    "sinh": (torch.sinh, math.inf, lambda n: 1 / math.factorial(n) if n % 2 else 0.0),
    "exp(x) - 1 - x": (lambda x: torch.exp(x) - 1 - x, math.inf, lambda n: 1 / math.factorial(n) if n > 1 else 0.0),
    "x^2 / (2.1 - 2 x)": (lambda x: x**2 / (2.1 - 2 * x), 1.05, lambda n: KERNELS.get("yat")().coefficient(n)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_coefficient_of_a_known_series_is_within_its_error(name: str) -> None:
    f, radius, known = KNOWN[name]
    kernel = Kernel.from_callable(f, radius)
    for degree in range(128):
        assert abs(kernel.coefficient(degree) - known(degree)) <= kernel.series.error(degree), degree


@pytest.mark.parametrize("name", KNOWN)
def test_all_errors_together_are_small_beside_the_function_and_zeros_are_zero(name: str) -> None:
    f, radius, known = KNOWN[name]
    kernel = Kernel.from_callable(f, radius)
    for x in (0.1, 0.5, 0.95):
        x *= min(radius, 1.0)
        error = sum(kernel.series.error(degree) * x**degree for degree in range(60))
        assert error < 1e-10 * kernel(torch.tensor(x, dtype=torch.float64)), x
    assert all(kernel.coefficient(degree) == 0 for degree in range(60) if known(degree) == 0)


def test_the_highest_degree_is_still_right_and_the_next_is_refused() -> None:
    kernel = Kernel.from_callable(lambda x: 1 / (1 - x), 1.0)
    assert kernel.coefficient(MAX_DEGREE) == pytest.approx(1, rel=1e-8)
    for degree in (-1, MAX_DEGREE + 1):
        with pytest.raises(ValueError, match=f"from degree 0 to {MAX_DEGREE}"):
            kernel.coefficient(degree)


@pytest.mark.parametrize(
    ("f", "radius", "message"),
    [
        (torch.cos, math.inf, "'cos': the Maclaurin coefficient of degree 2 is -0.5 "),
        (lambda x: 1 + torch.tanh(x), math.pi / 2, "the Maclaurin coefficient of degree 3 is -0.333333 "),
        (torch.tanh, math.pi / 2, "'tanh': the Maclaurin coefficient of degree 3 is -0.333333 "),
        (lambda x: -(x**2), math.inf, "the Maclaurin coefficient of degree 2 is -1 "),
        (lambda x: x**2 - 1e-15, math.inf, "the Maclaurin coefficient of degree 0 is -1e-15 "),
        (lambda x: 0 * x, math.inf, "is 0 everywhere, but one of its coefficients must be positive"),
        (lambda x: torch.exp(x - 2000), math.inf, "is 0 everywhere"),
        (lambda x: 1 + torch.log(1 + x), 1.0, "the Maclaurin coefficient of degree 2 is -0.5 "),
        (lambda x: torch.exp(x) - 1e-9 * x**31, math.inf, "the Maclaurin coefficient of degree 31 is -1e-09 "),
        (lambda x: 1 / (1 - x), math.inf, "not finite on the circle abs(x) = 1, inside its radius inf"),
        (lambda x: 1 / (1 - x / 1.9), math.inf, "f must be analytic for abs(x) < inf"),
        (lambda x: 1 / (1 + (x / 1.9) ** 2), 2.5, "f must be analytic for abs(x) < 2.5"),
        (lambda x: 2 - torch.sqrt(1 - x), 1.2, "f must be analytic for abs(x) < 1.2"),
        (lambda x: 1 / (1 - x), 1.01, "are no power series, by 2 of them; f must be analytic for abs(x) < 1.01"),
        (lambda x: 2 + x.conj(), math.inf, "f must be analytic"),
        (lambda x: 2 + x.abs(), math.inf, "give different coefficients of degree 0: 2.0"),
        (lambda x: 1 + 1j * x, math.inf, "must map real tensors to real ones"),
        (lambda x: torch.sinh(x) / x, math.inf, "not finite at 0: f(0) = nan"),
        (lambda x: (1 / (1 - x.to(torch.complex64))).real if not x.is_complex() else 1 / (1 - x), 1.0, "precision"),
        (lambda x: x.sum(), math.inf, "must map a tensor to a tensor of the same shape"),
        (torch.special.i0, math.inf, "cannot be evaluated on torch.complex128 tensors: "),
        (lambda x, y: x, math.inf, "cannot be evaluated on torch.float64 tensors: "),
        (math.exp, math.inf, "must map a tensor to a tensor of the same shape"),
        (lambda x: 1 + x.conj() * 1e-6, math.inf, "are no power series"),
        (lambda x: (1 + x.to(torch.complex64)).to(x.dtype) if x.is_complex() else 1 + x, math.inf, "precision"),
        (3, math.inf, "Kernel.from_callable takes a function of a tensor, not 3 (int)"),
        (None, math.inf, "Kernel.from_callable takes a function of a tensor, not None (NoneType)"),
        ("exp", math.inf, "not 'exp' (str); named kernels are KERNELS.get(name)()"),
        (torch.exp, "1", "radius must be positive, not '1'"),
        (torch.exp, 0.0, "radius must be positive, not 0"),
        (torch.exp, math.nan, "radius must be positive, not nan"),
    ],
)
def test_what_is_no_kernel_is_refused_in_one_line_with_the_reason(f: Function, radius: float, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Kernel.from_callable(f, radius)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_negative_coefficient_of_high_degree_is_refused_when_it_is_asked_for() -> None:
    kernel = Kernel.from_callable(lambda x: torch.exp(x) - x**40, name="late")
    assert kernel.coefficient(31) == pytest.approx(1 / math.factorial(31))
    with pytest.raises(UserError, match=r"^kernel 'late': the Maclaurin coefficient of degree 40 is -1 "):
        kernel.coefficient(32)


def test_a_negative_coefficient_within_its_error_counts_as_zero() -> None:
    kernel = Kernel.from_callable(lambda x: torch.exp(x * x) - 1e-18 * x)
    assert kernel.coefficient(1) == 0
    assert kernel.series.error(1) > 1e-18


def test_values_that_disagree_are_printed_with_the_place_and_the_digits_in_which_they_do() -> None:
    def f(x: Tensor) -> Tensor:
        return x.exp_() if x.is_complex() else x.exp_().mul_(1 + 1e-13)

    with pytest.raises(UserError, match="the series made of its values") as caught:
        Kernel.from_callable(f)
    place, first, second = map(float, re.findall(r"(?:f\(|= |gives )(-?[0-9.]+)", str(caught.value)))
    assert first != second
    assert first == pytest.approx(math.exp(place))


def test_a_function_that_works_in_place_leaves_its_argument_alone() -> None:
    kernel = Kernel.from_callable(lambda x: x.exp_())
    x = torch.tensor([0.5, -1.0], requires_grad=True)
    kernel(x).sum().backward()
    torch.testing.assert_close(x.grad, x.exp())
    assert x.tolist() == [0.5, -1.0]
    scores = torch.tensor([[0.5, -1.0]])
    torch.testing.assert_close(normalise(kernel, scores, None), torch.softmax(scores, -1))
    assert scores.tolist() == [[0.5, -1.0]]


def test_f_is_called_no_more_once_a_coefficient_is_known() -> None:
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.exp(x)

    kernel = Kernel.from_callable(counted)
    first, known = calls, kernel.coefficient(3)
    assert kernel.coefficient(3) == known
    assert calls == first > 0


class Cosh(Kernel):
    """A kernel in the style of one file: its function and nothing else."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cosh(x)


class Cos(Kernel):
    def __call__(self, x: Tensor) -> Tensor:
        return torch.cos(x)


def test_a_class_without_coefficients_has_them_computed() -> None:
    kernel = Cosh()
    assert [kernel.coefficient(degree) for degree in range(5)] == pytest.approx([1, 0, 1 / 2, 0, 1 / 24])
    again = pickle.loads(pickle.dumps(kernel))
    assert again.coefficient(4) == kernel.coefficient(4)
    with pytest.raises(UserError, match=r"^kernel 'Cos': the Maclaurin coefficient of degree 2 is -0\.5 "):
        Cos().coefficient(0)


KERNEL_ATTENTIONS = [name for name in ATTENTIONS.names() if ATTENTIONS.get(name).needs_kernel]


@pytest.mark.parametrize("attn", KERNEL_ATTENTIONS)
@pytest.mark.parametrize(
    ("f", "dotf"),
    [
        (lambda x: torch.exp(x), "exp"),
        (lambda x: 1 / (1 - x), "inverse"),
        (lambda x: 1 - torch.log(1 - x), "log"),
        (lambda x: 2 - torch.sqrt(1 - x), "sqrt"),
    ],
)
def test_every_attention_does_with_a_callable_what_it_does_with_the_written_kernel(
    attn: str, f: Function, dotf: str
) -> None:
    written = KERNELS.get(dotf)()
    made = Kernel.from_callable(f, written.radius)
    attention_class = ATTENTIONS.get(attn)
    config = attention_class.Config()
    query, key, value = (torch.randn(2, 2, 30, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
    outputs = [
        attention_class(config, head_dim=8, kernel=kernel, generator=torch.Generator().manual_seed(0))(
            query, key, value
        )
        for kernel in (written, made)
    ]
    torch.testing.assert_close(*outputs)
