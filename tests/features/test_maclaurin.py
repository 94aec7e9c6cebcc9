"""Random Maclaurin features estimate the kernel without bias and with the variance that theory gives.

Features of one map are independent, so one map with many features is many trials. False alarms: each check is a z
test at 5.5 standard errors, about 4e-8 under normality; 15 of them stay under 1e-6. The seeds are fixed.
"""

import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from schoenbat.attention import ATTENTIONS
from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.kernels import KERNELS, Kernel

HEAD_DIM = 16
TRIALS = 60_000
MAX_DEGREE = 12


def pair(cosine: float) -> tuple[Tensor, Tensor]:
    """Two vectors of squared length 1 / sqrt(d), as attention sees them, with a given cosine."""
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, HEAD_DIM, generator=generator, dtype=torch.float64)
    x = x / x.norm()
    noise = noise - (noise @ x) * x
    y = cosine * x + math.sqrt(1 - cosine**2) * noise / noise.norm()
    return x * HEAD_DIM**-0.25, y * HEAD_DIM**-0.25


def products(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """One unbiased estimate of f(<x, y>) - a_0 per random feature."""
    features = RandomMaclaurin(
        kernel,
        head_dim=HEAD_DIM,
        num_features=TRIALS + 1,
        max_degree=MAX_DEGREE,
        generator=torch.Generator().manual_seed(11),
    )
    first, second = features(torch.stack([x, y])[None])[0]
    return first[1:] * second[1:] * TRIALS


@pytest.mark.parametrize("cosine", [-0.7, 0.1, 0.9])
@pytest.mark.parametrize("name", KERNELS.names())
def test_estimate_is_unbiased_and_has_the_variance_of_theory(name: str, cosine: float) -> None:
    kernel = KERNELS.get(name)()
    x, y = pair(cosine)
    estimates = products(kernel, x, y)

    s = float(x @ y)
    expected = sum(kernel.coefficient(n) * s**n for n in range(1, MAX_DEGREE + 1))
    standard_error = float(estimates.std()) / math.sqrt(TRIALS)
    assert abs(float(estimates.mean()) - expected) < 5.5 * standard_error

    # Per degree, E (prod <w, x><w, y>)^2 = (|x|^2 |y|^2 + 2 (s^2 - sum x_i^2 y_i^2))^n (arXiv 2202.02031, real
    # Rademacher); drawing the degree with probability p_n divides by it.
    second_moment = float(x @ x) * float(y @ y) + 2 * (s * s - float((x * x) @ (y * y)))
    total = sum(2.0**-n for n in range(1, MAX_DEGREE + 1))
    variance = (
        sum(kernel.coefficient(n) ** 2 * total * 2.0**n * second_moment**n for n in range(1, MAX_DEGREE + 1))
        - expected**2
    )
    deviations = (estimates - expected) ** 2
    spread = float(deviations.std()) / math.sqrt(TRIALS)
    assert abs(float(deviations.mean()) - variance) < 5.5 * spread


@pytest.mark.parametrize("name", [name for name in KERNELS.names() if KERNELS.get(name)().coefficient(0) > 0])
def test_attention_error_falls_as_one_over_the_root_of_the_features(name: str) -> None:
    # The mean squared error over 8 draws has about 8 effective samples per size, so the ratio of roots is within a
    # factor of 1.6 of 8 with a false-alarm rate below 1e-3; the seeds are fixed.
    generator = torch.Generator().manual_seed(5)
    query, key, value = torch.randn(3, 1, 1, 96, HEAD_DIM, generator=generator)
    query, key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    kernel = KERNELS.get(name)()

    def build(attn: str, seed: int = 0, **options: int) -> torch.nn.Module:
        attention_class = ATTENTIONS.get(attn)
        return attention_class(
            attention_class.Config(**options),
            head_dim=HEAD_DIM,
            kernel=kernel,
            generator=torch.Generator().manual_seed(seed),
        )

    exact = build("kernelized")(query, key, value)

    def error(num_features: int) -> float:
        squares = [
            float((build("rmfa", seed, num_features=num_features)(query, key, value) - exact).square().mean())
            for seed in range(8)
        ]
        return math.sqrt(sum(squares) / len(squares))

    assert 8 / 1.6 < error(65) / error(64 * 64 + 1) < 8 * 1.6


def test_each_feature_is_the_product_of_its_vectors_with_the_amplitude_of_its_degree() -> None:
    """phi_i(x) = sqrt(a_n / (p(n) D')) prod <w_j, x>, p(n) proportional to 2^-n, and D' = 15."""
    features = small(16)
    x = points(5)
    found = features(x)
    total = sum(2.0**-n for n in range(1, 9))
    assert torch.allclose(found[:, 0], torch.ones(5, dtype=x.dtype))
    for i, (degree, signs) in enumerate(zip(features.degrees.tolist(), features.signs.to(x.dtype), strict=True)):
        amplitude = math.sqrt(1 / math.factorial(degree) / (2.0**-degree / total * 15))
        torch.testing.assert_close(found[:, i + 1], amplitude * (x @ signs[:degree].T).prod(-1), rtol=1e-6, atol=0)


def test_one_feature_is_the_constant() -> None:
    kernel = KERNELS.get("exp")()
    features = RandomMaclaurin(kernel, head_dim=4, num_features=1, max_degree=5, generator=torch.Generator())
    assert torch.equal(features(torch.randn(3, 4)), torch.ones(3, 1))


def test_draw_with_other_degrees_can_be_loaded() -> None:
    kernel = KERNELS.get("exp")()
    first, second = (
        RandomMaclaurin(
            kernel, head_dim=4, num_features=30, max_degree=9, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 2)
    )
    assert first.plan != second.plan
    second.load_state_dict(first.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("options", [{"num_features": 0, "max_degree": 3}, {"num_features": 3, "max_degree": 0}])
def test_sizes_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        RandomMaclaurin(KERNELS.get("exp")(), head_dim=4, generator=torch.Generator(), **options)


def small(num_features: int = 40) -> RandomMaclaurin:
    generator = torch.Generator().manual_seed(2)
    return RandomMaclaurin(
        KERNELS.get("exp")(), head_dim=6, num_features=num_features, max_degree=8, generator=generator
    )


def points(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 0.6


@pytest.mark.parametrize("num_features", [1, 2, 40])
def test_first_and_second_gradients_are_those_of_finite_differences(num_features: int) -> None:
    features = small(num_features)
    assert max(features.degrees, default=1) > 2 or num_features < 40
    assert torch.autograd.gradcheck(features, (points(2, 3).requires_grad_(),))
    assert torch.autograd.gradgradcheck(features, (points(1, 2).requires_grad_(),))


def test_the_gradient_is_the_same_with_and_without_a_second_one() -> None:
    features = small()
    x = points(2, 3).requires_grad_()
    loss = features(x).sin().sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (recorded,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(plain, recorded)


def test_torch_func_passes_through() -> None:
    features = small()
    x = points(3, 5)

    def loss(x: Tensor) -> Tensor:
        return features(x).sin().sum()

    def slope(x: Tensor) -> Tensor:
        return grad(loss)(x).square().sum()

    torch.testing.assert_close(vmap(features, in_dims=1)(x), features(x).transpose(0, 1))
    torch.testing.assert_close(vmap(grad(loss))(x), grad(loss)(x))
    torch.testing.assert_close(vmap(grad(slope))(x), grad(slope)(x))
    _, tangent = jvp(features, (x,), (x,))
    jacobian = torch.autograd.functional.jacobian(features, x)
    torch.testing.assert_close(tangent, torch.einsum("abcdef,def->abc", jacobian, x))
    torch.testing.assert_close(jacrev(features)(x[0]), torch.autograd.functional.jacobian(features, x[0]))


@pytest.mark.parametrize("num_features", [1, 40])
def test_compiles_without_a_graph_break(num_features: int) -> None:
    features = small(num_features)
    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")
    first, second = points(2, 3).requires_grad_(), points(2, 3).requires_grad_()
    torch.testing.assert_close(compiled(first), features(second))
    compiled(first).sin().sum().backward()
    features(second).sin().sum().backward()
    torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32_features(dtype: torch.dtype) -> None:
    features = small()
    x = points(50).to(dtype)
    assert torch.equal(features(x), features(x.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(x), features(x.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_module_of_another_dtype_keeps_the_draw_through_saving_and_loading(dtype: torch.dtype) -> None:
    x = points(9)
    expected = small()(x)
    cast = small().to(dtype)
    assert torch.equal(cast(x), expected)
    loaded = small()
    loaded.resample(torch.Generator().manual_seed(99))
    loaded.load_state_dict(cast.state_dict())
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_draw_does_not_depend_on_the_default_dtype_or_device(dtype: torch.dtype) -> None:
    x = points(9)
    expected = small()(x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            features = small()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(features(x), expected)


def test_the_whole_module_can_be_pickled() -> None:
    features = small()
    assert torch.equal(pickle.loads(pickle.dumps(features))(points(3)), features(points(3)))


def test_a_draw_that_was_lost_comes_back() -> None:
    features = small()
    expected = features(points(3))
    features.to_empty(device="cpu")
    features.reset_parameters()
    assert torch.equal(features(points(3)), expected)
