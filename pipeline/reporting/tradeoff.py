"""Test accuracy against the time of the mechanism."""

from collections.abc import Iterator

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._mechanisms import first_listed, label, mechanisms, rows_of, style
from pipeline.reporting._output import Figure, new_canvas, set_log


class Tradeoff(Report):
    """One figure per task; the time is that of forward and backward at the greatest length that all were timed at."""

    title = "Accuracy against time"
    order = 30

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Figure]:
        shown = mechanisms(frame)
        timings = frame[(frame.quantity == "bench_milliseconds") & (frame.direction == "forward+backward")]
        times = first_listed(timings)
        common = [set(rows_of(times, mechanism[:2]).length) for mechanism in shown]
        lengths = set.intersection(*common) if common else set()
        if not lengths:
            return
        length = max(lengths)
        for task in setting.tasks:
            scores = frame[(frame.quantity == "test_accuracy") & (frame.task == task)].dropna()
            if scores.empty:
                continue
            canvas, (axes,) = new_canvas(7.5, 4)
            for mechanism in shown:
                accuracy = 100 * rows_of(scores, mechanism).value
                if accuracy.empty:
                    continue
                rows = rows_of(times, mechanism[:2])
                time = rows[rows.length == length].value.item()
                spread = accuracy.std(ddof=1) if len(accuracy) > 1 else None
                look = style(frame, mechanism) | {"linestyle": "none", "markersize": 7, "capsize": 3}
                axes.errorbar(time, accuracy.mean(), yerr=spread, label=label(mechanism), **look)
            set_log(axes, "x")
            axes.set(
                xlabel=f"milliseconds of one attention, forward and backward, at length {length:,}",
                ylabel="test accuracy (%)",
                title=setting.heading(task),
            )
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
            yield Figure(
                name=f"tradeoff-{task}",
                title=f"Test accuracy of {task} against the time of the attention (bars: sample standard deviation)",
                canvas=canvas,
                caption=f"{setting.caption([task])} Timings: {setting.bench_caption()}",
            )
