"""The statistics of the report against other libraries, and against what they promise in simulations."""

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from pipeline.reporting._statistics import (
    MARGIN,
    Difference,
    Scores,
    holm,
    paired_differences,
)
from schoenbat.lra.training import Predictions

Array = NDArray[np.float64]


def made_up(
    seed: int, num_seeds: int, num_examples: int, of_seeds: float, of_examples: float, rest: float, mean: float = 0.0
) -> Array:
    """Differences [S, n] in points: effects of seeds and of examples, and what is left."""
    generator = np.random.default_rng(seed)
    rows, columns = generator.normal(0, of_seeds, (num_seeds, 1)), generator.normal(0, of_examples, (1, num_examples))
    return mean + rows + columns + generator.normal(0, rest, (num_seeds, num_examples))


def pair_of(table: Array) -> tuple[Scores, Scores]:
    seeds = tuple(range(len(table)))
    return Scores(seeds, table / 100), Scores(seeds, np.zeros_like(table))


def difference_of(table: Array) -> Difference:
    return paired_differences({"pair": pair_of(table)})["pair"]


def test_accuracy_is_the_mean_over_targets_and_differences_are_paired_by_seed() -> None:
    def predictions(*correct: int) -> Predictions:
        return Predictions(np.array(correct), np.full(len(correct), 4), np.zeros(len(correct)), None)

    one = Scores.of({0: predictions(4, 2, 0), 1: predictions(4, 4, 1)})
    other = Scores.of({1: predictions(0, 4, 2), 2: predictions(1, 1, 1)})
    assert one.accuracies.tolist() == pytest.approx([50, 75])
    found = paired_differences({"pair": (one, other)})["pair"]
    assert (found.seeds, found.estimate) == (1, pytest.approx(25))
    assert np.isnan(found.error)
    assert np.isnan(found.p)


@pytest.mark.parametrize(
    ("num_seeds", "of_seeds", "of_examples", "rest"),
    [(6, 1.0, 20.0, 40.0), (6, 3.0, 0.0, 10.0), (6, 0.1, 30.0, 5.0), (6, 0.5, 10.0, 40.0), (2, 3.0, 0.0, 10.0)],
)
def test_the_error_is_that_of_an_analysis_of_variance(
    num_seeds: int, of_seeds: float, of_examples: float, rest: float
) -> None:
    table = made_up(3, num_seeds, 60, of_seeds, of_examples, rest)
    rows, columns = np.indices(table.shape)
    fitted = anova_lm(
        ols("y ~ C(s) + C(i)", pd.DataFrame({"y": table.ravel(), "s": rows.ravel(), "i": columns.ravel()})).fit()
    )
    seeds_ms, examples_ms, rest_ms = fitted["mean_sq"].tolist()
    seeds_ms = max(seeds_ms, rest_ms)
    squared = (seeds_ms + max(0, examples_ms - rest_ms)) / table.size
    found = difference_of(table)
    assert found.error == pytest.approx(squared**0.5)
    assert found.seed_share == pytest.approx(max(0, seeds_ms - rest_ms) / table.size / squared, abs=1e-9)
    assert found.example_share == pytest.approx(max(0, examples_ms - rest_ms) / table.size / squared, abs=1e-9)


def test_seeds_that_agree_by_chance_do_not_make_a_difference_certain() -> None:
    """Each of three seeds differs by 2 of 200 examples, but each on others."""
    table = np.zeros((3, 200))
    for seed in range(3):
        table[seed, 10 * seed : 10 * seed + 6] = [100, 100, 100, 100, -100, -100]
    found = difference_of(table)
    assert found.estimate == pytest.approx(1)
    assert found.low < 0 < found.high


@pytest.mark.parametrize("num_examples", range(7, 40))
def test_rounding_does_not_choose_the_degrees_of_freedom(num_examples: int) -> None:
    """Differences of two seeds that are not correlated: examples explain nothing, however sums are rounded."""
    table = np.zeros((2, num_examples))
    table[0, :2], table[1, 2:4] = 100, (100, -100)
    found = difference_of(table)
    assert found.df == 1
    assert found.example_share == 0


def test_with_seeds_alone_it_is_the_paired_t_test_of_scipy() -> None:
    """All examples alike, so that nothing but seeds vary."""
    per_seed = np.array([1.2, 0.3, 2.0, 1.1, -0.2, 0.9, 1.4])
    found = difference_of(np.repeat(per_seed[:, None], 50, axis=1))
    expected = stats.ttest_1samp(per_seed, 0)
    interval = expected.confidence_interval(0.95)
    assert found.df == pytest.approx(6)
    assert found.error == pytest.approx(stats.sem(per_seed))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue)


def test_intervals_hold_what_they_promise() -> None:
    """300 comparisons without a difference, of 5 seeds: nearly 95 % within. One false alarm in 1,000 at 92 %."""
    pairs = {number: pair_of(made_up(number, 5, 200, 2, 20, 40)) for number in range(300)}
    within = sum(found.low <= 0 <= found.high for found in paired_differences(pairs).values())
    assert within >= stats.binom.ppf(0.001, 300, 0.92)


def test_the_smallest_difference_is_found_in_four_of_five_cases() -> None:
    """400 comparisons with a true difference of that size: between 74 and 86 % are found."""
    of_seeds, rest = 2.0, 10.0
    error = ((of_seeds**2 + rest**2 / 100) / 8) ** 0.5
    typical = difference_of(made_up(0, 8, 100, of_seeds, 0, rest))
    smallest = typical.smallest / typical.error * error
    pairs = {number: pair_of(made_up(number, 8, 100, of_seeds, 0, rest, mean=smallest)) for number in range(400)}
    found = np.mean([difference.p < 0.05 for difference in paired_differences(pairs).values()])
    assert 0.74 < found < 0.86


def test_equality_within_a_margin_is_that_of_two_one_sided_tests() -> None:
    per_seed = np.array([0.4, -0.1, 0.2, 0.3, 0.1, -0.2])
    found = difference_of(np.repeat(per_seed[:, None], 20, axis=1))
    # At the least margin the larger of the two p-values is just the level.
    larger = ttost_paired(per_seed, np.zeros(6), -found.margin, found.margin)[0]
    assert larger == pytest.approx(0.05)


def test_what_is_not_significant_with_few_examples_is_not_equal() -> None:
    few, many = (difference_of(np.zeros((3, n))) for n in (40, 4000))
    unseen = 100 * stats.binomtest(0, 40).proportion_ci(0.90, "exact").high
    assert (few.low, few.high, few.margin) == pytest.approx((-unseen, unseen, unseen))
    assert few.margin > few.smallest - 1e-9 > MARGIN
    assert many.margin < MARGIN
    assert few.p == 1.0


def test_holm_is_statsmodels_and_leaves_out_what_has_no_p_value() -> None:
    given = [0.01, 0.04, float("nan"), 0.03, 0.2]
    found = holm(given)
    expected = multipletests([0.01, 0.04, 0.03, 0.2], method="holm")[1].tolist()
    assert [found[number] for number in (0, 1, 3, 4)] == expected
    assert np.isnan(found[2])
    assert holm([]) == []


def test_the_same_scores_give_the_same_numbers_whatever_else_is_compared() -> None:
    tables = {number: pair_of(made_up(number, 4, 50, 1, 10, 30)) for number in range(3)}
    together, alone = (vars(paired_differences(given)[1]) for given in (tables, {1: tables[1]}))
    assert together == pytest.approx(alone, rel=1e-9)
