"""Learning curves: dev accuracy over steps, one figure per task."""

from collections.abc import Iterator

import pandas as pd
from matplotlib.axes import Axes

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import Figure, add_legend, new_canvas
from pipeline.reporting._mechanisms import Mechanism, label, rows_of

PANEL = 10
"""Mechanisms whose lines can be distinguished in one panel."""


class Curves(Report):
    """One line per mechanism: the mean over seeds, with a band from the lowest to the highest seed."""

    title = "Learning curves"
    order = 50

    def make(self, comparison: Comparison) -> Iterator[Figure]:
        for task, found in comparison.results.curves.groupby("task", sort=False):
            yield _figure(comparison, str(task), found)


def _figure(comparison: Comparison, task: str, found: pd.DataFrame) -> Figure:
    results, baseline = comparison.results, comparison.best_baseline(task)
    drawn = [mechanism for mechanism in comparison.mechanisms if not rows_of(found, mechanism).empty]
    panels = [drawn[start : start + PANEL] for start in range(0, len(drawn), PANEL)]
    height = 2.6 * ((len(panels) + 1) // 2)
    canvas, every = new_canvas(7.5, 4) if len(panels) == 1 else new_canvas(11, height, len(panels), 2)
    for axes, panel in zip(every, panels, strict=True):
        for mechanism in panel:
            _draw(axes, comparison, mechanism, rows_of(found, mechanism))
        if baseline is not None:
            axes.axhline(baseline[1], color="0.5", linewidth=1, linestyle=":")
        axes.set(xlabel="step", ylabel="dev accuracy (%)", xlim=(0, found.step.max() * 1.02))
        if len(panels) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
    if len(panels) == 1:
        add_legend(every[0])
    canvas.suptitle(results.heading(task))
    return Figure(
        name=f"curves-{task}",
        title=f"Dev accuracy of {task} while training (mean over seeds; band: lowest to highest seed)",
        canvas=canvas,
        caption="" if baseline is None else f"Dotted: the best baseline that needs no model, {baseline[0]}.",
        provenance=results.caption([task]),
    )


def _draw(axes: Axes, comparison: Comparison, mechanism: Mechanism, curves: pd.DataFrame) -> None:
    seeds = 100 * curves.pivot(index="step", columns="seed", values="dev_accuracy").dropna()
    look = comparison.style(mechanism) | {"linewidth": 1.5, "markevery": max(1, len(seeds) // 8)}
    axes.plot(seeds.index, seeds.mean(axis=1), label=label(mechanism), **look)
    if seeds.shape[1] > 1:
        band = (seeds.min(axis=1), seeds.max(axis=1))
        axes.fill_between(seeds.index, *band, color=look["color"], alpha=0.12, linewidth=0)
