"""What a mechanism recalls against what it keeps of the tokens before."""

import math
from collections.abc import Iterator, Mapping

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import Figure, draw_accuracy
from pipeline.reporting._mechanisms import Mechanism, keyed, label
from pipeline.reporting._results import Results
from pipeline.reporting._table import Table, show_number
from schoenbat.registry import base_name

Sizes = Mapping[Mechanism, float]
_READING = "State: bytes that causal attention keeps of the tokens before, in all layers, at the length of the task."


class State(Report):
    """For tasks with causal attention, whose cells have a state. One table, and one figure per task."""

    title = "Recall against the size of the state"
    order = 45

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        sizes = {task: found for task in comparison.tasks if (found := _sizes(comparison.results, task))}
        if sizes:
            yield _table(comparison, sizes)
        for task, found in sizes.items():
            yield _figure(comparison, task, found)


def _sizes(results: Results, task: str) -> Sizes:
    """Return the size of the state of each mechanism that is tested on a task."""
    cells = results.cells[results.cells.task == task].dropna(subset="state_bytes")
    mechanisms = zip(cells.attn, cells.dotf, cells.former, strict=True)
    sizes = dict(zip(mechanisms, cells.state_bytes, strict=True))
    return {mechanism: size for mechanism, size in sizes.items() if results.scores_of(task, mechanism).seeds}


def _table(comparison: Comparison, sizes: Mapping[str, Sizes]) -> Table:
    values, shown = [], []
    for mechanism in comparison.mechanisms:
        shown.append({"mechanism": label(mechanism)})
        for task, of_task in sizes.items():
            size, accuracy = of_task.get(mechanism, math.nan), math.nan
            if mechanism in of_task:
                accuracy = comparison.results.scores_of(task, mechanism).mean
                values.append({"task": task, **keyed(mechanism), "state_bytes": int(size), "accuracy": accuracy})
            shown[-1] |= {f"{task}: state": show_number(size, ",.0f"), f"{task}: accuracy": show_number(accuracy)}
    return Table(
        name="state",
        title="Size of the state in bytes, and test accuracy in percent",
        values=pd.DataFrame(values),
        shown=pd.DataFrame(shown),
        caption=_READING,
        provenance=comparison.results.caption(list(sizes)),
    )


def _figure(comparison: Comparison, task: str, sizes: Sizes) -> Figure:
    lines: dict[Mechanism, list[tuple[float, Mechanism]]] = {}
    for mechanism, size in sizes.items():
        attn, dotf, former = mechanism
        lines.setdefault((base_name(attn), dotf, former), []).append((max(1.0, size), mechanism))
    look = {"markersize": 6, "linewidth": 1, "elinewidth": 0.7, "capsize": 2}
    return Figure(
        name=f"state-{task}",
        title=f"Test accuracy of {task} against the size of the state",
        canvas=draw_accuracy(comparison, task, lines, "bytes of state", **look),
        caption=f"{_READING} Bars: sample standard deviation over seeds. Lines: variants of one mechanism.",
        provenance=comparison.results.caption([task]),
    )
