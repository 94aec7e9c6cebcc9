r"""Tables as LaTeX that fits the page of the standard classes: booktabs, and longtable where one page is not enough.

A document needs \usepackage{booktabs,longtable,array} and UTF-8. Widths are estimated from the widths of Computer
Modern's letters: a table gets the largest type in which it fits, columns of long texts are broken into lines, and one
that is wider still comes in parts, each of which repeats the columns that say what a row is.
"""

from collections.abc import Sequence

from pipeline.reporting._table import Table

_DENSE = "scriptsize"
TEXT_WIDTH, TEXT_HEIGHT = 345.0, 550.0
"""Points, of the article class at its defaults, the narrowest of the usual ones."""
SIZES = {"small": 9.0, "footnotesize": 8.0, "scriptsize": 7.0}
SEPARATION = 3.0
"""Points on either side of a column."""
LONG = 26
"""Letters of a text above which its column may be broken into lines."""
LEAST_BROKEN = 70.0
"""Points, of a column that is broken into lines."""
SHORT, LEAST_SHORT = 12, 40.0
"""The same of columns of words, where that saves a table from coming in parts."""
ESCAPES = {
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
    "†": r"$\dagger$",
    "≥": r"$\ge$",
    "≤": r"$\le$",
}
_KEYS = ("task", "attn", "kernel", "cell", "option", "mechanism", "less", "model", "source", "estimator")
"""Headings of the columns that say what a row is: they are repeated in each part."""
_NARROW, _WIDE = "iljft.,:;'!|()[] -/", "mwMWABCDEGHKNOPQRSTUVXYZ%—±×&"


def escape_latex(text: str) -> str:
    """`text` as LaTeX that prints it; several paragraphs or formulas are not meant."""
    return "".join(ESCAPES.get(character, character) for character in text)


def latex(table: Table) -> str:
    """The table, in parts where it is too wide, with its title as the caption and how it came about as a note."""
    headings, rows = list(table.shown.columns), table.shown.to_numpy().tolist()
    parts, size = _parts(headings, rows)
    blocks = [r"% needs \usepackage{booktabs,longtable,array}"]
    for number, columns in enumerate(parts):
        caption = table.title + (f" (part {number + 1} of {len(parts)})" if len(parts) > 1 else "")
        label = f"tab:{table.name}" + (f"-{number + 1}" if number else "")
        note = table.note if number == len(parts) - 1 else ""
        blocks.append(_block(table, columns, size, caption, label, note))
    return "\n".join(blocks) + "\n"


def _parts(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[list[int]], str]:
    """Which columns stand in which part, and the size of the type: the fewest parts, then the largest type."""
    everything = list(range(len(headings)))
    for size in SIZES:
        if _fits(everything, headings, rows, size):
            return [everything], size
    keys = [i for i in everything if headings[i] in _KEYS] or everything[:1]
    parts: list[list[int]] = []
    current: list[int] = []
    for column in (i for i in everything if i not in keys):
        if current and not _fits([*keys, *current, column], headings, rows, _DENSE):
            parts.append([*keys, *current])
            current = []
        current.append(column)
    return [*parts, [*keys, *current]], _DENSE


def _fits(columns: Sequence[int], headings: Sequence[str], rows: Sequence[Sequence[str]], size: str) -> bool:
    return sum(_least(_texts(i, headings, rows), size) + 2 * SEPARATION for i in columns) <= TEXT_WIDTH


def _texts(column: int, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [headings[column], *(row[column] for row in rows)]


def _width(text: str, size: str) -> float:
    """Points, somewhat more than Computer Modern takes."""
    ems = sum(0.33 if letter in _NARROW else 0.78 if letter in _WIDE else 0.53 for letter in text)
    return 1.1 * ems * SIZES[size] + 1


def _natural(texts: Sequence[str], size: str) -> float:
    return max(_width(text, size) for text in texts)


def _least(texts: Sequence[str], size: str) -> float:
    """The width below which a column does not go: that of its longest word where it may be broken."""
    natural = _natural(texts, size)
    words = max(_width(word, size) for text in texts for word in text.split() or [""])
    longest = max(map(len, texts))
    if longest > LONG:
        return min(natural, max(LEAST_BROKEN, words))
    if size == _DENSE and longest > SHORT and all(text[:1].isalpha() for text in texts[1:]):
        return min(natural, max(LEAST_SHORT, words))
    # Of a short column the heading alone may be broken.
    return min(natural, max(_natural(texts[1:] or texts, size), words))


def _block(table: Table, columns: Sequence[int], size: str, caption: str, label: str, note: str) -> str:
    headings, rows = list(table.shown.columns), table.shown.to_numpy().tolist()
    naturals = [_natural(_texts(i, headings, rows), size) for i in columns]
    widths = [_least(_texts(i, headings, rows), size) for i in columns]
    spare = TEXT_WIDTH - sum(width + 2 * SEPARATION for width in widths)
    wanted = sum(natural - width for natural, width in zip(naturals, widths, strict=True))
    share = min(1.0, max(0.0, spare) / wanted) if wanted else 0.0
    widths = [width + share * (natural - width) for natural, width in zip(naturals, widths, strict=True)]
    lines = 1 + sum(
        max(-(-_width(row[i], size) // (width + 0.01)) for i, width in zip(columns, widths, strict=True))
        for row in rows
    )
    specification = "".join(
        "l" if natural <= width + 0.01 else rf">{{\raggedright\arraybackslash}}p{{{width:.1f}pt}}"
        for natural, width in zip(naturals, widths, strict=True)
    )
    head = " & ".join(escape_latex(headings[i]) for i in columns) + r" \\"
    body = [
        " & ".join(_cell(row[i], (number, headings[i]) in table.strong) for i in columns) + r" \\"
        for number, row in enumerate(rows)
    ]
    leading = 1.25 * SIZES[size]
    is_long = lines * leading > TEXT_HEIGHT - 150 or len(note) > 1800
    note_lines = [rf"{{\scriptsize\noindent {escape_latex(note)}\par}}"] if note else []
    setting = [rf"\{size}", rf"\setlength{{\tabcolsep}}{{{SEPARATION:g}pt}}"]
    if is_long:
        again = [r"\toprule", head, r"\midrule"]
        return "\n".join(
            [
                r"\begingroup",
                *setting,
                rf"\begin{{longtable}}{{{specification}}}",
                rf"\caption{{{escape_latex(caption)}}}\label{{{label}}}\\",
                *[*again, r"\endfirsthead", *again, r"\endhead", r"\bottomrule", r"\endlastfoot"],
                *body,
                r"\end{longtable}",
                *note_lines,
                r"\endgroup",
            ]
        )
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{escape_latex(caption)}}}\label{{{label}}}",
            *setting,
            rf"\begin{{tabular}}{{{specification}}}",
            *[r"\toprule", head, r"\midrule", *body, r"\bottomrule"],
            r"\end{tabular}",
            *([r"\par\medskip", rf"\begin{{minipage}}{{\linewidth}}{note_lines[0]}\end{{minipage}}"] if note else []),
            r"\end{table}",
        ]
    )


def _cell(text: str, strong: bool) -> str:
    return rf"\textbf{{{escape_latex(text)}}}" if strong else escape_latex(text)
