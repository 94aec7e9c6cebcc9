"""When a mechanism has passed the best baseline, which needs no model."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import keyed, label
from pipeline.reporting._table import MISSING, Table


class Baselines(Report):
    """Below the best baseline, an accuracy shows nothing that a mechanism has learned."""

    title = "When a baseline that needs no model is passed"
    order = 15

    def make(self, comparison: Comparison) -> Iterator[Table]:
        results = comparison.results
        bars = {task: best for task in results.tasks if (best := comparison.best_baseline(task)) is not None}
        if not bars or results.curves.empty:
            return
        values, shown = [], []
        for mechanism in comparison.mechanisms:
            shown.append({"mechanism": label(mechanism)})
            for task, (name, accuracy) in bars.items():
                steps = comparison.steps_to_pass(task, mechanism)
                passed = int(np.isfinite(steps).sum())
                median = float(np.median(steps)) if steps else float("nan")
                shown[-1][f"{task}: {name}, {accuracy:.1f} %"] = _show(len(steps), passed, median)
                values.append(
                    {"task": task, **keyed(mechanism), "baseline": name, "baseline_accuracy": accuracy}
                    | {"cells": len(steps), "passed": passed, "median_step": median}
                )
        yield Table(
            name="baselines",
            title="The step at which the best baseline of a task was passed",
            values=pd.DataFrame(values),
            shown=pd.DataFrame(shown),
            caption="Passed: dev accuracy is above what the baseline scores on the test examples by two standard "
            "errors of the difference, at an evaluation for the first time. The median over seeds; in parentheses "
            "how many passed at all, if not all did. CSV: inf is never.",
            provenance=results.caption(list(bars)),
        )


def _show(cells: int, passed: int, median: float) -> str:
    if passed == 0:
        return "never" if cells else MISSING
    when = f"{median:,.0f}" if np.isfinite(median) else "mostly never"
    return when if passed == cells else f"{when} ({passed} of {cells})"
