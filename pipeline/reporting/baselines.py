"""When a mechanism has passed the best baseline, which needs no model."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import keyed, named
from pipeline.reporting._table import MISSING, Table


class Baselines(Report):
    """Below the best baseline, an accuracy shows nothing that a mechanism has learned."""

    title = "When a baseline that needs no model is passed"
    order = 15

    def make(self, comparison: Comparison) -> Iterator[Table]:
        setting = comparison.setting
        bars = {task: best for task in setting.tasks if (best := comparison.best_baseline(task)) is not None}
        if not bars or not comparison.passed:
            return
        values, shown = [], []
        for mechanism in comparison.mechanisms:
            texts = {}
            for task, baseline in bars.items():
                steps = comparison.steps_to_pass(task, mechanism)
                texts[f"{task}: {baseline.name}, {baseline.accuracy:.1f} %"] = _show(steps)
                finite = [step for step in steps if np.isfinite(step)]
                median = float(np.median(steps)) if steps else float("nan")
                values.append(
                    {"task": task, **keyed(mechanism), "baseline": baseline.name}
                    | {"baseline_accuracy": baseline.accuracy}
                    | {"cells": len(steps), "passed": len(finite), "median_step": median}
                )
            shown.append(named(mechanism) | texts)
        yield Table(
            name="baselines",
            title="The step at which the best baseline of a task was passed",
            values=pd.DataFrame(values),
            shown=pd.DataFrame(shown),
            caption="Passed: dev accuracy is above what the baseline scores on the test examples by two standard "
            "errors of the difference, at an evaluation for the first time. The median over seeds; in parentheses "
            "how many passed at all, if not all did. CSV: inf is never.",
            provenance=setting.caption(list(bars)),
        )


def _show(steps: list[float]) -> str:
    if not steps:
        return MISSING
    passed = int(np.isfinite(steps).sum())
    if passed == 0:
        return "never"
    median = float(np.median(steps))
    when = f"{median:,.0f}" if np.isfinite(median) else "mostly never"
    return when if passed == len(steps) else f"{when} ({passed} of {len(steps)})"
