"""Learning curves: dev accuracy over steps, one figure per task."""

import math
from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import Mechanism, label, rows_of, style
from pipeline.reporting._output import Figure, add_legend, new_canvas

PANEL = 10
"""Mechanisms whose lines can be distinguished in one panel."""
COLUMNS = 2


class Curves(Report):
    """One line per mechanism: the mean over seeds, with a band from the lowest to the highest seed."""

    title = "Learning curves"
    order = 50

    def make(self, comparison: Comparison) -> Iterator[Figure]:
        frame = comparison.frame
        for task in comparison.setting.tasks:
            found = frame[(frame.quantity == "curve_dev_accuracy") & (frame.task == task)]
            drawn = [mechanism for mechanism in comparison.mechanisms if not rows_of(found, mechanism).empty]
            if drawn:
                yield _figure(comparison, found, drawn, task)


def _figure(comparison: Comparison, found: pd.DataFrame, drawn: list[Mechanism], task: str) -> Figure:
    setting, baseline = comparison.setting, comparison.best_baseline(task)
    panels = [drawn[start : start + PANEL] for start in range(0, len(drawn), PANEL)]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    canvas, all_axes = new_canvas(7.5, 4) if len(panels) == 1 else new_canvas(11, 2.6 * rows, columns, rows)
    for axes, panel in zip(all_axes, panels, strict=False):
        _draw(axes, comparison.frame, found, panel)
        if baseline is not None:
            axes.axhline(baseline.accuracy, color="0.5", linewidth=1, linestyle=":")
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
        caption="" if baseline is None else f"Dotted: the best baseline that needs no model, {baseline.name}.",
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
