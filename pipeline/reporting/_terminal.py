"""The results of a profile on a terminal of 80 columns: accuracies, groups that do not differ, what to do next."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.grid.params import Params
from pipeline.host.text import counted
from pipeline.reporting._collect import collect
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import Mechanism, keyed, label
from pipeline.reporting._setting import Setting

WIDTH = 80
_LEAST_NAME, _COLUMN = 30, 16
"""Columns of the terminal for the name of a mechanism, and for a task with the gap before it."""
_NOT_LEARNED = "†"


def show_results(params: Params, root: Path, console: Console | None = None) -> None:
    """Print the results of the profile, from the files of its cells."""
    console = console or _console()
    frame, setting = collect(params.profile, params, root)
    comparison = Comparison(frame, setting)
    console.print(
        Text(f"profile {setting.profile}: {setting.num_finished} of {counted(setting.num_cells, 'cell')} done")
    )
    if setting.scores:
        for table in _tables(comparison, console.width):
            console.print(table)
        console.print(Text(_legend(comparison), style="dim"))
    for line in _next(setting, root):
        console.print(Text(line))


def results_for_programs(params: Params, root: Path) -> dict[str, Any]:
    """Return the same as plain values: accuracies in percent, by task."""
    frame, setting = collect(params.profile, params, root)
    comparison = Comparison(frame, setting)
    return {
        "profile": setting.profile,
        "finished": setting.num_finished,
        "cells": setting.num_cells,
        "report": str(_report(setting)) if (root / _report(setting)).is_file() else None,
        "tasks": {
            task: {
                "baselines": {baseline.name: baseline.accuracy for baseline in comparison.baselines(task)},
                "mechanisms": [
                    {**keyed(mechanism), "mean": mean, "seeds": _by_seed(comparison, task, mechanism)}
                    | {
                        "group": on_task.groups[mechanism],
                        "passed_baseline": not comparison.never_passed(task, mechanism),
                    }
                    for mechanism, mean in on_task.means.items()
                ],
            }
            for task, on_task in comparison.tasks.items()
        },
    }


def _console() -> Console:
    """Return a console as wide as the terminal; elsewhere as wide as most are."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _by_seed(comparison: Comparison, task: str, mechanism: Mechanism) -> dict[str, float]:
    scores = comparison.setting.scores[task, mechanism]
    return {str(seed): float(value) for seed, value in zip(scores.seeds, scores.accuracies, strict=True)}


def _tables(comparison: Comparison, width: int) -> Iterator[Table]:
    """Yield as many as it takes for the tasks to stand side by side, each with the highest mean accuracy first."""
    tasks, scores = comparison.setting.tasks, comparison.setting.scores
    longest = max(_LEAST_NAME, *(len(label(mechanism)) for mechanism in comparison.mechanisms))
    at_once = max(1, (width - min(longest, width // 2)) // _COLUMN)
    for start in range(0, len(tasks), at_once):
        drawn = Table(box=None, pad_edge=False, header_style="bold")
        chosen = tasks[start : start + at_once]
        drawn.add_column("test accuracy in %", max_width=width - len(chosen) * _COLUMN, overflow="fold")
        for task in chosen:
            drawn.add_column(task, justify="right", max_width=_COLUMN - 1, overflow="fold")
        found = {
            m: [scores[task, m].accuracies.mean() for task in chosen if (task, m) in scores]
            for m in comparison.mechanisms
        }
        for mechanism in sorted(found, key=lambda m: (-len(found[m]), -sum(found[m]))):
            drawn.add_row(label(mechanism), *(_cell(comparison, task, mechanism) for task in chosen))
        best = [comparison.best_baseline(task) for task in chosen]
        if any(best):
            texts = [Text(f"{found.accuracy:.1f}" if found else "", style="dim") for found in best]
            drawn.add_row(Text("best baseline (no model)", style="dim"), *texts)
        yield drawn


def _cell(comparison: Comparison, task: str, mechanism: Mechanism) -> Text:
    scores = comparison.setting.scores.get((task, mechanism))
    if scores is None:
        return Text("—", style="dim")
    accuracies = scores.accuracies
    spread = f" ±{accuracies.std(ddof=1):.1f}" if len(accuracies) > 1 else ""
    letters = comparison.tasks[task].marks.get(mechanism, "") if len(comparison.setting.seeds) > 1 else ""
    group = f" {letters}" if letters else ""
    mark = _NOT_LEARNED if comparison.never_passed(task, mechanism) else ""
    leads = len(accuracies) > 1 and mechanism in comparison.tasks[task].leaders()
    return Text(f"{np.mean(accuracies):.1f}{spread}{group}{mark}", style="bold green" if leads else "")


def _legend(comparison: Comparison) -> str:
    seeds = len(comparison.setting.seeds)
    parts = [f"± over {seeds} seeds." if seeds > 1 else "One seed: no spread."]
    if seeds > 1 and any(on_task.marks for on_task in comparison.tasks.values()):
        parts.append("Two that share a letter are not significantly different.")
    elif seeds > 1:
        parts.append("Which differ significantly is in the report.")
    if any(comparison.never_passed(*key) for key in comparison.setting.scores):
        parts.append(f"{_NOT_LEARNED} no better than the best baseline, which needs no model.")
    return " ".join(parts)


def _report(setting: Setting) -> Path:
    return Path("reports", setting.profile, "index.html")


def _next(setting: Setting, root: Path) -> Iterator[str]:
    report = root / _report(setting)
    if setting.is_check:
        yield "This is a check, not a result."
    if report.is_file():
        yield f"report: {_report(setting)}"
    if setting.num_finished < setting.num_cells:
        yield "next: schoenbat-exp run --grid (schoenbat-exp status says what is missing)"
    elif not report.is_file():
        yield "next: schoenbat-exp report"
    elif setting.is_check:
        yield "next: schoenbat-exp list profiles, then schoenbat-exp use NAME for a comparison with seeds"
    else:
        yield "next: open the report; tables for a paper lie in its folder tables"
