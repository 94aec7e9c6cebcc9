"""What every mechanism reaches on a task, with what it keeps and takes for that, beside baselines without a model."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import NEVER, Comparison
from pipeline.reporting._figure import Figure, add_label, new_canvas, set_log
from pipeline.reporting._mechanisms import CACHE, Mechanism, columns, features_of, keyed, label, style
from pipeline.reporting._results import Results
from pipeline.reporting._table import Table, show_number, without_constants
from schoenbat.registry import base_name


class Accuracy(Report):
    """The main table of each task, and a figure where attention keeps a state."""

    title = "Test accuracy"
    order = 10

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        for task, tested in comparison.tasks.items():
            if tested:
                title = f"Test accuracy on {comparison.results.heading(task)}"
                yield table(comparison, task, dict.fromkeys(tested, ""), f"accuracy-{task}", title)
                if not math.isnan(comparison.state_of(task, tested[0])):
                    yield _figure(comparison, task, tested)


def table(comparison: Comparison, task: str, roles: Mapping[Mechanism, str], name: str, title: str) -> Table:
    """Return a row for each mechanism, the highest first, with its role where it has one."""
    results = comparison.results
    leaders = comparison.leaders[task]
    ordered = sorted(roles, key=lambda mechanism: -results.scores_of(task, mechanism).mean)
    values = [_values(comparison, task, mechanism) for mechanism in ordered]
    rows = [{"role": roles[mechanism]} if roles[mechanism] else {} for mechanism in ordered]
    shown = [
        row
        | columns(results.params, mechanism)
        | _shown(of_mechanism, results, comparison.never_passed(task, mechanism))
        for row, mechanism, of_mechanism in zip(rows, ordered, values, strict=True)
    ]
    told, constant = without_constants(pd.DataFrame(shown))
    rules = ", ".join(f"{rule} {accuracy:.2f}" for rule, accuracy in comparison.baselines(task).items())
    above = "passed: seeds whose dev accuracy was two standard errors above the best of them"
    passed = f" Rules without a model: {rules}; {above}, {NEVER} for none." if rules else ""
    return Table(
        name=name,
        title=title,
        values=pd.DataFrame([row | each for row, each in zip(rows, values, strict=True)]),
        shown=told,
        caption="Accuracy: percent, mean ± sample standard deviation over seeds; bold: the best, and what is equal "
        f"to it within {results.margin:g} (two one-sided tests at 5 %).{passed} Rising: a seed was best at its last "
        "evaluation. State: bytes that causal attention keeps. Time: of a training pass relative to torch's attention, "
        f"at so many tokens. {constant}".strip(),
        provenance=results.caption([task]),
        strong=frozenset((row, "accuracy") for row, mechanism in enumerate(ordered) if mechanism in leaders),
    )


def _values(comparison: Comparison, task: str, mechanism: Mechanism) -> dict[str, Any]:
    scores, times = comparison.results.scores_of(task, mechanism), comparison.time_of(mechanism)
    steps, rising = comparison.steps_of(task, mechanism)
    return {
        **keyed(mechanism),
        "features": features_of(comparison.results.params, mechanism[0]),
        "mean": scores.mean,
        "std": scores.std,
        "n": len(scores.seeds),
        "passed": int(np.isfinite(comparison.steps_to_pass(task, mechanism)).sum()),
        "steps": steps,
        "rising": rising,
        "state_bytes": comparison.state_of(task, mechanism),
        # The two longest lengths that were timed.
        **{f"time at {at}": times.get(at, math.nan) for at in sorted(comparison.results.bench.length.unique())[-2:]},
    }


def _shown(values: Mapping[str, Any], results: Results, never: bool) -> dict[str, str]:
    spread = "" if math.isnan(values["std"]) else f" ± {values['std']:.2f}"
    count = f" ({values['n']} of {len(results.seeds)})" if values["n"] < len(results.seeds) else ""
    times = {f"time at {int(name[8:]):,}": show_number(values[name]) for name in values if name.startswith("time at")}
    return {
        "accuracy": f"{values['mean']:.2f}{spread}{NEVER * never}{count}",
        "passed": f"{values['passed']} of {values['n']}",
        "steps": f"{values['steps']:,}{', rising' * values['rising']}",
        "state": show_number(values["state_bytes"], ",.0f"),
        **times,
    }


def _figure(comparison: Comparison, task: str, tested: Iterable[Mechanism]) -> Figure:
    """Draw accuracy against the size of the state; a line joins the numbers of features of one mechanism."""
    lines: dict[Mechanism, list[Mechanism]] = {}
    for mechanism in tested:
        lines.setdefault((base_name(mechanism[0]), *mechanism[1:]), []).append(mechanism)
    coloured = {(base_name(m[0]), *m[1:]) for m in comparison.coloured(task)}
    canvas, (axes,) = new_canvas(7.5, 4)
    for line, variants in lines.items():
        points = sorted((comparison.state_of(task, m), comparison.results.scores_of(task, m).mean) for m in variants)
        look = style(line, line in coloured)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=5 if line in coloured else 3, **look)
        if line in coloured:
            add_label(axes, *points[-1], label(line), look["color"])
        if line[0] == CACHE:
            axes.axvline(points[0][0], linestyle="--", linewidth=1, color=look["color"])
    set_log(axes, "x")
    axes.set(xlabel="bytes of state", ylabel="test accuracy (%)", title=comparison.results.heading(task))
    return Figure(
        name=f"state-{task}",
        title=f"Test accuracy of {task} against the size of the state",
        canvas=canvas,
        caption="State: bytes that causal attention keeps of the tokens before, in all layers, at the length of the "
        "task; dashed: the cache of exact attention. Means over seeds. A line joins numbers of features; grey: rest.",
        provenance=comparison.results.caption([task]),
    )
