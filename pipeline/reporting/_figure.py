"""Figures of a report, and their files: SVG, PDF and PNG. The same input gives the same bytes."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Annotation
from matplotlib.text import Text as Drawn
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

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
COLUMNS = 3
"""Panels side by side, at most."""
_POINT, _LINE = 3.0, 1.0
"""Half a marker, and the step by which labels move apart, in points."""


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
        spread_labels(self.canvas)
        self.canvas.savefig(stem.with_suffix(".png"), dpi=160)
        self.canvas.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        self.canvas.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
        title, note = escape_markdown(self.title), escape_markdown(f"{self.caption} {self.provenance}".strip())
        return f"![{title}](figures/{self.name}.png)\n\n**{title}.** {note}"


def new_canvas(width: float, height: float, panels: int = 1, share_y: bool = True) -> tuple[Canvas, list[Axes]]:
    """Return a figure of panels of width x height inches each, of one vertical scale if `share_y`."""
    columns = 2 if panels == 4 else min(COLUMNS, panels)
    rows = math.ceil(panels / columns)
    # A text is a little wider in one format than in another.
    canvas = Canvas(figsize=(width * columns, height * rows), layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(canvas)
    every = list(canvas.subplots(rows, columns, squeeze=False, sharey=share_y).flat)
    for axes in every[panels:]:
        axes.remove()
    return canvas, every[:panels]


def add_label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Write a text beside a point, such as the end of a line; `spread_labels` moves those apart that overlap."""
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)}
    place: Any = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    axes.annotate(text, (x, y), fontsize=7, color=colour, arrowprops=line, **place)


def spread_labels(canvas: Canvas) -> None:
    """Move the labels of each panel up or down until none covers another one, or a labelled point."""
    canvas.draw_without_rendering()
    # What constrained layout has found by now is kept, so that nothing moves any more.
    canvas.set_layout_engine("none")
    renderer: Any = canvas.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in canvas.axes:
        labels = [text for text in axes.texts if isinstance(text, Annotation)]
        points = [axes.transData.transform(label.xy) for label in labels]
        taken = [Bbox.from_bounds(x - _POINT, y - _POINT, 2 * _POINT, 2 * _POINT) for x, y in points]
        for label, _ in sorted(zip(labels, points, strict=True), key=lambda pair: -pair[1][1]):
            for step in range(400):
                label.set_position((7, (step + 1) // 2 * _LINE * (-1) ** step))
                label.update_positions(renderer)
                box = Drawn.get_window_extent(label, renderer)
                if box.count_overlaps(taken) == 0:
                    break
            taken.append(box)


def set_log(axes: Axes, name: Literal["x", "y"]) -> None:
    """Make the axis of what has been drawn logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten.

    Side by side there is room for so many over two decades only; beyond that the powers of ten have to do. Values
    within a factor of three stay on a linear axis.
    """
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_data_interval()
    if high < 3 * low:
        return
    axes.set(**{f"{name}scale": "log"})
    crowded = name == "x" and high > 100 * low
    axis.set_major_locator(LogLocator(subs=(1.0,) if crowded else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())
