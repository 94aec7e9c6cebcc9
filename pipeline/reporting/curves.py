"""Learning curves: dev accuracy over steps, one figure per task."""

import math
from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes

from pipeline.reporting import Report
from pipeline.reporting._collect import Mechanism, Setting
from pipeline.reporting._comparison import compared
from pipeline.reporting._mechanisms import label, mechanisms, rows_of, style
from pipeline.reporting._output import Figure, add_legend, new_canvas

PANEL = 10
"""Mechanisms that can be told apart in one panel."""
COLUMNS = 2


class Curves(Report):
    """One line per mechanism: the mean over seeds, with a band from the lowest to the highest seed."""

    title = "Learning curves"
    order = 50

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Figure]:
        for task in setting.tasks:
            found = frame[(frame.quantity == "curve_dev_accuracy") & (frame.task == task)]
            drawn = [mechanism for mechanism in mechanisms(frame) if not rows_of(found, mechanism).empty]
            if drawn:
                yield _figure(frame, found, drawn, task, setting)


def _figure(frame: pd.DataFrame, found: pd.DataFrame, drawn: list[Mechanism], task: str, setting: Setting) -> Figure:
    rule = compared(frame, setting).best_rule(task)
    panels = [drawn[start : start + PANEL] for start in range(0, len(drawn), PANEL)]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    canvas, all_axes = new_canvas(7.5, 4) if len(panels) == 1 else new_canvas(11, 2.6 * rows, columns, rows)
    for axes, panel in zip(all_axes, panels, strict=False):
        _draw(axes, frame, found, panel)
        if rule is not None:
            axes.axhline(rule.accuracy, color="0.5", linewidth=1, linestyle=":")
        axes.set(xlabel="step", ylabel="dev accuracy (%)", xlim=(0, found.step.max() * 1.02))
        if len(panels) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
    for axes in all_axes[len(panels) :]:
        axes.remove()
    if len(panels) == 1:
        add_legend(all_axes[0])
    canvas.suptitle(setting.heading(task))
    return Figure(
        name=f"curves-{task}",
        title=f"Dev accuracy of {task} while training (mean over seeds; band: lowest to highest seed)",
        canvas=canvas,
        caption="" if rule is None else f"Dotted: the best rule that needs no model, {rule.name}.",
        provenance=setting.caption([task]),
    )


def _draw(axes: Axes, frame: pd.DataFrame, found: pd.DataFrame, panel: Sequence[Mechanism]) -> None:
    for mechanism in panel:
        seeds = 100 * rows_of(found, mechanism).pivot(index="step", columns="seed", values="value").dropna()
        look = style(frame, mechanism) | {"linewidth": 1.5, "markevery": max(1, len(seeds) // 8)}
        axes.plot(seeds.index, seeds.mean(axis=1), label=label(mechanism), **look)
        if seeds.shape[1] > 1:
            band = (seeds.min(axis=1), seeds.max(axis=1))
            axes.fill_between(seeds.index, *band, color=look["color"], alpha=0.12, linewidth=0)
