r"""Texts and tables of a report, and their files: Markdown, CSV and LaTeX.

The LaTeX fits the page of the standard classes, in booktabs style. A table of up to `LONG` rows is scaled down to the
width and height of a page where it is larger; a longer one is a longtable on pages in landscape. A document needs
UTF-8, T1 fonts and \usepackage{adjustbox,array,booktabs,longtable,pdflscape}.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

MISSING = "—"
LONG = 40
"""Rows from which a table goes over several pages."""
BROKEN = 24
"""Letters of a text from which its column is broken into lines."""
_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{letter: rf"\{letter}" for letter in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "—": "---",
        "†": r"$\dagger$",
    }
)


@dataclass(frozen=True)
class Text:
    """Sentences, each of which stands by itself; a heading without a full stop, or none.

    Attributes:
        name: the stem of a file of their own; "" for none.
        boxed: whether the page draws a box around them.
    """

    title: str
    lines: tuple[str, ...]
    name: str = ""
    boxed: bool = False

    def write(self, folder: Path) -> str:
        """Write NAME.md under `folder` if the sentences have a name; return them as Markdown for the index."""
        heading = f"**{escape_markdown(self.title)}**\n\n" if self.title else ""
        written = heading + "\n".join(f"- {escape_markdown(line)}" for line in self.lines)
        if self.name:
            (folder / f"{self.name}.md").write_text(written + "\n", encoding="utf-8")
        return written


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: the stem of its files.
        title: what it shows, without a full stop.
        values: the numbers as they are, for CSV.
        shown: the same as text, for Markdown and LaTeX; its column names are the headings.
        caption: how to read it, as sentences.
        provenance: how the numbers came about, likewise.
        strong: the cells of `shown` that stand out, by row and heading.
    """

    name: str
    title: str
    values: pd.DataFrame
    shown: pd.DataFrame
    caption: str
    provenance: str = ""
    strong: frozenset[tuple[int, str]] = frozenset()

    def write(self, folder: Path) -> str:
        """Write tables/NAME.{md,csv,tex} under `folder`; return the table as Markdown for the index."""
        stem = folder / "tables" / self.name
        title, note = (escape_markdown(text) for text in (self.title, self._note))
        shown = self._marked(escape_markdown, "**{}**")
        left = ["left"] * len(shown.columns)
        text = f"**{title}**\n\n{shown.to_markdown(index=False, disable_numparse=True, colalign=left)}\n\n{note}"
        stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        self.values.to_csv(stem.with_suffix(".csv"), index=False, lineterminator="\n", float_format="%.10g")
        stem.with_suffix(".tex").write_text(self._latex(), encoding="utf-8")
        return f"{text} Numbers: [CSV](tables/{self.name}.csv)."

    @property
    def _note(self) -> str:
        return f"{self.caption} {self.provenance}".strip()

    def _marked(self, escape: Callable[[str], str], strong: str) -> pd.DataFrame:
        """Return what is shown in a markup, with what stands out put into `strong`."""
        marked = self.shown.map(escape).reset_index(drop=True)
        for place in self.strong:
            marked.loc[place] = strong.format(marked.loc[place])
        return marked.rename(columns=escape)

    def _latex(self) -> str:
        """Return the table with its title as the caption and how to read it as a note."""
        is_long = len(self.shown) > LONG
        broken = rf">{{\raggedright\arraybackslash}}p{{{0.12 if is_long else 0.3}\linewidth}}"
        widths = (max(map(len, (heading, *self.shown[heading]))) for heading in self.shown)
        columns = "".join("l" if width <= BROKEN else broken for width in widths)
        styler = self._marked(escape_latex, r"\textbf{{{}}}").style.hide(axis="index")
        title, label, note = escape_latex(self.title), f"tab:{self.name}", escape_latex(self._note)
        if is_long:
            written = styler.to_latex(
                environment="longtable", hrules=True, column_format=columns, caption=title, label=label
            )
            return rf"""\begin{{landscape}}
\tiny
\setlength{{\tabcolsep}}{{2pt}}
{written}
\noindent {note}
\end{{landscape}}
"""
        return rf"""\begin{{table}}[htbp]
\centering
\caption{{{title}}}\label{{{label}}}
\begin{{adjustbox}}{{max width=\linewidth,max totalheight=0.6\textheight}}
{styler.to_latex(hrules=True, column_format=columns)}\end{{adjustbox}}
\par\medskip
\begin{{minipage}}{{\linewidth}}\scriptsize\noindent {note}\end{{minipage}}
\end{{table}}
"""


def without_constants(shown: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return a table without the columns that say the same in every row, and a sentence of what they say."""
    constant = {name: shown[name].iloc[0] for name in shown if len(shown) > 1 and shown[name].nunique() == 1}
    told = ", ".join(f"{name} {text}" for name, text in constant.items() if text not in ("", MISSING))
    return shown.drop(columns=list(constant)), f"In every row: {told}." if told else ""


def escape_markdown(text: str) -> str:
    """Return `text` as Markdown that shows it."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def escape_latex(text: str) -> str:
    """Return `text` as LaTeX that prints it; several paragraphs or formulas are not meant."""
    return text.translate(_ESCAPES)


def show_number(value: float, how: str = "z.2f") -> str:
    """Format a number, with "z" never as a negative zero; NaN is `MISSING`."""
    return MISSING if math.isnan(value) else format(value, how)


def show_interval(low: float, high: float, how: str = "+z.2f") -> str:
    """Format an interval of a difference in accuracy, cut at the ±100 points that are possible."""
    if math.isnan(low):
        return MISSING
    return f"{show_number(max(low, -100.0), how)} to {show_number(min(high, 100.0), how)}"


def show_p(value: float) -> str:
    """Format a p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
