"""Budgets are spent on the degrees that lower the error most."""

import math

import pytest
import torch

from schoenbat.features.allocation import allocate
from schoenbat.kernels import KERNELS

SCALE = 32**-0.5


@pytest.mark.parametrize("fixed_norm", [True, False])
@pytest.mark.parametrize("name", KERNELS.names())
def test_the_budget_is_spent_and_more_of_it_never_gives_a_larger_error(name: str, fixed_norm: bool) -> None:
    kernel = KERNELS.get(name)()
    errors = []
    for num_features in (1, 2, 16, 32, 33, 34, 128, 528, 529, 530, 560, 561, 562, 1024, 7000):
        allocation = allocate(
            kernel, head_dim=32, num_features=num_features, scale=SCALE, max_degree=20, fixed_norm=fixed_norm
        )
        # x^2 has no more than its 528 monomials. Of exp, whole degrees get features, and products of different
        # coordinates of the next even degree.
        spent = num_features
        if name == "power2":
            spent = min(num_features, 528)
        elif name in ("exp", "trigh"):
            spent = 529 if 529 < num_features < 561 else 561 if num_features < 6545 else num_features
            spent = min(num_features, spent)
        assert allocation.num_features == spent
        assert all(share.num_features <= share.of for share in allocation.shares)
        errors.append(allocation.expected_error)
    assert errors == sorted(errors, reverse=True)


def test_the_constant_comes_first_then_the_linear_term_then_degree_2() -> None:
    kernel = KERNELS.get("exp")()

    def sizes(num_features: int) -> list[tuple[int, int, bool]]:
        allocation = allocate(kernel, head_dim=32, num_features=num_features, scale=1.0, max_degree=20, fixed_norm=True)
        return [(share.degree, share.num_features, share.exact) for share in allocation.shares]

    assert sizes(1) == [(0, 1, True)]
    assert sizes(16) == [(0, 1, True), (1, 15, False)]
    assert sizes(128) == [(0, 1, True), (1, 32, True), (2, 95, False)]
    assert sizes(600) == [(0, 1, True), (1, 32, True), (2, 528, True)]
    assert sizes(545) == [(0, 1, True), (1, 32, True), (2, 496, False)]


@pytest.mark.parametrize("head_dim", [1, 2, 3])
def test_enough_features_leave_no_error_and_are_not_all_used(head_dim: int) -> None:
    allocation = allocate(
        KERNELS.get("exp")(), head_dim=head_dim, num_features=5000, scale=1.0, max_degree=20, fixed_norm=False
    )
    assert allocation.expected_error < 1e-7
    assert allocation.num_features <= math.comb(head_dim + 20, 20)


@pytest.mark.parametrize("head_dim", [2, 3, 8, 64])
def test_expectations_are_those_of_random_directions(head_dim: int) -> None:
    # With the constant alone the error is the standard deviation of f(s t) over its root mean square; 400,000 samples
    # give it within 1 % (5 standard errors and more, a false alarm in a million).
    kernel = KERNELS.get("inverse")()
    x, y = torch.randn(2, 400_000, head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = kernel(0.5 * torch.cosine_similarity(x, y, dim=-1))
    expected = float(values.std() / values.square().mean().sqrt())
    allocation = allocate(kernel, head_dim=head_dim, num_features=1, scale=0.5, max_degree=4, fixed_norm=True)
    assert allocation.expected_error == pytest.approx(expected, rel=0.01)
    assert allocation.shares[0].weight ** 2 == pytest.approx(float(values.mean()), rel=0.01)


def test_it_prints_one_line_per_degree_and_gives_the_same_as_rows() -> None:
    allocation = allocate(KERNELS.get("log")(), head_dim=8, num_features=60, scale=0.3, max_degree=20, fixed_norm=True)
    lines = str(allocation).splitlines()
    rows = allocation.rows()
    assert len(lines) == len(rows) + 2
    assert [int(line.split()[1]) for line in lines[1:-1]] == [row["num_features"] for row in rows]
    assert lines[-1].startswith("60 features, expected relative error ")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_features": 0}, "num_features must be at least 1, not 0"),
        ({"max_degree": -1}, "max_degree must be at least 0, not -1"),
        ({"scale": 1.0}, "scale must lie between 0 and the kernel's radius 1, not 1"),
    ],
)
def test_values_out_of_range_are_refused(changed: dict[str, float], message: str) -> None:
    arguments = {"head_dim": 4, "num_features": 10, "scale": 0.5, "max_degree": 5, "fixed_norm": True} | changed
    with pytest.raises(ValueError, match=message):
        allocate(KERNELS.get("log")(), **arguments)  # type: ignore[arg-type]


def test_a_degree_is_described_by_as_many_features_as_it_has_harmonics() -> None:
    """Of 8 coordinates, degrees up to 3 have 165 monomials; C(11, 4) - C(9, 2) harmonics have degree 4."""
    allocation = allocate(
        KERNELS.get("exp")(), head_dim=8, num_features=200, scale=1.0, max_degree=20, fixed_norm=False
    )
    (share,) = [share for share in allocation.shares if share.degree == 4]
    assert (share.num_features, share.of) == (35, 294)


def test_the_constant_alone_leaves_all_of_the_variance_unexplained_and_a_whole_series_nothing() -> None:
    def unexplained(num_features: int, head_dim: int) -> float:
        sizes = {"head_dim": head_dim, "num_features": num_features, "max_degree": 20}
        return allocate(KERNELS.get("exp")(), **sizes, scale=1.0, fixed_norm=True).unexplained

    assert unexplained(1, 32) == pytest.approx(1)
    assert 0.01 < unexplained(33, 32) < 0.1
    assert unexplained(2000, 3) == pytest.approx(0, abs=1e-9)
