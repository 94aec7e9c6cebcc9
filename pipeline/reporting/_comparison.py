"""The mechanisms of a profile compared with each other, task by task, and with baselines that need no model."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.reporting._mechanisms import Mechanism, rows_of, style
from pipeline.reporting._results import Results
from pipeline.reporting._statistics import LEVEL, Difference, holm, interquartile_mean, letters, paired_differences
from pipeline.reporting._table import MISSING
from schoenbat.registry import base_name

CONTROL = "mean"
"""Uniform attention, the control."""
NEVER = "†"
"""Marks an accuracy of which no seed has passed the best baseline."""
MOST_GROUPS = 6
"""With more groups than that, the letters of a mechanism cannot be read any more."""


class Versus(NamedTuple):
    """A mechanism less another one, on one task.

    Attributes:
        adjusted: p by Holm over all of the family, or table, that it stands in.
    """

    task: str
    mechanism: Mechanism
    other: Mechanism
    difference: Difference
    adjusted: float

    @property
    def significant(self) -> bool:
        return self.adjusted < LEVEL

    def is_equal(self, margin: float) -> bool:
        return self.difference.margin < margin


@dataclass(frozen=True)
class OnTask:
    """All pairs of one task, and the groups without a significant difference.

    Attributes:
        means: accuracy in percent, the mean over seeds.
        pairs: each once, of those that have a seed in common; significant among all of these.
    """

    means: Mapping[Mechanism, float]
    pairs: Sequence[Versus]
    groups: Mapping[Mechanism, str]

    @functools.cached_property
    def both_ways(self) -> dict[tuple[Mechanism, Mechanism], Versus]:
        """The pairs by their mechanisms, and each the other way round."""
        found = {(row.mechanism, row.other): row for row in self.pairs}
        return found | {
            (other, one): row._replace(mechanism=other, other=one, difference=row.difference.reversed())
            for (one, other), row in found.items()
        }

    @property
    def marks(self) -> Mapping[Mechanism, str]:
        """The groups of each mechanism as letters, where they are few enough to be read; else none at all."""
        return self.groups if len(set().union(*self.groups.values())) <= MOST_GROUPS else {}

    @property
    def best(self) -> Mechanism | None:
        return max(self.means, key=lambda mechanism: self.means[mechanism], default=None)

    def leaders(self) -> list[Mechanism]:
        """Return the best, and those that are not significantly different from it."""
        worse = {row.other for row in self.both_ways.values() if row.mechanism == self.best and row.significant}
        return [mechanism for mechanism in self.means if mechanism not in worse]


class Comparison:
    """What reports are made of: results, and what follows from the scores.

    Attributes:
        results: the observations as DataFrames, and how they came about.
        mechanisms: all of the grid, in its order.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        cells, bench = results.cells, results.bench
        self.mechanisms: list[Mechanism] = list(dict.fromkeys(zip(cells.attn, cells.dotf, cells.former, strict=True)))
        self._drawn = [*self.mechanisms, *zip(bench.attn, bench.dotf, strict=True)]

    def style(self, mechanism: Sequence[str]) -> dict[str, Any]:
        """Return how a mechanism, or one of the benchmark, is drawn in all figures."""
        return style(self._drawn, mechanism)

    @functools.cached_property
    def tasks(self) -> dict[str, OnTask]:
        """The comparisons on each task of the grid."""
        return {task: self._on(task) for task in self.results.tasks}

    def _on(self, task: str) -> OnTask:
        scores = {m: self.results.scores[task, m] for m in self.mechanisms if (task, m) in self.results.scores}
        both = itertools.combinations(scores, 2)
        found = paired_differences({(one, other): (scores[one], scores[other]) for one, other in both})
        pairs = _family((task, *pair, difference) for pair, difference in found.items())
        means = {mechanism: of_mechanism.mean for mechanism, of_mechanism in scores.items()}
        return OnTask(means, pairs, letters(means, [(row.mechanism, row.other) for row in pairs if row.significant]))

    def others_of(self, attn: str) -> dict[Mechanism, Mechanism]:
        """Return for each mechanism the `attn` that it is compared with: of the same former, if there is one."""
        named = [mechanism for mechanism in self.mechanisms if mechanism[0] == attn]
        alike = {mechanism[2]: mechanism for mechanism in reversed(named)}
        rest = [mechanism for mechanism in self.mechanisms if mechanism[0] != attn]
        return {mechanism: alike.get(mechanism[2], named[0]) for mechanism in rest if named}

    def versus(self, others: Mapping[Mechanism, Mechanism]) -> list[Versus]:
        """Compare mechanisms with others on every task, corrected over all of them.

        Args:
            others: `others_of` a mechanism, `without_ppsbn`, or what else is of interest.
        """
        return self.versus_on((task, one, other) for task in self.tasks for one, other in others.items())

    def versus_on(self, pairs: Iterable[tuple[str, Mechanism, Mechanism]]) -> list[Versus]:
        """Compare pairs, each on its task, corrected over all of them; without those that have no seed in common."""
        return _family(
            (task, one, other, found[one, other].difference)
            for task, one, other in pairs
            if (one, other) in (found := self.tasks[task].both_ways)
        )

    def without_ppsbn(self) -> dict[Mechanism, Mechanism]:
        """Return for each mechanism with ppSBN, of any gain, itself without, if that is in the grid."""
        with_it = [mechanism for mechanism in self.mechanisms if base_name(mechanism[2]) == "maclauformer"]
        others = {mechanism: (*mechanism[:2], "transformer") for mechanism in with_it}
        return {mechanism: other for mechanism, other in others.items() if other in self.mechanisms}

    def baselines(self, task: str) -> dict[str, float]:
        """Return what rules that need no model score on the test examples of a task, in percent by name."""
        found = self.results.data.get(task, {}).get("baselines", {})
        return {name: 100 * accuracy for name, accuracy in found.items()}

    def best_baseline(self, task: str) -> tuple[str, float] | None:
        """Return the name and the accuracy of the best of the baselines."""
        return max(self.baselines(task).items(), key=lambda baseline: baseline[1], default=None)

    def steps_to_pass(self, task: str, mechanism: Mechanism) -> list[float]:
        """Return the step at which each of its seeds passed the best baseline; infinity for never."""
        cells = rows_of(self.results.cells[self.results.cells.task == task], mechanism)
        return cells.passed_baseline_at.dropna().tolist()

    def never_passed(self, task: str, mechanism: Mechanism) -> bool:
        """Return whether there is a baseline, and no seed has passed it."""
        steps = self.steps_to_pass(task, mechanism)
        return bool(steps) and all(np.isinf(steps))

    def shown(self, task: str, mechanism: Mechanism, how: str = ".2f", sign: str = " ± ") -> str:
        """Return mean and standard deviation over seeds, the groups, and `NEVER` where it applies, as text."""
        scores = self.results.scores_of(task, mechanism)
        if not scores.seeds:
            return MISSING
        spread = f"{sign}{scores.std:{how}}" if len(scores.seeds) > 1 else ""
        group = self.tasks[task].marks.get(mechanism, "") if len(self.results.seeds) > 1 else ""
        never = NEVER if self.never_passed(task, mechanism) else ""
        return f"{scores.mean:{how}}{spread}{f' {group}' if group else ''}{never}"

    def middle(self, mechanism: Mechanism) -> tuple[float, float, float]:
        """Return the interquartile mean over all runs of all tasks of accuracy above the majority class, in percent.

        0 is the majority class and 100 everything right; NaN where a task is missing, or there is one task only.
        """
        runs = []
        for task in self.results.tasks:
            floor = self.baselines(task).get("majority class", float("nan"))
            runs.append(100 * (self.results.scores_of(task, mechanism).accuracies - floor) / (100 - floor))
        return interquartile_mean(runs) if len(runs) > 1 and all(map(len, runs)) else (float("nan"),) * 3


def _family(rows: Iterable[tuple[str, Mechanism, Mechanism, Difference]]) -> list[Versus]:
    """Judge differences, corrected over all of them."""
    family = list(rows)
    adjusted = holm([difference.p for *_, difference in family])
    return [Versus(*row, p) for row, p in zip(family, adjusted, strict=True)]
