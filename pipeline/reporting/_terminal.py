"""The results of a profile on a terminal of 80 columns: accuracies, the best of each task, what to do next."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.grid.params import Params
from pipeline.host.text import counted
from pipeline.reporting._comparison import NEVER, Comparison
from pipeline.reporting._mechanisms import keyed, label
from pipeline.reporting._results import Results, collect


def show_results(params: Params, root: Path) -> None:
    """Print the results of the profile, from the files of its cells; 80 columns wide where there is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 80
    results = collect(params, root)
    comparison = Comparison(results)
    cells = counted(results.num_cells, "cell")
    console.print(Text(f"profile {results.profile}: {results.num_finished} of {cells} done"))
    for task in comparison.tasks:
        if comparison.tasks[task]:
            console.print(_table(comparison, task))
    if results.scores:
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
    for task, tested in comparison.tasks.items():
        leaders = comparison.leaders[task]
        rows = [
            {
                **keyed(mechanism),
                "mean": scores.mean,
                "seeds": dict(zip(map(str, scores.seeds), scores.accuracies.tolist(), strict=True)),
                "best": mechanism in leaders,
                "passed_baseline": not comparison.never_passed(task, mechanism),
            }
            for mechanism in tested
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


def _table(comparison: Comparison, task: str) -> Table:
    drawn, leaders = Table(box=None, pad_edge=False, header_style="bold"), comparison.leaders[task]
    drawn.add_column("test accuracy in %", overflow="fold")
    drawn.add_column(task, justify="right", no_wrap=True)
    for mechanism in comparison.tasks[task]:
        scores = comparison.results.scores[task, mechanism]
        spread = f" ±{scores.std:.1f}" if len(scores.seeds) > 1 else ""
        text = f"{scores.mean:.1f}{spread}{NEVER * comparison.never_passed(task, mechanism)}"
        drawn.add_row(label(mechanism), Text(text, style="bold green" if mechanism in leaders else ""))
    if best := comparison.best_baseline(task):
        drawn.add_row("best baseline (no model)", f"{best[1]:.1f}", style="dim")
    return drawn


def _legend(comparison: Comparison) -> str:
    seeds = len(comparison.results.seeds)
    parts = [f"± over {seeds} seeds." if seeds > 1 else "One seed: no spread."]
    if any(comparison.leaders.values()):
        parts.append(f"Bold: the best, and what is equal to it within {comparison.results.margin:g}.")
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
