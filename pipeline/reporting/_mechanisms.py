"""Names and colours of mechanisms, the same in every table and figure."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from schoenbat.registry import VARIANT_MARK

Mechanism = tuple[str, str, str]
"""attn, dotf ("" for none) and former."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56A0D3", "#8C564B", "#7A68C8")
"""After Okabe and Ito's palette, which stays distinct for colour-blind readers; all are seen on white and on black."""
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h", "d")
"""So many that no pair of a colour and a marker comes back before 104 mechanisms, as 8 and 13 have no common factor."""


def mechanisms(frame: pd.DataFrame) -> list[Mechanism]:
    """Return the distinct (attn, dotf, former) of the cells in `frame`, in the order of the grid."""
    cells = frame[frame.quantity == "test_accuracy"]
    return list(dict.fromkeys(zip(cells.attn, cells.dotf, cells.former, strict=True)))


def named(mechanism: Sequence[str]) -> dict[str, str]:
    """Return the column that says in a table which mechanism a row is about."""
    return {"mechanism": label(mechanism)}


def keyed(mechanism: Sequence[str]) -> dict[str, str]:
    """Return the same for programs: attn, dotf and former as params.yaml has them."""
    return dict(zip(("attn", "dotf", "former"), mechanism, strict=False))


def has_ppsbn(former: str) -> str:
    """Return yes or no, with the name of a variant of the former, if it is one."""
    name, _, variant = former.partition(VARIANT_MARK)
    return ("yes" if name == "maclauformer" else "no") + (f", {variant}" if variant else "")


def label(mechanism: Sequence[str]) -> str:
    """Name the mechanism in a legend or a sentence."""
    attn, dotf, *former = mechanism
    name, _, variant = former[0].partition(VARIANT_MARK) if former else ("", "", "")
    parts = [f"{attn}{f' {dotf}' if dotf else ''}", *(["ppSBN"] if name == "maclauformer" else [])]
    return " + ".join([*parts, *([variant] if variant else [])])


def style(frame: pd.DataFrame, mechanism: Sequence[str]) -> dict[str, Any]:
    """Return how an (attn, dotf) is drawn in all figures of a profile; its second former is dashed and hollow.

    No two share both colour and marker.
    """
    pairs = frame[frame.attn != ""].drop_duplicates(["attn", "dotf"])
    position = list(zip(pairs.attn, pairs.dotf, strict=True)).index((mechanism[0], mechanism[1]))
    colour, dash = COLOURS[position % len(COLOURS)], 0
    if len(mechanism) > 2:
        dash = frame[frame.former != ""].former.drop_duplicates().tolist().index(mechanism[2])
    return {
        "color": colour,
        "linestyle": DASHES[dash % len(DASHES)],
        "marker": MARKERS[position % len(MARKERS)],
        "markerfacecolor": colour if dash == 0 else "none",
        "markersize": 4,
    }


def first_listed(timings: pd.DataFrame) -> pd.DataFrame:
    """Return the timings at the first of `bench.threads` and, where there are several, of `bench.num_features`."""
    firsts = timings.groupby("attn").num_features.transform("first")
    return timings[(timings.threads == timings.threads.iloc[:1].max()) & (timings.num_features == firsts)]


def widened(frame: pd.DataFrame, prefix: str, keys: list[str]) -> pd.DataFrame:
    """Return one row per combination of `keys`, in order of appearance, with quantities called PREFIX... as columns."""
    order = frame[keys].drop_duplicates()
    wide = frame.pivot(index=keys, columns="quantity", values="value").reset_index()
    return order.merge(wide, on=keys).rename(columns=lambda name: name.removeprefix(prefix))


def rows_of(frame: pd.DataFrame, mechanism: Sequence[str]) -> pd.DataFrame:
    """Return the rows of `frame` on one (attn, dotf) or (attn, dotf, former)."""
    for column, value in zip(("attn", "dotf", "former"), mechanism, strict=False):
        frame = frame[frame[column] == value]
    return frame
