"""Time, memory and error of the mechanisms alone, from the benchmark that measured them side by side in one process."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.ticker import NullLocator

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import first_listed, label, named, rows_of, style, widened
from pipeline.reporting._output import Figure, add_legend, new_canvas, set_log
from pipeline.reporting._setting import Setting
from pipeline.reporting._table import MISSING, Table, show_number

PASSES = ("forward", "forward+backward")
CAUSAL_PASSES = ("causal forward", "causal forward+backward")
SDPA = "sdpa"
STEP = "training step"


class Cost(Report):
    """Cells share the machine while they train, so their times are never shown."""

    title = "Time and memory"
    order = 40

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        frame, setting = comparison.frame, comparison.setting
        found = frame[frame.quantity.str.startswith("bench_")]
        if found.empty:
            return
        timings = widened(found, "bench_", ["attn", "dotf", "num_features", "threads", "length", "direction"])
        passes = timings[timings.direction.isin((*PASSES, *CAUSAL_PASSES))]
        if not passes.empty:
            yield _lead_table(passes, setting)
            yield _table("cost", "Time, memory and error of one attention", passes, setting)
            for quantity, name, axis in (
                ("milliseconds", "time", "milliseconds (median)"),
                ("peak_memory_mb", "memory", "peak memory (MB)"),
            ):
                for directions, stem in ((PASSES, name), (CAUSAL_PASSES, f"causal-{name}")):
                    shown = first_listed(passes[passes.direction.isin(directions)])
                    if not shown.empty:
                        yield _figure(frame, shown, directions, quantity, stem, axis, setting)
        steps = timings[timings.direction == STEP]
        if not steps.empty:
            yield _table("step", "Time and memory of one training step of the whole model", steps, setting)


def _table(name: str, title: str, timings: pd.DataFrame, setting: Setting) -> Table:
    shown = [
        {
            **named((row["attn"], row["dotf"])),
            "features": str(row["num_features"] or MISSING),
            "threads": str(row["threads"]),
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
        values=timings,
        shown=pd.DataFrame(shown),
        caption="Medians and interquartile ranges; speed-up: against torch's scaled_dot_product_attention, causal "
        "where the mechanism is, more than 1 is faster; error: relative to the exact result in float64; unsteady: the "
        "interquartile range is more than the median, so that a speed-up would mean nothing.",
        provenance=setting.bench_caption(),
    )


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
    last = behind[-1]
    if last == len(lengths) - 1:
        return math.inf
    before, after = math.log(ratios[last]), math.log(ratios[last + 1])
    share = before / (before - after)
    return math.exp((1 - share) * math.log(lengths[last]) + share * math.log(lengths[last + 1]))


def _leads(own: pd.DataFrame, sdpa: pd.DataFrame) -> dict[str, float]:
    """Return from which length a mechanism is faster, and the same with both times off by half of their spreads."""
    both = own.merge(sdpa, on="length", suffixes=("", "_sdpa")).sort_values("length")
    lengths = both.length.tolist()
    ratio = both.milliseconds / both.milliseconds_sdpa
    # Half of an interquartile range may be more than the median, so it is a factor.
    slack = (both.spread / both.milliseconds + both.spread_sdpa / both.milliseconds_sdpa).div(2).map(math.exp)
    return {
        "from_length": leads_from(lengths, ratio.tolist()),
        "from_low": leads_from(lengths, (ratio / slack).tolist()),
        "from_high": leads_from(lengths, (ratio * slack).tolist()),
        "shortest": min(lengths),
        "longest": max(lengths),
    }


def _lead_table(timings: pd.DataFrame, setting: Setting) -> Table:
    keys = ["attn", "dotf", "num_features", "threads"]
    rows, shown = [], []
    for (attn, dotf, num_features, threads), own in timings[timings.attn != SDPA].groupby(keys, sort=False):
        texts = {}
        for direction in (*PASSES, *CAUSAL_PASSES):
            measured = own[own.direction == direction]
            sdpa = timings[(timings.attn == SDPA) & (timings.threads == threads) & (timings.direction == direction)]
            texts[direction] = MISSING
            if set(measured.length) & set(sdpa.length):
                found = _leads(measured, sdpa)
                texts[direction] = _lead_text(found)
                rows.append(dict(zip(keys, (attn, dotf, num_features, threads), strict=True)))
                rows[-1] |= {"direction": direction, **found}
        name = named((str(attn), str(dotf)))
        shown.append({**name, "features": str(num_features or MISSING), "threads": str(threads), **texts})
    return Table(
        name="cost-lead",
        title="The length from which on a mechanism is faster than torch's exact attention",
        values=pd.DataFrame(rows),
        shown=pd.DataFrame(shown),
        caption="Against torch's scaled_dot_product_attention (causal: with is_causal), interpolated between measured "
        "lengths on logarithmic axes; in brackets with both times off by half of their interquartile ranges. CSV: 0 is "
        "below the shortest measured length, inf never.",
        provenance=setting.bench_caption(),
    )


def _lead_text(found: dict[str, float]) -> str:
    def text(length: float) -> str:
        if length == 0:
            return f"below {found['shortest']:,}"
        if math.isinf(length):
            return f"never up to {found['longest']:,}"
        return f"{float(f'{length:.3g}'):,.0f}"

    middle, low, high = (text(found[name]) for name in ("from_length", "from_low", "from_high"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _figure(
    frame: pd.DataFrame,
    timings: pd.DataFrame,
    directions: Sequence[str],
    quantity: str,
    name: str,
    axis: str,
    setting: Setting,
) -> Figure:
    canvas, panels = new_canvas(9, 3.8, panels=len(directions))
    mechanisms = list(dict.fromkeys(zip(timings.attn, timings.dotf, strict=True)))
    lengths = sorted(timings.length.unique())
    for axes, direction in zip(panels, directions, strict=True):
        for mechanism in mechanisms:
            rows = rows_of(timings[timings.direction == direction], mechanism)
            axes.plot(rows.length, rows[quantity], label=label(mechanism), linewidth=1.5, **style(frame, mechanism))
        axes.set_xscale("log", base=2)
        set_log(axes, "y")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="length", title=direction)
    panels[0].set_ylabel(axis)
    add_legend(panels[-1])
    return Figure(
        name=f"bench-{name}",
        title=f"{name.replace('-', ' ').capitalize()} of one attention over the length of the sequence",
        canvas=canvas,
        caption="Medians.",
        provenance=setting.bench_caption(),
    )
