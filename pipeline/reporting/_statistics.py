"""Which differences between mechanisms are significant, over seeds and test examples together.

At one seed all mechanisms start from the same weights and see the same batches, and all are tested on the same
examples, so differences are taken within seed and example. Of one pair on one task there is a table d [S, n]: what the
first gets right less what the second gets right, for S seeds and n examples. Both are samples, of trainings and of
texts, and the mean of the table varies with both. With the mean squares MS of the two-way layout, s for seeds, i for
examples, e for the rest, its squared standard error is

    (MS_s + MS_i - MS_e) / (S n)

with MS_s and MS_i taken as MS_e where they came out less, which their expectations are not (Clark, 1973, "The
language-as-fixed-effect fallacy"). Intervals are of Student's t, with Satterthwaite's degrees of freedom, hardly more
than S - 1 where seeds matter: quantiles of so few seeds would be too narrow.

Where d is the same everywhere, as of two mechanisms that get everything right, there is no error to estimate, and yet n
examples are not all examples: of the others a share up to 1 - LEVEL^(1 / n) may be otherwise, about 3 / n (Hanley and
Lippman-Hand, 1983, "If nothing goes wrong, is everything all right?"). Interval and margins are as wide as that.
"""

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from schoenbat.lra.training import Predictions

LEVEL = 0.05
"""Of tests; intervals hold with 1 - LEVEL."""
POWER = 0.8
MARGIN = 1.0
"""Points of accuracy within which two mechanisms count as equal, unless another margin is asked for."""
LEAST_SEEDS = 6
"""Below, no p-value is shown: with so few, it hangs on the normality of what it is made from."""
REPLICATES = 2000
"""Of a bootstrap."""

Array = NDArray[np.float64]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Scores:
    """What one mechanism gets right on one task.

    Attributes:
        seeds: those that are finished.
        shares: float64 [S, n], per seed and example the right targets over the mean number of targets; the mean over
            the examples is the accuracy.
    """

    seeds: tuple[int, ...]
    shares: Array

    @staticmethod
    def of(predictions: Mapping[int, Predictions]) -> "Scores":
        """Return the scores of predictions of the same examples, by seed."""
        rows = [found.correct / found.targets.mean() for found in predictions.values()]
        return Scores(tuple(predictions), np.stack(rows))

    @property
    def accuracies(self) -> Array:
        """[S], in percent."""
        return 100 * self.shares.mean(axis=1)

    @property
    def mean(self) -> float:
        """Of the accuracies; NaN without any."""
        return float(self.accuracies.mean()) if self.seeds else float("nan")

    @property
    def std(self) -> float:
        """The sample standard deviation of the accuracies; NaN for fewer than two."""
        return float(self.accuracies.std(ddof=1)) if len(self.seeds) > 1 else float("nan")


@dataclass(frozen=True)
class Difference:
    """The first of a pair less the second, in points of accuracy.

    Attributes:
        seeds: how many both have; with one there is no error, and all else is NaN.
        error: standard error over seeds and examples.
        df: degrees of freedom of the error.
        low, high: of the interval with 1 - LEVEL.
        p: of a two-sided t-test of no difference.
        seed_share, example_share: of the squared error, what more seeds, or more examples, alone would take away; the
            rest shrinks with either.
        smallest: the least true difference that this many seeds and examples show with a probability of POWER.
        margin: the least margin within which the two are equal, by two one-sided t-tests at LEVEL.
    """

    estimate: float
    seeds: int
    error: float = float("nan")
    df: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    p: float = float("nan")
    seed_share: float = float("nan")
    example_share: float = float("nan")
    smallest: float = float("nan")
    margin: float = float("nan")


def paired_differences(pairs: Mapping[K, tuple[Scores, Scores]]) -> dict[K, Difference]:
    """Return the differences of all pairs over the seeds that both have, without those that have none."""
    found = {}
    for key, (one, other) in pairs.items():
        if common := [number for number in one.seeds if number in other.seeds]:
            mine, theirs = ([scores.seeds.index(number) for number in common] for scores in (one, other))
            found[key] = _difference(100 * (one.shares[mine] - other.shares[theirs]))
    return found


def _difference(table: Array) -> Difference:
    """Return what a table [S, n] of differences shows."""
    num_seeds, num_examples = table.shape
    rows, columns, mean = table.mean(axis=1), table.mean(axis=0), table.mean()
    estimate, seeds, examples = float(rows.mean()), num_seeds - 1, max(1, num_examples - 1)
    if not seeds:
        return Difference(estimate, num_seeds)
    of_rows = num_examples * float(((rows - mean) ** 2).sum())
    of_columns = num_seeds * float(((columns - mean) ** 2).sum())
    rest = max(0.0, float(((table - mean) ** 2).sum()) - of_rows - of_columns)
    rest_ms = rest / (seeds * examples)
    seeds_ms, examples_ms = max(rest_ms, of_rows / seeds), max(rest_ms, of_columns / examples)
    # Equal where differences in two seeds are not correlated: rounding must not choose the degrees of freedom then.
    if np.isclose(examples_ms, rest_ms, rtol=1e-9, atol=0.0):
        examples_ms = rest_ms
    of_examples = examples_ms - rest_ms
    whole, spread = seeds_ms + of_examples, seeds_ms**2 / seeds
    if of_examples:
        spread += examples_ms**2 / examples + rest_ms**2 / (seeds * examples)
    error, df = (whole / table.size) ** 0.5, whole**2 / spread if spread else float(seeds)
    reach, one_sided = (float(stats.t.ppf(1 - level, df)) * error for level in (LEVEL / 2, LEVEL))
    unseen = 0.0 if error else 100 * (1 - LEVEL ** (1 / num_examples))
    return Difference(
        estimate=estimate,
        seeds=num_seeds,
        error=error,
        df=df,
        low=estimate - reach - unseen,
        high=estimate + reach + unseen,
        p=float(2 * stats.t.sf(abs(estimate) / error, df)) if error else float(estimate == 0),
        seed_share=(seeds_ms - rest_ms) / whole if whole else 0.0,
        example_share=of_examples / whole if whole else 0.0,
        smallest=_noncentrality(round(df, 2)) * error + unseen,
        margin=abs(estimate) + one_sided + unseen,
    )


@functools.cache
def _noncentrality(df: float) -> float:
    """Return the true difference in standard errors that a t-test at LEVEL shows with a probability of POWER."""
    effect = TTestPower().solve_power(effect_size=None, nobs=df + 1, alpha=LEVEL, power=POWER)
    return float(np.squeeze(effect)) * (df + 1) ** 0.5


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of a family after Holm's correction; NaN stays NaN and counts for nothing."""
    adjusted = np.array(p_values, dtype=float)
    known = ~np.isnan(adjusted)
    if known.any():
        adjusted[known] = multipletests(adjusted[known], method="holm")[1]
    return adjusted.tolist()
