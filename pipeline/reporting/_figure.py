"""Figures of a report, and their files: SVG, PDF and PNG. The same input gives the same bytes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import Mechanism, label
from pipeline.reporting._table import escape_markdown

STYLE: Any = {
    "svg.hashsalt": "schoenbat",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
"""Drawn over matplotlib's own defaults, whatever the user's matplotlibrc says."""


@dataclass(frozen=True)
class Figure:
    """One figure: `canvas` is made by `new_canvas` and drawn on.

    Attributes:
        caption: how to read it, as sentences.
        provenance: how what it shows came about, likewise.
    """

    name: str
    title: str
    canvas: Canvas
    caption: str
    provenance: str = ""

    def write(self, folder: Path) -> str:
        """Write figures/NAME.{svg,pdf,png} under `folder`; return a reference to it as Markdown for the index."""
        stem = folder / "figures" / self.name
        self.canvas.savefig(stem.with_suffix(".png"), dpi=160)
        # What constrained layout has found by now is kept: it takes longer than to draw.
        self.canvas.set_layout_engine("none")
        self.canvas.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        self.canvas.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
        title, note = escape_markdown(self.title), escape_markdown(f"{self.caption} {self.provenance}".strip())
        return (
            f"![{title}](figures/{self.name}.svg)\n\n**{title}.** {note} "
            f"[PDF](figures/{self.name}.pdf), [PNG](figures/{self.name}.png)"
        )


def new_canvas(
    width: float, height: float, panels: int = 1, columns: int = 1, share_y: bool = True
) -> tuple[Canvas, list[Axes]]:
    """Return a figure of width x height inches with axes in rows of `columns`, of one vertical scale if `share_y`."""
    # A text is a little wider in one format than in another.
    canvas = Canvas(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(canvas)
    every = list(canvas.subplots(math.ceil(panels / columns), columns, squeeze=False, sharey=share_y).flat)
    for axes in every[panels:]:
        axes.remove()
    return canvas, every[:panels]


def add_legend(axes: Axes) -> None:
    """Draw the legend below all axes, in as many columns as fit; the figure grows by its rows."""
    canvas = axes.figure
    assert isinstance(canvas, Canvas)
    handles, labels = axes.get_legend_handles_labels()
    width, height = canvas.get_size_inches()
    # Inches that a column takes: the handle and the gaps, and the longest text in small letters.
    columns = max(1, int(width / (0.5 + 0.06 * max(map(len, labels)))))
    canvas.set_size_inches(width, height + 0.16 * math.ceil(len(labels) / columns) - 0.1)
    canvas.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize="small")


def set_log(axes: Axes, name: Literal["x", "y"]) -> None:
    """Make the axis of what has been drawn logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten.

    Side by side there is room for so many over two decades only; beyond that the powers of ten have to do.
    """
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_data_interval()
    crowded = name == "x" and high > 100 * low
    axis.set_major_locator(LogLocator(subs=(1.0,) if crowded else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def set_doubling(axes: Axes, values: Iterable[int], rotation: float = 0) -> None:
    """Make the x axis logarithmic, with a tick at each of `values`."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=rotation)
    axes.xaxis.set_minor_locator(NullLocator())


def draw_accuracy(
    comparison: Comparison,
    task: str,
    lines: Mapping[Mechanism, Sequence[tuple[float, Mechanism]]],
    xlabel: str,
    **look: Any,
) -> Canvas:
    """Draw test accuracies, with bars of one sample standard deviation over seeds.

    Args:
        lines: of what each is called, the mechanisms on it and where they stand on the x axis.
        look: how they are drawn, where that is not the style of the first of a line.
    """
    canvas, (axes,) = new_canvas(7.5, 4)
    for name, variants in lines.items():
        found = [(x, comparison.results.scores_of(task, mechanism)) for x, mechanism in variants]
        x, means, spreads = zip(*sorted((x, scores.mean, scores.std) for x, scores in found), strict=True)
        style = comparison.style(variants[0][1]) | look
        axes.errorbar(x, means, yerr=spreads if np.nansum(spreads) else None, label=label(name), **style)
    set_log(axes, "x")
    axes.set(xlabel=xlabel, ylabel="test accuracy (%)", title=comparison.results.heading(task))
    # No bar leaves what an accuracy can be.
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 102.0))
    add_legend(axes)
    return canvas
