r"""Tables as LaTeX that fits the page of the standard classes, in booktabs style.

A table of up to `LONG` rows is scaled down to the width and height of a page where it is larger; a longer one is a
longtable on pages in landscape. A document needs UTF-8, T1 fonts and
\usepackage{adjustbox,array,booktabs,longtable,pdflscape}.
"""

import pandas as pd

from pipeline.reporting._table import Table

LONG = 40
"""Rows from which a table goes over several pages."""
BROKEN = 24
"""Letters of a text from which its column is broken into lines."""
DENSE = 130
"""Letters of a row from which a long table is set in the smallest type."""
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
        "≥": r"$\ge$",
        "≤": r"$\le$",
    }
)


def escape_latex(text: str) -> str:
    """Return `text` as LaTeX that prints it; several paragraphs or formulas are not meant."""
    return text.translate(_ESCAPES)


def latex(table: Table) -> str:
    """Return the table, with its title as the caption and how to read it as a note."""
    shown, is_long = table.shown, len(table.shown) > LONG
    escaped = shown.map(escape_latex).rename(columns=escape_latex)
    bold = pd.DataFrame("", index=escaped.index, columns=escaped.columns)
    for row, heading in table.strong:
        bold.loc[escaped.index[row], escape_latex(heading)] = "textbf:--rwrap;"
    longest = [max(map(len, (str(heading), *shown[heading]))) for heading in shown.columns]
    is_dense = sum(min(length, BROKEN) for length in longest) > DENSE
    size, share = ("tiny", 0.12) if is_dense else ("scriptsize", 0.16)
    broken = rf">{{\raggedright\arraybackslash}}p{{{share if is_long else 0.3}\linewidth}}"
    styler = escaped.style.hide(axis="index").apply(lambda _: bold, axis=None)
    columns = "".join("l" if length <= BROKEN else broken for length in longest)
    title, label, note = escape_latex(table.title), f"tab:{table.name}", escape_latex(table.note)
    if is_long:
        written = styler.to_latex(
            environment="longtable", hrules=True, column_format=columns, caption=title, label=label
        )
        return rf"""\begin{{landscape}}
\{size}
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
