"""Names and colours of mechanisms, the same in every table and figure."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from pipeline.reporting._output import MISSING

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which stays distinct for colour-blind readers, without its yellow."""
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def mechanisms(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """The distinct (attn, dotf, former) of the cells in `frame`, in the order of the grid."""
    cells = frame[frame.quantity == "test_accuracy"]
    return list(dict.fromkeys(zip(cells.attn, cells.dotf, cells.former, strict=True)))


def named(mechanism: Sequence[str]) -> dict[str, str]:
    """The columns that say in a table which mechanism a row is about."""
    return dict(zip(("attn", "kernel", "former"), (part or MISSING for part in mechanism), strict=False))


def label(mechanism: Sequence[str]) -> str:
    """The mechanism in a legend."""
    attn, dotf, *former = mechanism
    return f"{attn}{f' {dotf}' if dotf else ''}{f', {former[0]}' if former else ''}"


def style(frame: pd.DataFrame, mechanism: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of an (attn, dotf), which it keeps in all figures of a profile, and the dash of its former."""
    distinct = dict.fromkeys(zip(frame.attn, frame.dotf, strict=True))
    position = [pair for pair in distinct if pair[0]].index((mechanism[0], mechanism[1]))
    formers = list(dict.fromkeys(former for former in frame.former if former))
    dash = position // len(COLOURS) + (formers.index(mechanism[2]) if len(mechanism) > 2 else 0)
    return {
        "color": COLOURS[position % len(COLOURS)],
        "linestyle": DASHES[dash % len(DASHES)],
        "marker": MARKERS[position % len(MARKERS)],
        "markersize": 4,
    }


def first_listed(timings: pd.DataFrame) -> pd.DataFrame:
    """The timings at the first of `bench.threads` and, for each mechanism that has them, of `bench.num_features`."""
    firsts = timings.groupby("attn").num_features.transform("first")
    return timings[(timings.threads == timings.threads.iloc[:1].max()) & (timings.num_features == firsts)]


def widened(frame: pd.DataFrame, prefix: str, keys: list[str]) -> pd.DataFrame:
    """One row per combination of `keys`, in order of appearance, with the quantities called PREFIX... as columns."""
    order = frame[keys].drop_duplicates()
    wide = frame.pivot(index=keys, columns="quantity", values="value").reset_index()
    return order.merge(wide, on=keys).rename(columns=lambda name: name.removeprefix(prefix))


def rows_of(frame: pd.DataFrame, mechanism: Sequence[str]) -> pd.DataFrame:
    """The rows of `frame` on one (attn, dotf) or (attn, dotf, former)."""
    for column, value in zip(("attn", "dotf", "former"), mechanism, strict=False):
        frame = frame[frame[column] == value]
    return frame
