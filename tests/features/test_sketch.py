"""The sketch has the mean and the error that its allocation promises, and less error than the published features."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.features.plan import expand
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import KERNELS, Kernel

HEAD_DIM = 32


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def points(kind: str, count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sets of unit vectors, isotropic or spread around `kind` centres with a mean cosine of 0.6."""
    generator = torch.Generator().manual_seed(seed)
    x, y = unit(torch.randn(2, count, HEAD_DIM, generator=generator))
    if kind == "isotropic":
        return x, y
    centres = unit(torch.randn(int(kind), HEAD_DIM, generator=generator))
    chosen = centres[torch.randint(0, int(kind), (2, count), generator=generator)]
    return unit(math.sqrt(0.6) * chosen[0] + math.sqrt(0.4) * x), unit(math.sqrt(0.6) * chosen[1] + math.sqrt(0.4) * y)


def make(kernel: Kernel, num_features: int, scale: float, seed: int = 0, fixed_norm: bool = True) -> Sketch:
    return Sketch(
        kernel,
        head_dim=HEAD_DIM,
        num_features=num_features,
        max_degree=20,
        scale=scale,
        fixed_norm=fixed_norm,
        generator=torch.Generator().manual_seed(seed),
    )


def error(features: nn.Module, kernel: Kernel, x: Tensor, y: Tensor) -> float:
    truth = kernel(x @ y.T)
    return float((features(x) @ features(y).T - truth).norm() / truth.norm())


class Power(Kernel):
    """One monomial: x^n."""

    def __init__(self, degree: int) -> None:
        self.degree = degree

    def __call__(self, x: Tensor) -> Tensor:
        return x**self.degree

    def coefficient(self, degree: int) -> float:
        return float(degree == self.degree)


@pytest.mark.parametrize("cosine", [-0.5, 0.3, 1.0])
@pytest.mark.parametrize("degree", [2, 3])
def test_an_incomplete_degree_is_unbiased_up_to_its_factor(degree: int, cosine: float) -> None:
    # The harmonic part of t^2 is t^2 - 1/d, that of t^3 is t^3 - 3 t / (d + 2); the factor is r (1/2 + 3 r).
    # A z test at 5 standard errors, six of them: a false-alarm rate below 4e-6, with fixed seeds.
    harmonics = {2: 527, 3: 5952}[degree]
    harmonic = cosine**2 - 1 / HEAD_DIM if degree == 2 else cosine**3 - 3 * cosine / (HEAD_DIM + 2)
    x = torch.zeros(2, HEAD_DIM)
    x[:, 0] = torch.tensor([1, cosine])
    x[1, 1] = math.sqrt(1 - cosine**2)
    features = make(Power(degree), 40, 1.0, fixed_norm=False)
    generator = torch.Generator().manual_seed(degree)
    estimates = []
    for _ in range(1500):
        features.resample(generator)
        first, second = features(x)
        estimates.append(float(first @ second) * harmonics / 40 / min(0.5 + 120 / harmonics, 1 + 40 / harmonics))
    found = torch.tensor(estimates)
    assert abs(float(found.mean()) - harmonic) < 5 * float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize("fixed_norm", [True, False])
@pytest.mark.parametrize("num_features", [10, 33, 100, 561, 700])
def test_the_error_is_the_expected_one(num_features: int, fixed_norm: bool) -> None:
    # 9,216 pairs and 6 draws: the ratio scatters by about 1 %, so 8 % off is no chance (fixed seeds, below 1e-6).
    kernel = KERNELS.get("exp")()
    errors = []
    for seed in range(6):
        x, y = points("isotropic", seed=seed)
        features = make(kernel, num_features, 1.0, seed, fixed_norm)
        errors.append(error(features, kernel, x, y) ** 2)
    assert math.sqrt(sum(errors) / len(errors)) == pytest.approx(features.allocation.expected_error, rel=0.08)


def cases() -> Iterator[tuple[str, float]]:
    """Each kernel (trigh is exp) at arguments of cos / sqrt(d) and of cos, or 0.9 cos where the radius is 1."""
    for name in ("exp", "inverse", "log", "sqrt"):
        yield name, HEAD_DIM**-0.5
        yield name, min(1.0, 0.9 * KERNELS.get(name).radius)


