"""The mechanisms of a profile compared with each other, task by task, and with rules that need no model."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.reporting._collect import Mechanism, Setting
from pipeline.reporting._mechanisms import mechanisms, rows_of
from pipeline.reporting._statistics import (
    Difference,
    holm,
    interquartile_mean,
    letters,
    paired_differences,
)

CONTROL = "mean"
"""Uniform attention: what it reaches owes nothing to where one attends."""
BEYOND = 2.0
"""Standard errors by which a cell must be above a rule to have passed it."""

MOST_GROUPS = 6
"""With more groups than that, the letters of a mechanism cannot be read any more."""

Pair = tuple[Mechanism, Mechanism]


class Rule(NamedTuple):
    """A rule that needs no model, and what it scores on the test examples."""

    name: str
    accuracy: float


@dataclass(frozen=True)
class Versus:
    """A mechanism less another one that is named, on one task.

    Attributes:
        adjusted: p by Holm over all of the table that it stands in.
        apart: whether it is more than luck, in that table.
    """

    task: str
    mechanism: Mechanism
    other: Mechanism
    difference: Difference
    adjusted: float
    apart: bool


@dataclass(frozen=True)
class OnTask:
    """All pairs of one task, each once, and the groups that cannot be told apart.

    Attributes:
        means: accuracy in percent, the mean over seeds.
        apart: whether a pair is told apart, among all pairs of the task.
    """

    task: str
    means: Mapping[Mechanism, float]
    differences: Mapping[Pair, Difference]
    apart: Mapping[Pair, bool]
    groups: Mapping[Mechanism, str]

    def difference(self, one: Mechanism, other: Mechanism) -> Difference | None:
        """Of `one` less `other`; None if they have no seed in common."""
        if (one, other) in self.differences:
            return self.differences[one, other]
        found = self.differences.get((other, one))
        return None if found is None else found.reversed()

    def is_apart(self, one: Mechanism, other: Mechanism) -> bool:
        return self.apart.get((one, other), self.apart.get((other, one), False))

    @property
    def marks(self) -> Mapping[Mechanism, str]:
        """The groups of each mechanism as letters, where they are few enough to be read; else none at all."""
        return self.groups if len(set().union(*self.groups.values())) <= MOST_GROUPS else {}

    def best(self) -> Mechanism | None:
        return max(self.means, key=lambda mechanism: self.means[mechanism], default=None)

    def leaders(self) -> list[Mechanism]:
        """The best, and those that are not told apart from it."""
        best = self.best()
        if best is None:
            return []
        return [mechanism for mechanism in self.means if mechanism == best or not self.is_apart(best, mechanism)]


class Comparison:
    """What follows from the scores in a setting. Everything is computed once, when it is first asked for."""

    def __init__(self, frame: pd.DataFrame, setting: Setting) -> None:
        self.frame, self.setting = frame, setting
        self.mechanisms = mechanisms(frame)

    @functools.cached_property
    def tasks(self) -> dict[str, OnTask]:
        """Of each task of the grid."""
        return {task: self._on(task) for task in self.setting.tasks}

    def _on(self, task: str) -> OnTask:
        scores = {m: self.setting.scores[task, m] for m in self.mechanisms if (task, m) in self.setting.scores}
        pairs = {(one, other): (scores[one], scores[other]) for one, other in itertools.combinations(scores, 2)}
        found = paired_differences(pairs)
        adjusted = holm(found)
        apart = {pair: found[pair].is_apart(adjusted[pair], len(found)) for pair in found}
        means = {mechanism: float(of_mechanism.accuracies.mean()) for mechanism, of_mechanism in scores.items()}
        return OnTask(task, means, found, apart, letters(means, apart))

    def others_of(self, attn: str) -> dict[Mechanism, Mechanism]:
        """For each mechanism the one called `attn` that it is compared with: with the same former, if there is one."""
        named = [mechanism for mechanism in self.mechanisms if mechanism[0] == attn]
        found = {}
        for mechanism in self.mechanisms:
            alike = [other for other in named if other[2] == mechanism[2]]
            if named and mechanism[0] != attn:
                found[mechanism] = (alike or named)[0]
        return found

    def versus(self, attn: str) -> list[Versus]:
        """Every mechanism on every task less the one called `attn`, corrected over all of them."""
        chosen = {
            (task, mechanism): (other, difference)
            for task, on_task in self.tasks.items()
            for mechanism, other in self.others_of(attn).items()
            if mechanism in on_task.means and other in on_task.means
            if (difference := on_task.difference(mechanism, other)) is not None
        }
        return _corrected(chosen)

    def planned(self, attn: str) -> list[Versus]:
        """The one called `attn` less uniform attention with the same former, on every task, corrected over these alone.

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
        """Every mechanism that is there both ways: with ppSBN less without, corrected over all of them."""
        with_it = [m for m in self.mechanisms if m[2] == "maclauformer" and (*m[:2], "transformer") in self.mechanisms]
        chosen = {}
        for task, on_task in self.tasks.items():
            for mechanism in with_it:
                other = (mechanism[0], mechanism[1], "transformer")
                difference = on_task.difference(mechanism, other)
                if difference is not None:
                    chosen[task, mechanism] = (other, difference)
        return _corrected(chosen)

    def rules(self, task: str) -> list[Rule]:
        """Those of a task, with what they score in percent."""
        found = self.frame[(self.frame.quantity == "rule_accuracy") & (self.frame.task == task)]
        return [Rule(str(name), 100 * value) for name, value in zip(found.direction, found.value, strict=True)]

    def best_rule(self, task: str) -> Rule | None:
        return max(self.rules(task), key=lambda rule: rule.accuracy, default=None)

    @functools.cached_property
    def passed(self) -> dict[tuple[str, Mechanism, int], float]:
        """The step at which each finished cell passed the best rule on dev; infinity for never, NaN without a rule."""
        curves = self.frame[self.frame.quantity == "curve_dev_accuracy"]
        found = {}
        for task in self.setting.tasks:
            rule = self.best_rule(task)
            sizes = [self._size(task, split) for split in ("dev", "test")]
            of_task = curves[curves.task == task]
            for mechanism in self.mechanisms:
                for seed, rows in rows_of(of_task, mechanism).groupby("seed"):
                    bar = rule.accuracy / 100 if rule else float("nan")
                    found[task, mechanism, int(str(seed))] = _passed(rows, bar, *sizes)
        return found

    def steps_to_pass(self, task: str, mechanism: Mechanism) -> list[float]:
        """Those of its seeds."""
        return [step for key, step in self.passed.items() if key[:2] == (task, mechanism)]

    def never_passed(self, task: str, mechanism: Mechanism) -> bool:
        """Whether there is a rule, and no seed has passed it."""
        steps = self.steps_to_pass(task, mechanism)
        return bool(steps) and all(np.isinf(steps))

    def _size(self, task: str, split: str) -> float:
        found = self.frame[(self.frame.quantity == f"data_{split}") & (self.frame.task == task)]
        return float(found.value.iloc[0]) if len(found) else float("nan")

    def middle(self, mechanism: Mechanism) -> tuple[float, float, float]:
        """The interquartile mean over all runs of all tasks, of accuracy above that of the majority class, in percent.

        0 is the majority class and 100 everything right; NaN where a task is missing, or there is one task only.
        """
        runs = []
        for task in self.setting.tasks:
            floor = next((rule.accuracy for rule in self.rules(task) if rule.name == "majority class"), float("nan"))
            if (task, mechanism) not in self.setting.scores:
                return (float("nan"),) * 3
            runs.append(100 * (self.setting.scores[task, mechanism].accuracies - floor) / (100 - floor))
        return interquartile_mean(runs) if len(runs) > 1 else (float("nan"),) * 3


def compared(frame: pd.DataFrame, setting: Setting) -> Comparison:
    """The comparison of what is in `frame`, the same one for all reports that share the setting."""
    if setting.comparison is None:
        setting.comparison = Comparison(frame, setting)
    return setting.comparison


def _corrected(chosen: Mapping[tuple[str, Mechanism], tuple[Mechanism, Difference]]) -> list[Versus]:
    differences = {key: difference for key, (_, difference) in chosen.items()}
    adjusted, family = holm(differences), len(differences)
    return [
        Versus(task, mechanism, other, found, adjusted[key], found.is_apart(adjusted[key], family))
        for (task, mechanism), (other, found) in chosen.items()
        for key in [(task, mechanism)]
    ]


def _passed(rows: pd.DataFrame, bar: float, dev_size: float, test_size: float) -> float:
    """The first step at which dev accuracy is BEYOND standard errors above `bar`, which a rule scores on test."""
    if np.isnan(bar):
        return float("nan")
    ordered = rows.sort_values("step")
    error = (ordered.value * (1 - ordered.value) / dev_size + bar * (1 - bar) / test_size) ** 0.5
    above = ordered.step[ordered.value - bar > BEYOND * error]
    return float(above.iloc[0]) if len(above) else float("inf")
