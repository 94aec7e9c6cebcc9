"""Learning curves: dev accuracy over steps, one figure per task."""

from collections.abc import Iterator

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._comparison import compared
from pipeline.reporting._mechanisms import label, mechanisms, rows_of, style
from pipeline.reporting._output import Figure, add_legend, new_canvas


class Curves(Report):
    """One line per mechanism: the mean over seeds, with a band from the lowest to the highest seed."""

    title = "Learning curves"
    order = 50

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Figure]:
        for task in setting.tasks:
            found = frame[(frame.quantity == "curve_dev_accuracy") & (frame.task == task)]
            if found.empty:
                continue
            canvas, (axes,) = new_canvas(7.5, 4)
            for mechanism in mechanisms(frame):
                rows = rows_of(found, mechanism)
                if rows.empty:
                    continue
                seeds = 100 * rows.pivot(index="step", columns="seed", values="value").dropna()
                look = style(frame, mechanism)
                look |= {"linewidth": 1.5, "markevery": max(1, len(seeds) // 8)}
                axes.plot(seeds.index, seeds.mean(axis=1), label=label(mechanism), **look)
                if seeds.shape[1] > 1:
                    band = (seeds.min(axis=1), seeds.max(axis=1))
                    axes.fill_between(seeds.index, *band, color=look["color"], alpha=0.12, linewidth=0)
            rule = compared(frame, setting).best_rule(task)
            if rule is not None:
                axes.axhline(rule.accuracy, color="0.5", linewidth=1, linestyle=":")
            axes.set(xlabel="step", ylabel="dev accuracy (%)", title=setting.heading(task))
            axes.set_xlim(left=0)
            add_legend(axes)
            yield Figure(
                name=f"curves-{task}",
                title=f"Dev accuracy of {task} while training (mean over seeds; band: lowest to highest seed)",
                canvas=canvas,
                caption="" if rule is None else f"Dotted: the best rule that needs no model, {rule.name}.",
                provenance=setting.caption([task]),
            )
