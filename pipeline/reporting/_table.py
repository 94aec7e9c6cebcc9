"""What a report is made of, before it is written in any form: texts and tables; and how numbers are shown."""

import math
from dataclasses import dataclass

import pandas as pd

MISSING = "—"


@dataclass(frozen=True)
class Text:
    """Sentences, each of which stands by itself; a heading without a full stop, or none.

    Attributes:
        name: the stem of a file of their own; "" for none.
    """

    title: str
    lines: tuple[str, ...]
    name: str = ""


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

    @property
    def note(self) -> str:
        """The text below the table."""
        return f"{self.caption} {self.provenance}".strip()


def show_number(value: float, how: str = ".2f") -> str:
    """Format a number, never as a negative zero; NaN is `MISSING`."""
    if math.isnan(value):
        return MISSING
    sign = "+" if how.startswith("+") else ""
    return format(value, f"{sign}z{how.removeprefix('+')}")


def show_interval(low: float, high: float, how: str = "+.2f") -> str:
    """Format an interval of a difference in accuracy, cut at the ±100 points that are possible."""
    if math.isnan(low):
        return MISSING
    return f"{show_number(max(low, -100.0), how)} to {show_number(min(high, 100.0), how)}"
