"""Test accuracy against the time of the mechanism at the length of the task."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import Mechanism, first_listed, keyed, label, mechanisms, named, rows_of, style
from pipeline.reporting._output import Figure, add_legend, keep_within_percent, new_canvas, set_log
from pipeline.reporting._setting import Setting
from pipeline.reporting._table import MISSING, Table
from schoenbat.lra.tasks import TASKS

DIRECTION = "forward+backward"


class Tradeoff(Report):
    """One table, and one figure per task. The time is that of forward and backward of one attention."""

    title = "Accuracy against cost at each task's own length"
    order = 30

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        frame, setting = comparison.frame, comparison.setting
        timings = first_listed(frame[frame.quantity == "bench_milliseconds"])
        costs = {
            task: {m: found for m in mechanisms(frame) if (found := _time(timings, task, m, length)) is not None}
            for task in setting.tasks
            if (length := _own_length(frame, setting, task)) is not None
        }
        scored = [
            task for task, found in costs.items() if any((task, mechanism) in setting.scores for mechanism in found)
        ]
        if not scored:
            return
        yield _table(frame, costs, scored, setting)
        for task in scored:
            yield _figure(frame, costs[task], task, setting)


def _own_length(frame: pd.DataFrame, setting: Setting, task: str) -> int | None:
    """Return the length of the longest truncated text; None without data."""
    longest = frame[(frame.quantity == "data_longest") & (frame.task == task)].value
    return None if longest.empty else min(int(longest.iloc[0]), setting.params.task[task].data.max_length)


def _time(timings: pd.DataFrame, task: str, mechanism: Mechanism, length: int) -> float | None:
    """Return milliseconds at a length, straight between measured lengths on logarithmic axes; None outside of them."""
    direction = f"causal {DIRECTION}" if TASKS.get(task).causal else DIRECTION
    rows = rows_of(timings[timings.direction == direction], mechanism[:2]).sort_values("length")
    if rows.empty or not rows.length.min() <= length <= rows.length.max():
        return None
    return float(math.exp(np.interp(math.log(length), np.log(rows.length), np.log(rows.value))))


def _table(frame: pd.DataFrame, costs: dict[str, dict[Mechanism, float]], tasks: list[str], setting: Setting) -> Table:
    values, shown = [], []
    for mechanism in mechanisms(frame):
        texts = {}
        for task in tasks:
            length = _own_length(frame, setting, task)
            scores, time = setting.scores.get((task, mechanism)), costs[task].get(mechanism)
            accuracy = float(scores.accuracies.mean()) if scores else float("nan")
            parts = [
                MISSING if math.isnan(accuracy) else f"{accuracy:.1f} %",
                MISSING if time is None else f"{time:.3g} ms",
            ]
            texts[f"{task}, {length:,} tokens"] = MISSING if parts == [MISSING, MISSING] else "; ".join(parts)
            values.append(
                {"task": task, **keyed(mechanism), "length": length, "accuracy": accuracy}
                | {"milliseconds": float("nan") if time is None else time}
            )
        shown.append(named(mechanism) | texts)
    return Table(
        name="tradeoff",
        title="Test accuracy, and time of one attention at the length of the task's longest text",
        values=pd.DataFrame(values),
        shown=pd.DataFrame(shown),
        caption=f"{_READING} A dash: not measured, or at other lengths only.",
        provenance=f"{setting.caption(tasks)} Timings: {setting.bench_caption()}",
    )


_READING = (
    "Milliseconds of forward and backward, causal where the task is, interpolated on logarithmic axes where the length "
    "lies between two that were measured; ppSBN, the same for all, is not timed."
)


def _figure(frame: pd.DataFrame, costs: dict[Mechanism, float], task: str, setting: Setting) -> Figure:
    canvas, (axes,) = new_canvas(7.5, 4)
    for mechanism, time in costs.items():
        scores = setting.scores.get((task, mechanism))
        if scores is None:
            continue
        accuracies = scores.accuracies
        spread = accuracies.std(ddof=1) if len(accuracies) > 1 else None
        look = style(frame, mechanism) | {"linestyle": "none", "markersize": 7, "capsize": 3}
        axes.errorbar(time, accuracies.mean(), yerr=spread, label=label(mechanism), **look)
    set_log(axes, "x")
    axes.set(
        xlabel=f"milliseconds of one attention, forward and backward, at {_own_length(frame, setting, task):,} tokens",
        ylabel="test accuracy (%)",
        title=setting.heading(task),
    )
    keep_within_percent(axes)
    add_legend(axes)
    return Figure(
        name=f"tradeoff-{task}",
        title=f"Test accuracy of {task} against the time of the attention",
        canvas=canvas,
        caption=f"Bars: sample standard deviation over seeds. {_READING}",
        provenance=f"{setting.caption([task])} Timings: {setting.bench_caption()}",
    )
