"""Test accuracy of every mechanism on every task, over seeds, beside baselines that need no model."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import MOST_GROUPS, NEVER, Comparison
from pipeline.reporting._mechanisms import Mechanism, keyed, label
from pipeline.reporting._table import MISSING, Table, show_number


class Accuracy(Report):
    """The main table. In bold: the best of a task, and those that are not significantly different from it."""

    title = "Test accuracy"
    order = 10

    def make(self, comparison: Comparison) -> Iterator[Table]:
        results, mechanisms = comparison.results, comparison.mechanisms
        if not mechanisms:
            return
        rows = [_row(comparison, mechanism) for mechanism in mechanisms]
        names = dict.fromkeys(name for task in results.tasks for name in comparison.baselines(task))
        rows += [_baseline_row(comparison, name) for name in names]
        strong = {
            (mechanisms.index(mechanism), results.heading(task))
            for task, on_task in comparison.tasks.items()
            for mechanism in on_task.leaders()
            if len(results.seeds) > 1
        }
        spread = "mean ± sample standard deviation over seeds" if len(results.seeds) > 1 else "one seed, so no spread"
        yield Table(
            name="accuracy",
            title=f"Test accuracy in percent ({spread})",
            values=pd.DataFrame([values for values, _ in rows]),
            shown=pd.DataFrame([shown for _, shown in rows]),
            caption=_legend(comparison),
            provenance=results.caption(),
            strong=frozenset(strong),
        )


def _legend(comparison: Comparison) -> str:
    results = comparison.results
    parts = [f"Seeds: {len(results.seeds)}, or as many as stand in parentheses."]
    if len(results.seeds) > 1:
        parts.append(
            "Bold: the best, and what is not significantly different from it, over seeds and test examples together "
            "(all pairs of a task; Holm)."
        )
        marked = [bool(on_task.marks) for on_task in comparison.tasks.values() if on_task.groups]
        if any(marked):
            parts.append("Letters: two that share one are not significantly different.")
        if not all(marked):
            parts.append(
                f"Where it would take more than {MOST_GROUPS} letters, the figure of all pairs shows it instead."
            )
    parts.append(f"{NEVER}: no seed passed the best baseline, which needs no model, by two standard errors on dev.")
    if len(results.tasks) > 1:
        parts.append(
            "IQM: interquartile mean over the runs of all tasks, as the share of the way from the majority class to "
            "100 %, with its interval."
        )
    return " ".join(parts)


def _row(comparison: Comparison, mechanism: Mechanism) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = dict(keyed(mechanism))
    shown, planned = {"mechanism": label(mechanism)}, len(comparison.results.seeds)
    for task, on_task in comparison.tasks.items():
        scores = comparison.results.scores_of(task, mechanism)
        steps = comparison.steps_to_pass(task, mechanism)
        values |= {f"{task} mean": scores.mean, f"{task} std": scores.std, f"{task} n": len(scores.seeds)}
        values |= {f"{task} group": on_task.groups.get(mechanism, ""), f"{task} passed": int(np.isfinite(steps).sum())}
        count = f" ({len(scores.seeds)} of {planned})" if 0 < len(scores.seeds) < planned else ""
        shown[comparison.results.heading(task)] = comparison.shown(task, mechanism) + count
    if len(comparison.tasks) > 1:
        middle, low, high = comparison.middle(mechanism)
        values |= {"iqm": middle, "iqm low": low, "iqm high": high}
        shown["IQM"] = show_number(middle) + ("" if np.isnan(low) else f" [{low:z.1f}, {high:z.1f}]")
    return values, shown


def _baseline_row(comparison: Comparison, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {"attn": f"baseline: {name}"}
    shown = {"mechanism": f"baseline: {name}"}
    for task in comparison.tasks:
        accuracy = comparison.baselines(task).get(name, float("nan"))
        values[f"{task} mean"] = accuracy
        shown[comparison.results.heading(task)] = show_number(accuracy)
    if len(comparison.tasks) > 1:
        shown["IQM"] = MISSING
    return values, shown
