"""A table, before it is written in any form."""

from dataclasses import dataclass

import pandas as pd

MISSING = "—"


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: the stem of its files.
        title: what it shows, without a full stop.
        values: the numbers as they are, for CSV.
        shown: the same as text, for Markdown and LaTeX; its column names are the headings.
        caption: how the numbers came about.
        strong: the cells of `shown` that stand out, by row and heading.
    """

    name: str
    title: str
    values: pd.DataFrame
    shown: pd.DataFrame
    caption: str
    strong: frozenset[tuple[int, str]] = frozenset()
