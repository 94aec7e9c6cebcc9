"""Time, memory and error of the mechanisms alone, from the benchmark that measured them side by side in one process."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import Figure, add_legend, new_canvas, set_doubling, set_log
from pipeline.reporting._mechanisms import label, rows_of
from pipeline.reporting._results import BENCH_VALUES, Results
from pipeline.reporting._table import MISSING, Table, show_number

PASSES = ("forward", "forward+backward")
CAUSAL_PASSES = ("causal forward", "causal forward+backward")
SDPA = "sdpa"
TOKEN = "one token"
_MEASURED = ["attn", "dotf", "num_features"]


class Cost(Report):
    """Cells share the machine while they train, so their times are never shown."""

    title = "Time and memory"
    order = 40

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        results, timings = comparison.results, comparison.results.bench
        passes = timings[timings.direction.isin((*PASSES, *CAUSAL_PASSES))]
        if not passes.empty:
            yield _lead_table(passes, results)
            yield _table("cost", "Time, memory and error of one attention", passes, results)
            for quantity, name, axis in (
                ("milliseconds", "time", "milliseconds (median)"),
                ("peak_memory_mb", "memory", "peak memory (MB)"),
            ):
                yield from _figure(comparison, PASSES, quantity, name, axis)
                yield from _figure(comparison, CAUSAL_PASSES, quantity, f"causal-{name}", axis)
        tokens = timings[timings.direction == TOKEN]
        if not tokens.empty:
            yield _table("token", "Time of one causal token after so many others", tokens, results)


def _table(name: str, title: str, timings: pd.DataFrame, results: Results) -> Table:
    shown = [
        {
            **_named(row),
            "length": f"{row['length']:,}",
            "direction": row["direction"],
            "ms": show_number(row["milliseconds"], ",.2f"),
            "± (iqr)": show_number(row["spread"], ",.2f"),
            "speed-up": _speedup(row),
            "peak MB": show_number(row["peak_memory_mb"], ",.2f"),
            "error": show_number(row["relative_error"], ".1e"),
        }
        for row in timings.to_dict("records")
    ]
    return Table(
        name=name,
        title=title,
        values=timings[[*_MEASURED, "length", "direction", *BENCH_VALUES]],
        shown=pd.DataFrame(shown),
        caption="Medians and interquartile ranges; speed-up: against torch's scaled_dot_product_attention, causal "
        "where the mechanism is, more than 1 is faster; error: relative to the exact result in float64; unsteady: the "
        "interquartile range is more than the median, so that a speed-up would mean nothing.",
        provenance=results.bench_caption(),
    )


def _named(row: Mapping[Hashable, Any]) -> dict[str, str]:
    name = label((row["attn"], row["dotf"]))
    return {"mechanism": name, "features": str(row["num_features"] or MISSING)}


def _speedup(row: Mapping[Hashable, Any]) -> str:
    if row["spread"] > row["milliseconds"]:
        return "unsteady"
    return MISSING if pd.isna(row["speedup_vs_sdpa"]) else f"{row['speedup_vs_sdpa']:.2f}×"


def leads_from(lengths: Sequence[int], ratios: Sequence[float]) -> float:
    """Return the length from which on a ratio of times stays below 1, interpolated on logarithmic axes.

    Args:
        lengths: ascending.
        ratios: the time over that of what it is compared with, at each length.

    Returns:
        0 where it is below 1 at all lengths, infinity where it is not at the last.
    """
    behind = [index for index, ratio in enumerate(ratios) if not ratio < 1]
    if not behind:
        return 0.0
    if behind[-1] == len(lengths) - 1:
        return math.inf
    around = [behind[-1] + 1, behind[-1]]
    return math.exp(np.interp(0.0, np.log([ratios[i] for i in around]), np.log([lengths[i] for i in around])))


def _lead_table(timings: pd.DataFrame, results: Results) -> Table:
    rows, shown = [], []
    sdpa = timings[timings.attn == SDPA]
    for key, own in timings[timings.attn != SDPA].groupby(_MEASURED, sort=False):
        measured: dict[Hashable, Any] = dict(zip(_MEASURED, key, strict=True))
        shown.append(_named(measured))
        for direction in (*PASSES, *CAUSAL_PASSES):
            mine = own[own.direction == direction]
            exact = sdpa[sdpa.direction == direction]
            shown[-1][direction] = MISSING
            both = mine.merge(exact, on="length", suffixes=("", "_sdpa")).sort_values("length")
            if not both.empty:
                found = leads_from(both.length.tolist(), (both.milliseconds / both.milliseconds_sdpa).tolist())
                shown[-1][direction] = _lead_text(found, both.length)
                rows.append(measured | {"direction": direction, "from_length": found})
    return Table(
        name="cost-lead",
        title="The length from which on a mechanism is faster than torch's exact attention",
        values=pd.DataFrame(rows),
        shown=pd.DataFrame(shown),
        caption="Against torch's scaled_dot_product_attention (causal: with is_causal), interpolated between measured "
        "lengths on logarithmic axes. CSV: 0 is below the shortest measured length, inf never.",
        provenance=results.bench_caption(),
    )


def _lead_text(found: float, lengths: pd.Series) -> str:
    if found == 0:
        return f"below {lengths.min():,}"
    return f"never up to {lengths.max():,}" if math.isinf(found) else f"{float(f'{found:.3g}'):,.0f}"


def _figure(comparison: Comparison, directions: Sequence[str], quantity: str, name: str, axis: str) -> Iterator[Figure]:
    """Yield the figure of these directions, if they were measured."""
    timings = comparison.results.first_timings()
    timings = timings[timings.direction.isin(directions)]
    if timings.empty:
        return
    canvas, panels = new_canvas(9, 3.8, panels=len(directions), columns=len(directions))
    for axes, direction in zip(panels, directions, strict=True):
        for mechanism in dict.fromkeys(zip(timings.attn, timings.dotf, strict=True)):
            rows = rows_of(timings[timings.direction == direction], mechanism)
            look = comparison.style(mechanism) | {"linewidth": 1.5}
            axes.plot(rows.length, rows[quantity], label=label(mechanism), **look)
        set_log(axes, "y")
        set_doubling(axes, timings.length, rotation=45)
        axes.set(xlabel="length", title=direction)
    panels[0].set_ylabel(axis)
    add_legend(panels[-1])
    yield Figure(
        name=f"bench-{name}",
        title=f"{name.replace('-', ' ').capitalize()} of one attention over the length of the sequence",
        canvas=canvas,
        caption="Medians.",
        provenance=comparison.results.bench_caption(),
    )
