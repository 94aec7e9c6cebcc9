"""Learning curves: dev accuracy over steps, one figure per task."""

from collections.abc import Iterator

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import Figure, add_label, new_canvas
from pipeline.reporting._mechanisms import label, rows_of, style


class Curves(Report):
    """One line per mechanism: the mean over seeds; those compared first have a band from the lowest to the highest."""

    title = "Learning curves"
    order = 50

    def make(self, comparison: Comparison) -> Iterator[Figure]:
        for task, found in comparison.results.curves.groupby("task", sort=False):
            yield _figure(comparison, str(task), found)


def _figure(comparison: Comparison, task: str, found: pd.DataFrame) -> Figure:
    coloured, baseline = comparison.coloured(task), comparison.best_baseline(task)
    canvas, (axes,) = new_canvas(7.5, 4)
    for mechanism in comparison.mechanisms:
        own = rows_of(found, mechanism)
        seeds = 100 * own.pivot(index="step", columns="seed", values="dev_accuracy").dropna()
        if seeds.empty:
            continue
        means, look = seeds.mean(axis=1), style(mechanism, mechanism in coloured)
        axes.plot(seeds.index, means, **look)
        if mechanism in coloured:
            add_label(axes, means.index[-1], means.iloc[-1], label(mechanism), look["color"])
            band = (seeds.min(axis=1), seeds.max(axis=1))
            axes.fill_between(seeds.index, *band, color=look["color"], alpha=0.1, linewidth=0)
    if baseline is not None:
        axes.axhline(baseline[1], color="0.5", linewidth=1, linestyle=":")
    title = comparison.results.heading(task)
    axes.set(xlabel="step", ylabel="dev accuracy (%)", xlim=(0, found.step.max() * 1.02), title=title)
    dotted = "" if baseline is None else f" Dotted: the best baseline that needs no model, {baseline[0]}."
    return Figure(
        name=f"curves-{task}",
        title=f"Dev accuracy of {task} while training (mean over seeds; band: lowest to highest seed)",
        canvas=canvas,
        caption=f"Coloured: what to compare first, each at the variant that is best on dev; grey: the rest.{dotted}",
        provenance=comparison.results.caption([task]),
    )
