"""Tables and figures as files: Markdown, CSV and LaTeX; SVG, PDF and PNG. The same input gives the same bytes."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from tabulate import tabulate

from pipeline.reporting._latex import latex
from pipeline.reporting._table import Table, Text

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


def new_canvas(width: float, height: float, panels: int = 1, rows: int = 1) -> tuple[Canvas, list[Axes]]:
    """Return a figure of width x height inches with `panels` axes side by side in each row, of one vertical scale."""
    # A text is a little wider in one format than in another.
    canvas = Canvas(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(canvas)
    return canvas, list(canvas.subplots(rows, panels, squeeze=False, sharey=True).flat)


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


def keep_within_percent(axes: Axes) -> None:
    """End the y axis at 0 and 100 %, so that no bar of a spread leaves what an accuracy can be."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 102.0))


def write_table(folder: Path, table: Table) -> str:
    """Write tables/NAME.{md,csv,tex} under `folder`; return the table as Markdown for the index."""
    stem = folder / "tables" / table.name
    text = f"**{_escape_markdown(table.title)}**\n\n{_markdown(table)}\n\n{_escape_markdown(table.note)}"
    stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    table.values.to_csv(stem.with_suffix(".csv"), index=False, lineterminator="\n", float_format="%.10g")
    stem.with_suffix(".tex").write_text(latex(table), encoding="utf-8")
    return f"{text} Files: [CSV](tables/{table.name}.csv), [LaTeX](tables/{table.name}.tex)."


def write_figure(folder: Path, figure: Figure) -> str:
    """Write figures/NAME.{svg,pdf,png} under `folder`; return a reference to it as Markdown for the index."""
    stem = folder / "figures" / figure.name
    figure.canvas.savefig(stem.with_suffix(".png"), dpi=160)
    # What constrained layout has found by now is kept: it takes longer than to draw.
    figure.canvas.set_layout_engine("none")
    figure.canvas.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    figure.canvas.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
    title, caption = _escape_markdown(figure.title), _escape_markdown(f"{figure.caption} {figure.provenance}".strip())
    return (
        f"![{title}](figures/{figure.name}.svg)\n\n**{title}.** {caption} "
        f"[PDF](figures/{figure.name}.pdf), [PNG](figures/{figure.name}.png)"
    )


def write_text(folder: Path, text: Text) -> str:
    """Write NAME.md under `folder` if the sentences have a name; return them as Markdown for the index."""
    heading = f"**{_escape_markdown(text.title)}**\n\n" if text.title else ""
    written = heading + "\n".join(f"- {_escape_markdown(line)}" for line in text.lines)
    if text.name:
        (folder / f"{text.name}.md").write_text(written + "\n", encoding="utf-8")
    return written


def _escape_markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _markdown(table: Table) -> str:
    headings = list(table.shown.columns)
    cells = [
        [
            _bold(_escape_markdown(text), (row, heading) in table.strong)
            for heading, text in zip(headings, texts, strict=True)
        ]
        for row, texts in enumerate(table.shown.to_numpy().tolist())
    ]
    shown = [_escape_markdown(heading) for heading in headings]
    return tabulate(cells, shown, tablefmt="pipe", disable_numparse=True, colalign=["left"] * len(headings))


def _bold(text: str, strong: bool) -> str:
    return f"**{text}**" if strong else text
