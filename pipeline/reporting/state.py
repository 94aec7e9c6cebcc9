"""What a mechanism recalls against what it keeps of the tokens before."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import Mechanism, keyed, label, mechanisms, named, rows_of, style
from pipeline.reporting._output import Figure, add_legend, keep_within_percent, new_canvas, set_log
from pipeline.reporting._setting import Setting
from pipeline.reporting._table import MISSING, Table
from schoenbat.registry import base_name


class State(Report):
    """For tasks with causal attention, whose cells have a state. One table, and one figure per task."""

    title = "Recall against the size of the state"
    order = 45

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        frame, setting = comparison.frame, comparison.setting
        sizes = frame[frame.quantity == "state_bytes"].dropna()
        tested = {task for task, _ in setting.scores}
        tasks = [task for task in setting.tasks if task in tested & set(sizes.task)]
        if not tasks:
            return
        yield _table(frame, sizes, tasks, setting)
        for task in tasks:
            yield _figure(frame, sizes[sizes.task == task], task, setting)


_READING = "State: bytes that causal attention keeps of the tokens before, in all layers, at the length of the task."


def _table(frame: pd.DataFrame, sizes: pd.DataFrame, tasks: list[str], setting: Setting) -> Table:
    values, shown = [], []
    for mechanism in mechanisms(frame):
        texts = {}
        for task in tasks:
            own = rows_of(sizes[sizes.task == task], mechanism).value
            scores = setting.scores.get((task, mechanism))
            found = {"task": task, **keyed(mechanism)}
            texts[f"{task}: state"] = texts[f"{task}: accuracy"] = MISSING
            if len(own) and scores is not None:
                accuracy = float(scores.accuracies.mean())
                texts |= {f"{task}: state": f"{own.iloc[0]:,.0f}", f"{task}: accuracy": f"{accuracy:.2f}"}
                values.append(found | {"state_bytes": int(own.iloc[0]), "accuracy": accuracy})
        shown.append(named(mechanism) | texts)
    return Table(
        name="state",
        title="Size of the state in bytes, and test accuracy in percent",
        values=pd.DataFrame(values),
        shown=pd.DataFrame(shown),
        caption=_READING,
        provenance=setting.caption(tasks),
    )


def _figure(frame: pd.DataFrame, sizes: pd.DataFrame, task: str, setting: Setting) -> Figure:
    canvas, (axes,) = new_canvas(7.5, 4)
    lines: dict[Mechanism, tuple[dict[str, Any], list[tuple[float, float, float]]]] = {}
    for mechanism in mechanisms(frame):
        own, scores = rows_of(sizes, mechanism).value, setting.scores.get((task, mechanism))
        if own.empty or scores is None:
            continue
        attn, dotf, former = mechanism
        _, points = lines.setdefault((base_name(attn), dotf, former), (style(frame, mechanism), []))
        spread = scores.accuracies.std(ddof=1) if len(scores.accuracies) > 1 else 0.0
        points.append((max(1.0, own.iloc[0]), float(scores.accuracies.mean()), float(spread)))
    for mechanism, (look, points) in lines.items():
        size, accuracy, spreads = zip(*sorted(points), strict=True)
        look |= {"markersize": 6, "linewidth": 1, "elinewidth": 0.7, "capsize": 2}
        axes.errorbar(size, accuracy, yerr=spreads if any(spreads) else None, label=label(mechanism), **look)
    set_log(axes, "x")
    axes.set(xlabel="bytes of state", ylabel="test accuracy (%)", title=setting.heading(task))
    keep_within_percent(axes)
    add_legend(axes)
    return Figure(
        name=f"state-{task}",
        title=f"Test accuracy of {task} against the size of the state",
        canvas=canvas,
        caption=f"{_READING} Bars: sample standard deviation over seeds. Lines: variants of one mechanism.",
        provenance=setting.caption([task]),
    )
