"""Test accuracy of every mechanism on every task, over seeds, beside what rules score that need no model."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._comparison import MOST_GROUPS, Comparison, compared
from pipeline.reporting._mechanisms import Mechanism, keyed, named
from pipeline.reporting._statistics import LEAST_SEEDS
from pipeline.reporting._table import MISSING, Table

NEVER = "†"


class Accuracy(Report):
    """The main table. In bold: the best of a task, and those that are not told apart from it."""

    title = "Test accuracy"
    order = 10

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Table]:
        comparison = compared(frame, setting)
        if not comparison.mechanisms:
            return
        found = [_row(comparison, mechanism) for mechanism in comparison.mechanisms]
        rules = dict.fromkeys(rule.name for task in setting.tasks for rule in comparison.rules(task))
        found += [_rule_row(comparison, name) for name in rules]
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
            "Bold: the best, and what is not told apart from it, over seeds and test examples together (all pairs of a "
            f"task; Holm, with fewer than {LEAST_SEEDS} seeds Bonferroni)."
        )
        marked = [bool(on_task.marks) for on_task in comparison.tasks.values() if on_task.groups]
        if any(marked):
            parts.append("Letters: of two that share one the difference may be luck as well.")
        if not all(marked):
            parts.append(
                f"Where it would take more than {MOST_GROUPS} letters, the figure of all pairs shows it instead."
            )
    parts.append(f"{NEVER}: no seed passed the best of the rules, which need no model, by two standard errors on dev.")
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
        texts["IQM"] = _number(middle) + ("" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]")
    return keyed(mechanism) | numbers, named(mechanism) | texts


def _rule_row(comparison: Comparison, name: str) -> tuple[dict, dict]:
    setting = comparison.setting
    numbers, texts = {}, {}
    for task in setting.tasks:
        accuracy = next((rule.accuracy for rule in comparison.rules(task) if rule.name == name), float("nan"))
        numbers[f"{task} mean"] = accuracy
        texts[setting.heading(task)] = _number(accuracy)
    if len(setting.tasks) > 1:
        texts["IQM"] = MISSING
    label = f"rule: {name}"
    return {"attn": label} | numbers, {"mechanism": label} | texts


def _show(accuracies: np.ndarray, group: str, mark: str, planned: int) -> str:
    if not len(accuracies):
        return MISSING
    spread = f" ± {accuracies.std(ddof=1):.2f}" if len(accuracies) > 1 else ""
    letters = f" {group}" if group and planned > 1 else ""
    count = "" if len(accuracies) == planned else f" ({len(accuracies)} of {planned})"
    return f"{accuracies.mean():.2f}{spread}{letters}{mark}{count}"


def _number(value: float) -> str:
    return MISSING if np.isnan(value) else f"{value:.2f}"
