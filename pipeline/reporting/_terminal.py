"""The results of a profile on a terminal of 80 columns: accuracies, groups that do not differ, what to do next."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.grid.params import Params
from pipeline.host.text import counted
from pipeline.reporting._comparison import NEVER, Comparison
from pipeline.reporting._mechanisms import Mechanism, keyed, label
from pipeline.reporting._results import Results, collect
from pipeline.reporting._table import MISSING

WIDTH = 80
_LEAST_NAME, _COLUMN = 30, 16
"""Columns of the terminal for the name of a mechanism, and for a task with the gap before it."""


def show_results(params: Params, root: Path) -> None:
    """Print the results of the profile, from the files of its cells; 80 columns wide where there is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    results = collect(params, root)
    cells = counted(results.num_cells, "cell")
    console.print(Text(f"profile {results.profile}: {results.num_finished} of {cells} done"))
    if results.scores:
        comparison = Comparison(results)
        for table in _tables(comparison, console.width):
            console.print(table)
        console.print(Text(_legend(comparison), style="dim"))
    for name, (texts, _) in results.replaced.items():
        means = ", ".join(f"{str(measured).replace('_', ' ')} {mean:.4f}" for measured, mean in texts.mean().items())
        console.print(Text(f"{name}: {means}"))
    for line in _next(results, root):
        console.print(Text(line))


def results_for_programs(params: Params, root: Path) -> dict[str, Any]:
    """Return the same as plain values: accuracies in percent, by task."""
    results = collect(params, root)
    comparison = Comparison(results)
    tasks = {}
    for task, on_task in comparison.tasks.items():
        rows = [
            {
                **keyed(mechanism),
                "mean": mean,
                "seeds": dict(zip(map(str, scores.seeds), scores.accuracies.tolist(), strict=True)),
                "group": on_task.groups[mechanism],
                "passed_baseline": not comparison.never_passed(task, mechanism),
            }
            for mechanism, mean in on_task.means.items()
            for scores in [results.scores[task, mechanism]]
        ]
        tasks[task] = {"baselines": comparison.baselines(task), "mechanisms": rows}
    return {
        "profile": results.profile,
        "finished": results.num_finished,
        "cells": results.num_cells,
        "report": str(_report(results)) if (root / _report(results)).is_file() else None,
        "tasks": tasks,
        "trained": {name: texts.mean().to_dict() for name, (texts, _) in results.replaced.items()},
    }


def _tables(comparison: Comparison, width: int) -> Iterator[Table]:
    """Yield as many as it takes for the tasks to stand side by side, each with the highest mean accuracy first."""
    results = comparison.results
    longest = max(_LEAST_NAME, *(len(label(mechanism)) for mechanism in comparison.mechanisms))
    at_once = max(1, (width - min(longest, width // 2)) // _COLUMN)
    for start in range(0, len(results.tasks), at_once):
        chosen = results.tasks[start : start + at_once]
        drawn = Table(box=None, pad_edge=False, header_style="bold")
        drawn.add_column("test accuracy in %", max_width=width - len(chosen) * _COLUMN, overflow="fold")
        for task in chosen:
            drawn.add_column(task, justify="right", max_width=_COLUMN - 1, overflow="fold")
        found = {
            m: [results.scores[task, m].mean for task in chosen if (task, m) in results.scores]
            for m in comparison.mechanisms
        }
        for mechanism in sorted(found, key=lambda m: (-len(found[m]), -sum(found[m]))):
            drawn.add_row(label(mechanism), *(_cell(comparison, task, mechanism) for task in chosen))
        best = [comparison.best_baseline(task) for task in chosen]
        if any(best):
            texts = [f"{found[1]:.1f}" if found else "" for found in best]
            drawn.add_row("best baseline (no model)", *texts, style="dim")
        yield drawn


def _cell(comparison: Comparison, task: str, mechanism: Mechanism) -> Text:
    text = comparison.shown(task, mechanism, ".1f", " ±")
    if text == MISSING:
        return Text(text, style="dim")
    is_repeated = len(comparison.results.scores[task, mechanism].seeds) > 1
    return Text(text, style="bold green" if is_repeated and mechanism in comparison.tasks[task].leaders() else "")


def _legend(comparison: Comparison) -> str:
    seeds = len(comparison.results.seeds)
    parts = [f"± over {seeds} seeds." if seeds > 1 else "One seed: no spread."]
    if seeds > 1 and any(on_task.marks for on_task in comparison.tasks.values()):
        parts.append("Two that share a letter are not significantly different.")
    elif seeds > 1:
        parts.append("Which differ significantly is in the report.")
    if any(comparison.never_passed(*key) for key in comparison.results.scores):
        parts.append(f"{NEVER} no better than the best baseline, which needs no model.")
    return " ".join(parts)


def _report(results: Results) -> Path:
    return Path("reports", results.profile, "index.html")


def _next(results: Results, root: Path) -> Iterator[str]:
    has_report = (root / _report(results)).is_file()
    if results.is_check:
        yield "This is a check, not a result."
    if has_report:
        yield f"report: {_report(results)}"
    if results.num_finished < results.num_cells:
        yield "next: schoenbat-exp run --grid (schoenbat-exp status says what is missing)"
    elif not has_report:
        yield "next: schoenbat-exp report"
    elif results.is_check:
        yield "next: schoenbat-exp list profiles, then schoenbat-exp use NAME for a comparison with seeds"
    else:
        yield "next: open the report; tables for a paper lie in its folder tables"