@pytest.mark.parametrize("num_features", [16, 32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize(("name", "scale"), list(cases()))
def test_never_worse_than_the_published_features(name: str, scale: float, num_features: int) -> None:
    kernel = KERNELS.get(name)()
    for kind in ("isotropic", "1", "8"):
        ours, published = [], []
        for seed in range(3):
            x, y = (math.sqrt(scale) * side for side in points(kind, seed=seed))
            generator = torch.Generator().manual_seed(seed)
            rivals = RandomMaclaurin(
                kernel, head_dim=HEAD_DIM, num_features=num_features, max_degree=20, generator=generator
            )
            if seed == 0:
                features = make(kernel, num_features, scale)
            features.resample(generator)
            ours.append(error(features, kernel, x, y))
            published.append(error(rivals, kernel, x, y))
        assert sum(ours) <= sum(published), (kind, ours, published)


@pytest.mark.parametrize("fixed_norm", [True, False])
@pytest.mark.parametrize(("scale", "factor"), [(HEAD_DIM**-0.5, 10), (1.0, 4)])
def test_at_128_features_the_error_is_a_fraction_of_the_published_one(
    scale: float, factor: float, fixed_norm: bool
) -> None:
    kernel = KERNELS.get("exp")()
    ours, published = 0.0, 0.0
    for seed in range(5):
        x, y = (math.sqrt(scale) * side for side in points("isotropic", seed=seed))
        generator = torch.Generator().manual_seed(seed)
        rivals = RandomMaclaurin(kernel, head_dim=HEAD_DIM, num_features=128, max_degree=20, generator=generator)
        published += error(rivals, kernel, x, y)
        ours += error(make(kernel, 128, scale, seed, fixed_norm), kernel, x, y)
    assert ours * factor <= published


@pytest.mark.parametrize(("head_dim", "degree"), [(4, 1), (4, 2), (4, 4), (5, 3), (6, 3), (1, 5), (2, 7)])
def test_a_degree_with_all_its_monomials_is_exact_for_any_vectors(head_dim: int, degree: int) -> None:
    count = math.comb(head_dim + degree - 1, degree)
    features = Sketch(
        Power(degree),
        head_dim=head_dim,
        num_features=count,
        max_degree=degree,
        scale=0.5,
        fixed_norm=False,
        generator=torch.Generator().manual_seed(0),
    )
    x, y = torch.rand(2, 9, head_dim, generator=torch.Generator().manual_seed(1))
    assert features(x).shape == (9, count)
    torch.testing.assert_close(features(x) @ features(y).T, (x @ y.T) ** degree, rtol=1e-4, atol=1e-5)


def test_enough_features_are_exact() -> None:
    kernel = KERNELS.get("exp")()
    generator = torch.Generator().manual_seed(0)
    features = Sketch(
        kernel, head_dim=3, num_features=2000, max_degree=20, scale=1.0, fixed_norm=False, generator=generator
    )
    x, y = torch.rand(2, 20, 3, generator=generator) - 0.5
    torch.testing.assert_close(features(x) @ features(y).T, torch.exp(x @ y.T), rtol=1e-5, atol=1e-5)


def test_bases_are_drawn_from_all_orthonormal_ones_alike() -> None:
    """Entries have the mean 0 and the variance 1 / d; over 400 draws the means lie within 5.5 standard errors."""
    features = make(KERNELS.get("exp")(), 16, scale=1.0)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(400):
        features.resample(generator)
        drawn.append(features.rotation_bits.view(torch.float32).clone())
    bases = torch.stack(drawn)
    assert bases.mean(0).abs().max() < 5.5 * (bases.shape[-1] * len(bases)) ** -0.5
    torch.testing.assert_close(bases @ bases.mT, torch.eye(bases.shape[-1]).expand_as(bases), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_features", [20, 40, 600])
def test_a_saved_draw_can_be_loaded(num_features: int) -> None:
    first, second = (make(KERNELS.get("log")(), num_features, 0.2, seed) for seed in (1, 2))
    x, _ = points("isotropic")
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize(("num_features", "degree"), [(5, 1), (60, 2), (600, 4)])
def test_features_come_in_two_parts_at_the_degree_that_is_sketched(num_features: int, degree: int) -> None:
    features = Sketch(
        KERNELS.get("exp")(),
        head_dim=12,
        num_features=num_features,
        max_degree=8,
        scale=1.0,
        fixed_norm=False,
        generator=torch.Generator().manual_seed(0),
    )
    assert features.sketched == degree
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    products = features.products(torch.float32, 1.0)
    parts = products.split(degree)
    projected = x @ products.projection
    whole, *both = (expand(projected, part.plan) for part in (products, *parts))
    assert torch.equal(whole, torch.cat(both, -1))
    assert torch.equal(products.squares, torch.cat([part.squares for part in parts]))
    assert torch.allclose(expand(2 * projected, parts[1].plan)[:, -1], 2 ** max(features.shares) * whole[:, -1])
