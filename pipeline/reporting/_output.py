"""Tables and figures as files: Markdown, CSV and LaTeX (booktabs); SVG and PNG. The same input gives the same bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from tabulate import tabulate

MISSING = "—"
STYLE: Any = {
    "svg.hashsalt": "schoenbat",
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
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "—": "---",
}


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: the stem of its files.
        title: what it shows, without a full stop.
        values: the numbers as they are, for CSV.
        shown: the same as text, for Markdown and LaTeX; its column names are the headings.
        caption: how the numbers came about.
    """

    name: str
    title: str
    values: pd.DataFrame
    shown: pd.DataFrame
    caption: str


@dataclass(frozen=True)
class Figure:
    """One figure: `canvas` is made by `new_canvas` and drawn on."""

    name: str
    title: str
    canvas: Canvas
    caption: str


def new_canvas(width: float, height: float, panels: int = 1) -> tuple[Canvas, list[Axes]]:
    """A figure of width x height inches with `panels` axes side by side that share their vertical scale."""
    canvas = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas, list(canvas.subplots(1, panels, squeeze=False, sharey=True)[0])


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


def write_table(folder: Path, table: Table) -> str:
    """Write tables/NAME.{md,csv,tex} under `folder`; returns the table as Markdown for the index."""
    stem = folder / "tables" / table.name
    text = f"**{_escape_markdown(table.title)}**\n\n{_markdown(table.shown)}\n\n{_escape_markdown(table.caption)}"
    stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    table.values.to_csv(stem.with_suffix(".csv"), index=False, lineterminator="\n")
    stem.with_suffix(".tex").write_text(_latex(table), encoding="utf-8")
    return f"{text} Files: [CSV](tables/{table.name}.csv), [LaTeX](tables/{table.name}.tex)."


def write_figure(folder: Path, figure: Figure) -> str:
    """Write figures/NAME.{svg,png} under `folder`; returns a reference to it as Markdown for the index."""
    stem = folder / "figures" / figure.name
    figure.canvas.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    figure.canvas.savefig(stem.with_suffix(".png"), dpi=160)
    title, caption = _escape_markdown(figure.title), _escape_markdown(figure.caption)
    return f"![{title}](figures/{figure.name}.svg)\n\n**{title}.** {caption} [PNG](figures/{figure.name}.png)"


def escape_latex(text: str) -> str:
    """`text` as LaTeX that prints it; several paragraphs or formulas are not meant."""
    return "".join(LATEX.get(character, character) for character in text)


def _escape_markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _markdown(shown: pd.DataFrame) -> str:
    cells = [[_escape_markdown(cell) for cell in row] for row in shown.to_numpy().tolist()]
    headings = [_escape_markdown(heading) for heading in shown.columns]
    return tabulate(cells, headings, tablefmt="pipe", disable_numparse=True, colalign=["left"] * len(headings))


def _latex(table: Table) -> str:
    rows = [" & ".join(map(escape_latex, row)) + r" \\" for row in table.shown.to_numpy().tolist()]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)}. {escape_latex(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.shown.columns)}}}",
        r"\toprule",
        " & ".join(map(escape_latex, table.shown.columns)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
