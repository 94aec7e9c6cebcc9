"""Time, memory and error of the mechanisms alone, from the benchmark that measured them side by side in one process."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import Figure, add_label, new_canvas, set_log
from pipeline.reporting._mechanisms import CACHE, EXACT, OURS, PUBLISHED, label, rows_of, style
from pipeline.reporting._table import MISSING, Table, show_number, without_constants
from schoenbat.registry import base_name

PASSES = ("forward", "forward+backward", "causal forward", "causal forward+backward")
SDPA = "sdpa"
MEASURED = ["direction", "attn", "dotf", "num_features"]


class Cost(Report):
    """Cells share the machine while they train, so their times are never shown."""

    title = "Time and memory"
    order = 40

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        bench = comparison.results.bench
        if bench.empty:
            return
        rows = [_row(key, own) for key, own in bench.groupby(MEASURED, sort=False)]
        lengths = sorted(bench.length.unique())
        rows.sort(key=lambda row: (row["direction"], row.get(lengths[-1], math.inf), str(row["attn"])))
        shown, constant = without_constants(pd.DataFrame([_shown(row, lengths) for row in rows]))
        yield Table(
            name="cost",
            title="Time of one attention over that of torch's exact attention, by length",
            values=pd.DataFrame(rows),
            shown=shown,
            caption="Medians over those of torch's scaled_dot_product_attention, causal where the mechanism is; less "
            "than 1 is faster, unsteady: the interquartile range is more than the median. Faster from: interpolated on "
            "logarithmic axes; CSV: 0 is below the shortest measured length, inf never. Error: relative to the exact "
            "result in float64; memory: its peak in MB; both at the longest length. One token: after so many others. "
            f"{constant}".strip(),
            provenance=comparison.results.bench_caption(),
        )
        yield from _figure(comparison)


def _row(key: Any, own: pd.DataFrame) -> dict[Hashable, Any]:
    own = own.sort_values("length")
    known = own.dropna(subset="speedup_vs_sdpa")
    ratios = dict(zip(known.length, 1 / known.speedup_vs_sdpa, strict=True))
    last = own.iloc[-1]
    return {
        **dict(zip(MEASURED, key, strict=True)),
        **ratios,
        "unsteady": " ".join(map(str, own.length[own.spread > own.milliseconds])),
        "from_length": leads_from(list(ratios), list(ratios.values())) if ratios else math.nan,
        "peak_memory_mb": last.peak_memory_mb,
        "relative_error": last.relative_error,
    }


def _shown(row: Mapping[Hashable, Any], lengths: Sequence[int]) -> dict[str, str]:
    unsteady = row["unsteady"].split()
    texts = {f"{at:,}": "unsteady" if str(at) in unsteady else show_number(row.get(at, math.nan)) for at in lengths}
    start = row["from_length"]
    faster = f"{float(f'{start:.3g}'):,.0f}" if 0 < start < math.inf else MISSING
    return {
        "direction": str(row["direction"]),
        "method": label((row["attn"], row["dotf"])) + (" (ours)" if row["attn"] == OURS else ""),
        "features": str(row["num_features"] or ""),
        **texts,
        "faster from": {0: f"below {lengths[0]:,}", math.inf: f"never up to {lengths[-1]:,}"}.get(start, faster),
        "peak MB": show_number(row["peak_memory_mb"], ",.2f"),
        "error": show_number(row["relative_error"], ".1e"),
    }


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


def _figure(comparison: Comparison) -> Iterator[Figure]:
    """Yield one panel for each pass that was measured, of the first numbers of features."""
    timings = comparison.results.first_timings()
    timings = timings[timings.direction.isin(PASSES) & (timings.attn != SDPA)]
    directions = [direction for direction in PASSES if direction in set(timings.direction)]
    if not directions:
        return
    first = next((comparison.coloured(task) for task, tested in comparison.tasks.items() if tested), [])
    coloured = {base_name(mechanism[0]) for mechanism in first} or {OURS, PUBLISHED, EXACT}
    canvas, panels = new_canvas(5.2, 3.6, len(directions))
    lengths = sorted(timings.length.unique())
    for axes, direction in zip(panels, directions, strict=True):
        axes.axhline(1.0, linestyle="--", linewidth=1, color=style((CACHE,), True)["color"])
        for mechanism in dict.fromkeys(zip(timings.attn, timings.dotf, strict=True)):
            rows = rows_of(timings[timings.direction == direction], mechanism)
            look = style(mechanism, mechanism[0] in coloured - {CACHE})
            ratios = (1 / rows.speedup_vs_sdpa).tolist()
            axes.plot(rows.length, ratios, **look)
            if ratios and mechanism[0] in coloured - {CACHE}:
                add_label(axes, rows.length.iloc[-1], ratios[-1], label(mechanism), look["color"])
        set_log(axes, "y")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
        axes.set(xlabel="length", title=direction)
    panels[0].set_ylabel("time over that of exact attention")
    yield Figure(
        name="bench-time",
        title="Time of one attention over the length of the sequence, relative to torch's exact attention",
        canvas=canvas,
        caption="Medians. Dashed: torch's scaled_dot_product_attention; below it is faster. Grey: the rest.",
        provenance=comparison.results.bench_caption(),
    )
