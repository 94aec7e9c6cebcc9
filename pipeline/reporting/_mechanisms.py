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


def keyed(mechanism: Sequence[str]) -> dict[str, str]:
    """Return attn, dotf and former as params.yaml has them."""
    return dict(zip(("attn", "dotf", "former"), mechanism, strict=False))


def label(mechanism: Sequence[str]) -> str:
    """Name an (attn, dotf) or (attn, dotf, former) in a table, a legend or a sentence."""
    attn, dotf, former = (*mechanism, "")[:3]
    name, _, variant = former.partition(VARIANT_MARK)
    return " + ".join(filter(None, (f"{attn} {dotf}".strip(), "ppSBN" if name == "maclauformer" else "", variant)))


def style(known: Sequence[Sequence[str]], mechanism: Sequence[str]) -> dict[str, Any]:
    """Return how an (attn, dotf) is drawn in all figures of a profile; its second former is dashed and hollow.

    No two of those that are `known` share both colour and marker.
    """
    position = list(dict.fromkeys(tuple(each[:2]) for each in known)).index(tuple(mechanism[:2]))
    formers = list(dict.fromkeys(each[2] for each in known if len(each) > 2))
    dash = formers.index(mechanism[2]) if len(mechanism) > 2 else 0
    colour = COLOURS[position % len(COLOURS)]
    return {
        "color": colour,
        "linestyle": DASHES[dash % len(DASHES)],
        "marker": MARKERS[position % len(MARKERS)],
        "markerfacecolor": colour if dash == 0 else "none",
        "markersize": 4,
    }


def rows_of(frame: pd.DataFrame, mechanism: Sequence[str]) -> pd.DataFrame:
    """Return the rows of `frame` on one (attn, dotf) or (attn, dotf, former)."""
    for column, value in keyed(mechanism).items():
        frame = frame[frame[column] == value]
    return frame
