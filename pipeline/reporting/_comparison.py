"""The mechanisms of a profile compared with each other, task by task, and with baselines that need no model."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.reporting._mechanisms import Mechanism, mechanisms, rows_of
from pipeline.reporting._setting import Setting
from pipeline.reporting._statistics import (
    Difference,
    holm,
    interquartile_mean,
    letters,
    paired_differences,
)

CONTROL = "mean"
"""Uniform attention, the control."""
BEYOND = 2.0
"""Standard errors by which a cell must be above a baseline to have passed it."""

MOST_GROUPS = 6
"""With more groups than that, the letters of a mechanism cannot be read any more."""

Pair = tuple[Mechanism, Mechanism]


class Baseline(NamedTuple):
    """A rule that needs no model, and what it scores on the test examples in percent."""

    name: str
    accuracy: float


@dataclass(frozen=True)
class Versus:
    """A mechanism less another one that is named, on one task.

    Attributes:
        adjusted: p by Holm over all of the table that it stands in.
        significant: whether it is, in that table.
    """

    task: str
    mechanism: Mechanism
    other: Mechanism
    difference: Difference
    adjusted: float
    significant: bool


@dataclass(frozen=True)
class OnTask:
    """All pairs of one task, each once, and the groups without a significant difference.

    Attributes:
        means: accuracy in percent, the mean over seeds.
        significant: whether a pair differs significantly, among all pairs of the task.
    """

    task: str
    means: Mapping[Mechanism, float]
    differences: Mapping[Pair, Difference]
    significant: Mapping[Pair, bool]
    groups: Mapping[Mechanism, str]

    def difference(self, one: Mechanism, other: Mechanism) -> Difference | None:
        """Return that of `one` less `other`; None if they have no seed in common."""
        if (one, other) in self.differences:
            return self.differences[one, other]
        found = self.differences.get((other, one))
        return None if found is None else found.reversed()

    def is_significant(self, one: Mechanism, other: Mechanism) -> bool:
        return self.significant.get((one, other), self.significant.get((other, one), False))

    @property
    def marks(self) -> Mapping[Mechanism, str]:
        """The groups of each mechanism as letters, where they are few enough to be read; else none at all."""
        return self.groups if len(set().union(*self.groups.values())) <= MOST_GROUPS else {}

    def best(self) -> Mechanism | None:
        return max(self.means, key=lambda mechanism: self.means[mechanism], default=None)

    def leaders(self) -> list[Mechanism]:
        """Return the best, and those that are not significantly different from it."""
        best = self.best()
        if best is None:
            return []
        return [mechanism for mechanism in self.means if mechanism == best or not self.is_significant(best, mechanism)]


class Comparison:
    """What reports are made of: observations, their setting, and what follows from the scores.

    Everything is computed once, when it is first asked for.
    """

    def __init__(self, frame: pd.DataFrame, setting: Setting) -> None:
        self.frame, self.setting = frame, setting
        self.mechanisms = mechanisms(frame)

    @functools.cached_property
    def tasks(self) -> dict[str, OnTask]:
        """The comparisons on each task of the grid."""
        return {task: self._on(task) for task in self.setting.tasks}

    def _on(self, task: str) -> OnTask:
        scores = {m: self.setting.scores[task, m] for m in self.mechanisms if (task, m) in self.setting.scores}
        pairs = {(one, other): (scores[one], scores[other]) for one, other in itertools.combinations(scores, 2)}
        found = paired_differences(pairs)
        adjusted = holm(found)
        significant = {pair: found[pair].is_significant(adjusted[pair], len(found)) for pair in found}
        means = {mechanism: float(of_mechanism.accuracies.mean()) for mechanism, of_mechanism in scores.items()}
        return OnTask(task, means, found, significant, letters(means, significant))

    def others_of(self, attn: str) -> dict[Mechanism, Mechanism]:
        """Return for each mechanism the `attn` that it is compared with: of the same former, if there is one."""
        named = [mechanism for mechanism in self.mechanisms if mechanism[0] == attn]
        found = {}
        for mechanism in self.mechanisms:
            alike = [other for other in named if other[2] == mechanism[2]]
            if named and mechanism[0] != attn:
                found[mechanism] = (alike or named)[0]
        return found

    def versus(self, attn: str) -> list[Versus]:
        """Compare every mechanism on every task with the one called `attn`, corrected over all of them."""
        chosen = {
            (task, mechanism): (other, difference)
            for task, on_task in self.tasks.items()
            for mechanism, other in self.others_of(attn).items()
            if mechanism in on_task.means and other in on_task.means
            if (difference := on_task.difference(mechanism, other)) is not None
        }
        return _corrected(chosen)

    def planned(self, attn: str) -> list[Versus]:
        """Compare the one called `attn` with uniform attention of the same former, on every task, corrected over these.

        It is the first question, whatever else is in the grid: does it matter where one attends?
        """
        found = self.others_of(CONTROL)
        pairs = {one: other for one, other in found.items() if one[0] == attn and one[2] == other[2]}
        chosen = {
            (task, one): (other, difference)
            for task, on_task in self.tasks.items()
            for one, other in pairs.items()
            if (difference := on_task.difference(one, other)) is not None
        }
        return _corrected(chosen)

    def ppsbn(self) -> list[Versus]:
        """Compare every mechanism with ppSBN with itself without, corrected over all of them."""
        with_it = [m for m in self.mechanisms if m[2] == "maclauformer" and (*m[:2], "transformer") in self.mechanisms]
        chosen = {}
        for task, on_task in self.tasks.items():
            for mechanism in with_it:
                other = (mechanism[0], mechanism[1], "transformer")
                difference = on_task.difference(mechanism, other)
                if difference is not None:
                    chosen[task, mechanism] = (other, difference)
        return _corrected(chosen)

    def baselines(self, task: str) -> list[Baseline]:
        """Return the baselines of a task."""
        found = self.frame[(self.frame.quantity == "baseline_accuracy") & (self.frame.task == task)]
        return [Baseline(str(name), 100 * value) for name, value in zip(found.direction, found.value, strict=True)]

    def best_baseline(self, task: str) -> Baseline | None:
        return max(self.baselines(task), key=lambda baseline: baseline.accuracy, default=None)

    @functools.cached_property
    def passed(self) -> dict[tuple[str, Mechanism, int], float]:
        """The step at which each finished cell passed the best baseline on dev; infinity for never, NaN without one."""
        curves = self.frame[self.frame.quantity == "curve_dev_accuracy"]
        found = {}
        for task in self.setting.tasks:
            baseline = self.best_baseline(task)
            bar = baseline.accuracy / 100 if baseline else float("nan")
            sizes = [self._size(task, split) for split in ("dev", "test")]
            of_task = curves[curves.task == task]
            for mechanism in self.mechanisms:
                for seed, rows in rows_of(of_task, mechanism).groupby("seed"):
                    found[task, mechanism, int(str(seed))] = _passed(rows, bar, *sizes)
        return found

    def steps_to_pass(self, task: str, mechanism: Mechanism) -> list[float]:
        """Return the step of each of its seeds."""
        return [step for key, step in self.passed.items() if key[:2] == (task, mechanism)]

    def never_passed(self, task: str, mechanism: Mechanism) -> bool:
        """Return whether there is a baseline, and no seed has passed it."""
        steps = self.steps_to_pass(task, mechanism)
        return bool(steps) and all(np.isinf(steps))

    def _size(self, task: str, split: str) -> float:
        found = self.frame[(self.frame.quantity == f"data_{split}") & (self.frame.task == task)]
        return float(found.value.iloc[0]) if len(found) else float("nan")

    def middle(self, mechanism: Mechanism) -> tuple[float, float, float]:
        """Return the interquartile mean over all runs of all tasks of accuracy above the majority class, in percent.

        0 is the majority class and 100 everything right; NaN where a task is missing, or there is one task only.
        """
        runs = []
        for task in self.setting.tasks:
            baselines = {baseline.name: baseline.accuracy for baseline in self.baselines(task)}
            floor = baselines.get("majority class", float("nan"))
            if (task, mechanism) not in self.setting.scores:
                return (float("nan"),) * 3
            runs.append(100 * (self.setting.scores[task, mechanism].accuracies - floor) / (100 - floor))
        return interquartile_mean(runs) if len(runs) > 1 else (float("nan"),) * 3


def _corrected(chosen: Mapping[tuple[str, Mechanism], tuple[Mechanism, Difference]]) -> list[Versus]:
    differences = {key: difference for key, (_, difference) in chosen.items()}
    adjusted, family = holm(differences), len(differences)
    return [
        Versus(task, mechanism, other, found, adjusted[key], found.is_significant(adjusted[key], family))
        for (task, mechanism), (other, found) in chosen.items()
        for key in [(task, mechanism)]
    ]


def _passed(rows: pd.DataFrame, bar: float, dev_size: float, test_size: float) -> float:
    """Return the first step at which dev accuracy is BEYOND standard errors above `bar`, a baseline's on test."""
    if np.isnan(bar):
        return float("nan")
    ordered = rows.sort_values("step")
    error = (ordered.value * (1 - ordered.value) / dev_size + bar * (1 - bar) / test_size) ** 0.5
    above = ordered.step[ordered.value - bar > BEYOND * error]
    return float(above.iloc[0]) if len(above) else float("inf")
