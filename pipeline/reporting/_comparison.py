"""The mechanisms of a profile compared with each other, task by task, and with baselines that need no model."""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.reporting._mechanisms import (
    CONTROL,
    EXACT,
    OURS,
    PLAIN,
    PPSBN,
    PUBLISHED,
    Mechanism,
    features_of,
    rows_of,
)
from pipeline.reporting._results import CELL, Results
from pipeline.reporting._statistics import LEVEL, Difference, holm, paired_differences
from schoenbat.registry import base_name

NEVER = "†"
"""Marks an accuracy of which no seed has passed the best baseline."""
COLOURED = 6
"""Lines that are coloured in a figure, at most."""


class Versus(NamedTuple):
    """A mechanism less another one, on one task.

    Attributes:
        adjusted: p by Holm over all of the family that it stands in.
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


class Comparison:
    """What reports are made of: results, and what follows from the scores.

    Attributes:
        results: the observations as DataFrames, and how they came about.
        mechanisms: all of the grid, in its order.
        rivals: those that are neither exact, nor uniform, nor of this project.
        tasks: of each task of the grid what was tested, the highest mean accuracy first.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        cells = results.cells
        self.mechanisms: list[Mechanism] = list(dict.fromkeys(zip(cells.attn, cells.dotf, cells.former, strict=True)))
        known = {results.reference, CONTROL, EXACT, PUBLISHED, OURS}
        self.rivals = [mechanism for mechanism in self.mechanisms if base_name(mechanism[0]) not in known]
        self._groups = dict(iter(cells.groupby(CELL[:-1])))
        self.tasks: dict[str, list[Mechanism]] = {
            task: sorted(
                (m for m in self.mechanisms if (task, m) in results.scores), key=lambda m: -results.scores[task, m].mean
            )
            for task in results.tasks
        }

    def versus(self, pairs: Iterable[tuple[str, Mechanism, Mechanism]]) -> list[Versus]:
        """Compare pairs, each on its task, corrected over all of them; without those that have no seed in common."""
        scores_of = self.results.scores_of
        wanted = {(task, one, other): (scores_of(task, one), scores_of(task, other)) for task, one, other in pairs}
        found = paired_differences(wanted)
        adjusted = holm([difference.p for difference in found.values()])
        return [Versus(*key, found[key], p) for key, p in zip(found, adjusted, strict=True)]

    def others_of(self, attn: str) -> dict[Mechanism, Mechanism]:
        """Return for each mechanism the `attn` that it is compared with: of the same former, if there is one."""
        named = [mechanism for mechanism in self.mechanisms if mechanism[0] == attn]
        alike = {mechanism[2]: mechanism for mechanism in reversed(named)}
        rest = [mechanism for mechanism in self.mechanisms if mechanism[0] != attn]
        return {mechanism: alike.get(mechanism[2], named[0]) for mechanism in rest if named}

    def without_ppsbn(self) -> dict[Mechanism, Mechanism]:
        """Return for each mechanism with ppSBN, of any gain, itself without, if that is in the grid."""
        with_it = [mechanism for mechanism in self.mechanisms if base_name(mechanism[2]) == PPSBN]
        others = {mechanism: (*mechanism[:2], PLAIN) for mechanism in with_it}
        return {mechanism: other for mechanism, other in others.items() if other in self.mechanisms}

    @functools.cached_property
    def leaders(self) -> dict[str, list[Mechanism]]:
        """Of each task the best and what is equal to it within the margin; nothing where the best has not learned."""
        return {task: self._leaders(task) for task in self.tasks}

    def _leaders(self, task: str) -> list[Mechanism]:
        if not self.tasks[task] or len(self.results.seeds) < 2 or self.never_passed(task, self.tasks[task][0]):
            return []
        best, *others = self.tasks[task]
        rows = self.versus((task, best, other) for other in others)
        return [best, *(row.other for row in rows if row.is_equal(self.results.margin))]

    def baselines(self, task: str) -> dict[str, float]:
        """Return what rules that need no model score on the test examples of a task, in percent by name."""
        found = self.results.data.get(task, {}).get("baselines", {})
        return {name: 100 * accuracy for name, accuracy in found.items()}

    def best_baseline(self, task: str) -> tuple[str, float] | None:
        """Return the name and the accuracy of the best of the baselines."""
        return max(self.baselines(task).items(), key=lambda baseline: baseline[1], default=None)

    def steps_to_pass(self, task: str, mechanism: Mechanism) -> list[float]:
        """Return the step at which each of its seeds passed the best baseline; infinity for never."""
        return self._cells(task, mechanism).passed_baseline_at.dropna().tolist()

    def never_passed(self, task: str, mechanism: Mechanism) -> bool:
        """Return whether there is a baseline, and no seed has passed it."""
        steps = self.steps_to_pass(task, mechanism)
        return bool(steps) and all(np.isinf(steps))

    def state_of(self, task: str, mechanism: Mechanism) -> float:
        """Return the bytes of its state, NaN where attention is not causal."""
        return float(self._cells(task, mechanism).state_bytes.max())

    def steps_of(self, task: str, mechanism: Mechanism) -> tuple[int, bool]:
        """Return the steps trained, and whether a seed was best at its last evaluation with room to rise on dev."""
        curves = self.results.curves
        last = rows_of(curves[curves.task == task], mechanism).groupby(CELL).step.max()
        cells = self._cells(task, mechanism).set_index(CELL).reindex(last.index)
        rising = (cells.best_step == last) & (100 - 100 * cells.dev_accuracy > self.results.margin)
        return int(last.max()), bool(rising.any())

    def timings(self, attn: str, dotf: str, features: int = 0) -> pd.DataFrame:
        """Return the timings of a training pass, causal where the cells are, at `features` if there are such."""
        is_causal = self.results.cells.state_bytes.notna().any()
        bench = self.results.bench if features else self.results.first_timings()
        bench = bench[bench.direction == ("causal forward+backward" if is_causal else "forward+backward")]
        own = rows_of(bench, (base_name(attn), dotf))
        return own[own.num_features == features] if features else own

    def time_of(self, mechanism: Mechanism) -> dict[int, float]:
        """Return its time of a training pass relative to torch's attention, by length; empty where it is not timed."""
        rows = self.timings(*mechanism[:2], features_of(self.results.params, mechanism[0]))
        return dict(zip(rows.length, 1 / rows.speedup_vs_sdpa, strict=True))

    def best_on_dev(self, task: str, among: Iterable[Mechanism]) -> Mechanism | None:
        """Return the one with the highest accuracy on dev of those that were tested."""
        tested = [mechanism for mechanism in among if mechanism in self.tasks[task]]
        return max(tested, key=lambda mechanism: self._cells(task, mechanism).dev_accuracy.mean(), default=None)

    def leading(self, task: str, attn: str, former: str = "") -> Mechanism | None:
        """Return the variant of `attn` that has the highest accuracy on dev, of this former if one is given."""
        among = [m for m in self.mechanisms if base_name(m[0]) == attn and former in ("", m[2])]
        return self.best_on_dev(task, among)

    def rival_at_equal_state(self, task: str, mechanism: Mechanism) -> Mechanism | None:
        """Return the rival that is best on dev of those with no more state, and with less than a cache."""
        most, cache = self.state_of(task, mechanism), self.leading(task, self.results.reference)
        least = self.state_of(task, cache) if cache else math.inf
        sizes = {rival: self.state_of(task, rival) for rival in self.rivals}
        return self.best_on_dev(task, [rival for rival, size in sizes.items() if size <= most and size < least])

    def roles(self, task: str) -> dict[Mechanism, str]:
        """Return what a reader compares first and what it stands for, each at its best variant on dev."""
        ours = self.leading(task, OURS)
        found = {
            self.results.reference: self.leading(task, self.results.reference),
            "ours": ours,
            "as published": self.leading(task, PUBLISHED, PPSBN) or self.leading(task, PUBLISHED),
            "exact kernel": self.leading(task, EXACT),
            "best rival": self.best_on_dev(task, self.rivals),
            "best at our state": self.rival_at_equal_state(task, ours) if ours else None,
            "uniform": self.leading(task, CONTROL),
            "window": self.leading(task, "window"),
        }
        named: dict[Mechanism, str] = {}
        for role, mechanism in found.items():
            if mechanism:
                named[mechanism] = f"{named[mechanism]}, {role}" if mechanism in named else role
        return named

    def coloured(self, task: str) -> list[Mechanism]:
        """Return the first `COLOURED` of the roles, one of each method."""
        by_method: dict[str, Mechanism] = {}
        for mechanism in self.roles(task):
            by_method.setdefault(base_name(mechanism[0]), mechanism)
        return list(by_method.values())[:COLOURED]

    def _cells(self, task: str, mechanism: Mechanism) -> pd.DataFrame:
        return self._groups[(task, *mechanism)]
