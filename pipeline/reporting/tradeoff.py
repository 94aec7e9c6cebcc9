"""Test accuracy against the time of the mechanism at the length of the task."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import Figure, draw_accuracy
from pipeline.reporting._mechanisms import Mechanism, keyed, label, rows_of
from pipeline.reporting._results import Results
from pipeline.reporting._table import MISSING, Table
from schoenbat.lra.tasks import TASKS

DIRECTION = "forward+backward"
Times = Mapping[Mechanism, float]
_READING = (
    "Milliseconds of forward and backward, causal where the task is, interpolated on logarithmic axes where the length "
    "lies between two that were measured; ppSBN, the same for all, is not timed."
)


class Tradeoff(Report):
    """One table, and one figure per task. The time is that of forward and backward of one attention."""

    title = "Accuracy against cost at each task's own length"
    order = 30

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        results = comparison.results
        tested = {task for task, _ in results.scores}
        times = {task: _times(comparison, task) for task in results.tasks if task in tested}
        times = {task: found for task, found in times.items() if any((task, m) in results.scores for m in found)}
        if times:
            yield _table(comparison, times)
        for task, found in times.items():
            yield _figure(comparison, task, found)


def _length(results: Results, task: str) -> int:
    """Return the length of the longest truncated text."""
    return int(min(results.data[task]["lengths"]["max"], results.params.task[task].data.max_length))


def _times(comparison: Comparison, task: str) -> Times:
    """Return milliseconds at the task's length, straight between measured lengths on logarithmic axes.

    What was not measured, or at longer or shorter lengths only, is left out.
    """
    timings, length = comparison.results.first_timings(), _length(comparison.results, task)
    direction = f"causal {DIRECTION}" if TASKS.get(task).causal else DIRECTION
    timings = timings[timings.direction == direction].sort_values("length")
    found = {}
    for mechanism in comparison.mechanisms:
        rows = rows_of(timings, mechanism[:2])
        if not rows.empty and rows.length.min() <= length <= rows.length.max():
            logarithm = np.interp(math.log(length), np.log(rows.length), np.log(rows.milliseconds))
            found[mechanism] = math.exp(logarithm)
    return found


def _table(comparison: Comparison, times: Mapping[str, Times]) -> Table:
    results, values, shown = comparison.results, [], []
    for mechanism in comparison.mechanisms:
        shown.append({"mechanism": label(mechanism)})
        for task, of_task in times.items():
            length, scores = _length(results, task), results.scores_of(task, mechanism)
            time = of_task.get(mechanism)
            parts = [f"{scores.mean:.1f} %" if scores.seeds else MISSING, f"{time:.3g} ms" if time else MISSING]
            shown[-1][f"{task}, {length:,} tokens"] = MISSING if parts == [MISSING, MISSING] else "; ".join(parts)
            values.append(
                {"task": task, **keyed(mechanism), "length": length, "accuracy": scores.mean, "milliseconds": time}
            )
    return Table(
        name="tradeoff",
        title="Test accuracy, and time of one attention at the length of the task's longest text",
        values=pd.DataFrame(values),
        shown=pd.DataFrame(shown),
        caption=f"{_READING} A dash: not measured, or at other lengths only.",
        provenance=f"{results.caption(list(times))} Timings: {results.bench_caption()}",
    )


def _figure(comparison: Comparison, task: str, times: Times) -> Figure:
    results = comparison.results
    lines = {m: [(time, m)] for m, time in times.items() if (task, m) in results.scores}
    xlabel = f"milliseconds of one attention, forward and backward, at {_length(results, task):,} tokens"
    return Figure(
        name=f"tradeoff-{task}",
        title=f"Test accuracy of {task} against the time of the attention",
        canvas=draw_accuracy(comparison, task, lines, xlabel, linestyle="none", markersize=7, capsize=3),
        caption=f"Bars: sample standard deviation over seeds. {_READING}",
        provenance=f"{results.caption([task])} Timings: {results.bench_caption()}",
    )
