"""When a mechanism has passed what a rule without a model scores."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._comparison import compared
from pipeline.reporting._mechanisms import keyed, named
from pipeline.reporting._table import MISSING, Table


class Rules(Report):
    """Below the best rule, an accuracy shows nothing that a mechanism has learned."""

    title = "When a rule that needs no model is passed"
    order = 15

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Table]:
        comparison = compared(frame, setting)
        bars = {task: rule for task in setting.tasks if (rule := comparison.best_rule(task)) is not None}
        if not bars or not comparison.passed:
            return
        values, shown = [], []
        for mechanism in comparison.mechanisms:
            texts = {}
            for task, rule in bars.items():
                steps = comparison.steps_to_pass(task, mechanism)
                texts[f"{task}: {rule.name}, {rule.accuracy:.1f} %"] = _show(steps)
                finite = [step for step in steps if np.isfinite(step)]
                median = float(np.median(steps)) if steps else float("nan")
                values.append(
                    {"task": task, **keyed(mechanism), "rule": rule.name, "rule_accuracy": rule.accuracy}
                    | {"cells": len(steps), "passed": len(finite), "median_step": median}
                )
            shown.append(named(mechanism) | texts)
        yield Table(
            name="rules",
            title="The step at which the best rule of a task was passed",
            values=pd.DataFrame(values),
            shown=pd.DataFrame(shown),
            caption="Passed: dev accuracy is above what the rule scores on the test examples by two standard errors of "
            "the difference, at an evaluation for the first time. The median over seeds; in parentheses how many "
            "passed at all, if not all did. CSV: inf is never.",
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
