"""Test accuracy of every mechanism on every task, over seeds, beside baselines that need no model."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import MOST_GROUPS, Comparison
from pipeline.reporting._mechanisms import Mechanism, keyed, named
from pipeline.reporting._statistics import LEAST_SEEDS
from pipeline.reporting._table import MISSING, Table, show_number

NEVER = "†"


class Accuracy(Report):
    """The main table. In bold: the best of a task, and those that are not significantly different from it."""

    title = "Test accuracy"
    order = 10

    def make(self, comparison: Comparison) -> Iterator[Table]:
        setting = comparison.setting
        if not comparison.mechanisms:
            return
        found = [_row(comparison, mechanism) for mechanism in comparison.mechanisms]
        names = dict.fromkeys(found.name for task in setting.tasks for found in comparison.baselines(task))
        found += [_baseline_row(comparison, name) for name in names]
        values, shown = (pd.DataFrame(rows) for rows in zip(*found, strict=True))
        strong = {
            (row, setting.heading(task))
            for task in setting.tasks
            for row, mechanism in enumerate(comparison.mechanisms)
            if len(setting.seeds) > 1
            if mechanism in comparison.tasks[task].leaders()
        }
        spread = "mean ± sample standard deviation over seeds" if len(setting.seeds) > 1 else "one seed, so no spread"
        yield Table(
            name="accuracy",
            title=f"Test accuracy in percent ({spread})",
            values=values,
            shown=shown,
            caption=_legend(comparison),
            provenance=setting.caption(),
            strong=frozenset(strong),
        )


def _legend(comparison: Comparison) -> str:
    setting = comparison.setting
    parts = [f"Seeds: {len(setting.seeds)}, or as many as stand in parentheses."]
    if len(setting.seeds) > 1:
        parts.append(
            "Bold: the best, and what is not significantly different from it, over seeds and test examples together "
            f"(all pairs of a task; Holm, with fewer than {LEAST_SEEDS} seeds Bonferroni)."
        )
        marked = [bool(on_task.marks) for on_task in comparison.tasks.values() if on_task.groups]
        if any(marked):
            parts.append("Letters: two that share one are not significantly different.")
        if not all(marked):
            parts.append(
                f"Where it would take more than {MOST_GROUPS} letters, the figure of all pairs shows it instead."
            )
    parts.append(f"{NEVER}: no seed passed the best baseline, which needs no model, by two standard errors on dev.")
    if len(setting.tasks) > 1:
        parts.append(
            "IQM: interquartile mean over the runs of all tasks, as the share of the way from the majority class to "
            "100 %, with its interval."
        )
    return " ".join(parts)


def _row(comparison: Comparison, mechanism: Mechanism) -> tuple[dict, dict]:
    setting = comparison.setting
    numbers: dict[str, float | str] = {}
    texts: dict[str, str] = {}
    for task in setting.tasks:
        scores = setting.scores.get((task, mechanism))
        accuracies = scores.accuracies if scores else np.array([])
        mean = float(accuracies.mean()) if len(accuracies) else float("nan")
        std = float(accuracies.std(ddof=1)) if len(accuracies) > 1 else float("nan")
        on_task = comparison.tasks[task]
        group = on_task.groups.get(mechanism, "")
        steps = [step for step in comparison.steps_to_pass(task, mechanism) if np.isfinite(step)]
        numbers |= {f"{task} mean": mean, f"{task} std": std, f"{task} n": len(accuracies), f"{task} group": group}
        numbers |= {f"{task} passed": len(steps)}
        mark = NEVER if comparison.never_passed(task, mechanism) else ""
        texts[setting.heading(task)] = _show(
            accuracies, on_task.marks.get(mechanism, ""), mark, planned=len(setting.seeds)
        )
    if len(setting.tasks) > 1:
        middle, low, high = comparison.middle(mechanism)
        numbers |= {"iqm": middle, "iqm low": low, "iqm high": high}
        texts["IQM"] = show_number(middle) + ("" if np.isnan(low) else f" [{low:z.1f}, {high:z.1f}]")
    return keyed(mechanism) | numbers, named(mechanism) | texts


def _baseline_row(comparison: Comparison, name: str) -> tuple[dict, dict]:
    setting = comparison.setting
    numbers, texts = {}, {}
    for task in setting.tasks:
        accuracy = next((found.accuracy for found in comparison.baselines(task) if found.name == name), float("nan"))
        numbers[f"{task} mean"] = accuracy
        texts[setting.heading(task)] = show_number(accuracy)
    if len(setting.tasks) > 1:
        texts["IQM"] = MISSING
    label = f"baseline: {name}"
    return {"attn": label} | numbers, {"mechanism": label} | texts


def _show(accuracies: np.ndarray, group: str, mark: str, planned: int) -> str:
    if not len(accuracies):
        return MISSING
    spread = f" ± {accuracies.std(ddof=1):.2f}" if len(accuracies) > 1 else ""
    letters = f" {group}" if group and planned > 1 else ""
    count = "" if len(accuracies) == planned else f" ({len(accuracies)} of {planned})"
    return f"{accuracies.mean():.2f}{spread}{letters}{mark}{count}"
