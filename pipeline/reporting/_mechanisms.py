"""Names and colours of mechanisms, the same in every table and figure."""

import zlib
from collections.abc import Sequence
from typing import Any

import pandas as pd

from pipeline.grid.params import Params
from schoenbat.attention import ATTENTIONS
from schoenbat.registry import VARIANT_MARK, base_name

Mechanism = tuple[str, str, str]
"""attn, dotf ("" for none) and former."""

PUBLISHED, OURS, EXACT, CONTROL, CACHE = "rmfa", "rmfa-sketch", "kernelized", "mean", "softmax"
PPSBN, PLAIN = "maclauformer", "transformer"
COLOURS = {
    CACHE: "#000000",
    OURS: "#0072B2",
    PUBLISHED: "#D55E00",
    EXACT: "#009E73",
    CONTROL: "#8C564B",
    "gaussian": "#7A68C8",
    "rfa": "#CC79A7",
    "performer": "#B8860B",
    "window": "#56A0D3",
    "taylor1": "#6B8E23",
}
"""After Okabe and Ito's palette, which stays distinct for colour-blind readers; all are seen on white and on black."""
OTHERS = ("#C2185B", "#00838F", "#5D4037", "#9E9D24", "#E53935", "#3949AB")
GREY = "#b4b4b4"


def keyed(mechanism: Sequence[str]) -> dict[str, str]:
    """Return attn, dotf and former as params.yaml has them."""
    return dict(zip(("attn", "dotf", "former"), mechanism, strict=False))


def label(mechanism: Sequence[str]) -> str:
    """Name an (attn, dotf) or (attn, dotf, former) in a legend or a sentence."""
    attn, dotf, former = (*mechanism, "")[:3]
    (method, _, variant), (name, _, other) = attn.partition(VARIANT_MARK), former.partition(VARIANT_MARK)
    ppsbn = "with ppSBN" if name == PPSBN else ""
    return " ".join(filter(None, (method, dotf, variant, ppsbn, other)))


def features_of(params: Params, attn: str) -> int:
    """Return `num_features` of a mechanism, 0 where it has no such option."""
    default = getattr(getattr(ATTENTIONS.get(attn), "Config", None), "num_features", 0)
    return int(params.attention.get(attn, {}).get("num_features") or default or 0)


def columns(params: Params, mechanism: Mechanism) -> dict[str, str]:
    """Return what tables say of a mechanism, by heading."""
    attn, dotf, former = mechanism
    features, gain = features_of(params, attn), params.former[former].gain
    has_ppsbn = base_name(former) == PPSBN
    variants = (name.partition(VARIANT_MARK)[2] for name in (attn, former))
    return {
        "method": label((base_name(attn), dotf)) + (" (ours)" if base_name(attn) == OURS else ""),
        "features": str(features or ""),
        "ppSBN": "yes" if has_ppsbn else "no",
        "gain": f"{gain:g}" if has_ppsbn else "",
        "variant": ", ".join(each for each in variants if each not in ("", str(features), f"gain{gain:g}")),
    }


def style(mechanism: Sequence[str], coloured: bool) -> dict[str, Any]:
    """Return how a mechanism is drawn in all figures of all profiles: a cache dashed, the rest grey."""
    if not coloured:
        return {"color": GREY, "linewidth": 0.8, "zorder": 1.5}
    attn = base_name(mechanism[0])
    colour = COLOURS.get(attn, OTHERS[zlib.crc32(attn.encode()) % len(OTHERS)])
    return {"color": colour, "linestyle": "--" if attn == CACHE else "-", "linewidth": 1.8, "zorder": 3.0}


def rows_of(frame: pd.DataFrame, mechanism: Sequence[str]) -> pd.DataFrame:
    """Return the rows of `frame` on one (attn, dotf) or (attn, dotf, former)."""
    for column, value in keyed(mechanism).items():
        frame = frame[frame[column] == value]
    return frame
