"""What another attention makes of trained models: quality against exact attention, and time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from pipeline.grid.params import ReplacementParams, model_of
from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import Figure, add_label, new_canvas, set_log
from pipeline.reporting._mechanisms import COLOURS, OURS, PUBLISHED
from pipeline.reporting._mechanisms import EXACT as KERNEL
from pipeline.reporting._results import Results
from pipeline.reporting._statistics import LEVEL, REPLICATES
from pipeline.reporting._table import MISSING, Table, show_number, without_constants

EXACT = "exact"
NEAR, CHOSEN, ALONE, OTHERS = ("near and heavy keys", "chosen for each layer", "features alone", "others")
LOOKS: dict[str, tuple[str, str]] = {
    NEAR: (COLOURS[OURS], "o"),
    CHOSEN: (COLOURS[KERNEL], "*"),
    ALONE: (COLOURS[PUBLISHED], "s"),
    OTHERS: ("#757575", "X"),
}
"""Colour and marker."""
QUALITIES = ("cosine", "reciprocal_rank", "loss")


class Trained(Report):
    """Times are of the attention alone; quality is that of the whole model."""

    title = "Trained models whose attention is replaced"
    order = 25

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        results = comparison.results
        models = [model for model in results.params.trained.model if f"{model}-{EXACT}" in results.replaced]
        for model in models:
            yield _table(model, results)
        if models and not results.replaced_times.empty:
            yield _figure(models, results)


def measured(model: str, results: Results) -> pd.DataFrame:
    """Return a row for each method, the best first: means over texts, less exact attention with 95 %, times.

    The intervals are by a paired bootstrap.
    """
    exact = results.replaced[f"{model}-{EXACT}"][0]
    drawn = np.random.default_rng(0).integers(0, len(exact), (REPLICATES, len(exact)))
    rows = []
    for name, (texts, about) in results.replaced.items():
        if model_of(name) != model:
            continue
        row: dict[str, Any] = {"cell": name, "draws": about["draws"], "texts": len(texts)}
        for what in filter(texts.__contains__, QUALITIES):
            difference = (texts[what] - exact[what]).to_numpy()
            low, high = np.quantile(difference[drawn].mean(1), (LEVEL / 2, 1 - LEVEL / 2))
            row |= {what: texts[what].mean(), f"{what}_spread": about["spreads"][what]}
            row |= {f"{what}_less_exact": difference.mean(), f"{what}_low": low, f"{what}_high": high}
        if heads := about["heads"]:
            row |= {"share_median": np.median(heads), "share_worst": min(heads)}
        for time in results.replaced_times[results.replaced_times.cell == name].to_dict("records"):
            row |= {f"{what}_{time['length']}": time[what] for what in ("milliseconds", "of_sdpa")}
        rows.append(row)
    found = pd.DataFrame(rows)
    what = quality_of(found)
    return found.sort_values(what, ascending=what == "loss", kind="stable", ignore_index=True)


def quality_of(values: pd.DataFrame) -> str:
    """Return the name of what tells methods on one model apart."""
    return "loss" if "loss" in values else "cosine"


def group_of(results: Results, name: str) -> str:
    """Return which of the groups of `LOOKS` a cell belongs to."""
    method: ReplacementParams = results.params.trained.cells[name]
    if method.share is not None:
        return CHOSEN
    if method.bare or not method.estimate:
        return OTHERS
    return NEAR if method.estimate.get("window") or method.estimate.get("heavy") else ALONE


def is_ours(results: Results, name: str) -> bool:
    """Return whether a cell is of our estimate, with exact keys or without."""
    published = results.params.trained.cells[name].estimate.get("estimator") == "maclaurin"
    return group_of(results, name) != OTHERS and not published


def is_learned(results: Results, name: str) -> bool:
    """Return whether anything of a cell was fitted to exact attention."""
    method: ReplacementParams = results.params.trained.cells[name]
    return bool(method.fit or method.rank)


def _table(model: str, results: Results) -> Table:
    values = measured(model, results)
    shown = []
    for row in values.to_dict("records"):
        name = str(row["cell"])
        given: ReplacementParams = results.params.trained.cells[name]
        options = given.estimate or given.options
        ours = " (ours)" if is_ours(results, name) else ""
        texts = {"method": name.partition("-")[2] + ours}
        for heading, option in (("near", "window"), ("heavy", "heavy"), ("features", "num_features")):
            texts[heading] = "" if given.bare and option == "num_features" else str(options.get(option) or "")
        for what in filter(row.__contains__, QUALITIES):
            heading = what.replace("_", " ")
            low, high = (show_number(row[f"{what}_{end}"], "+z.3f") for end in ("low", "high"))
            texts |= {heading: show_number(row[what], "z.3f"), f"{heading} less exact": f"{low} to {high}"}
        if "share_median" in row:
            texts["share, median / worst head"] = f"{row['share_median']:z,.2f} / {row['share_worst']:z,.2f}"
        for length in results.params.trained.lengths:
            if f"of_sdpa_{length}" in row:
                texts[f"time at {length:,}"] = show_number(row[f"of_sdpa_{length}"], ".2f")
        shown.append(texts)
    told, constant = without_constants(pd.DataFrame(shown).fillna(MISSING))
    replaced = values.index[values.cell != f"{model}-{EXACT}"]
    return Table(
        name=f"trained-{model}",
        title=f"{model}: what is left of a trained model when its attention is replaced",
        values=values,
        shown=told,
        caption="Means over texts or windows; less exact: 95 % of the difference from exact attention, by a bootstrap "
        "over them in pairs; bold: the best. Cosine: with the embedding of a review by exact attention. Reciprocal "
        "rank: at which the beginning of a paper finds its middle. Share: of the attention explained; 1 is exact, 0 is "
        "uniform. Loss: of a token, in nats. Time: of one layer's attention over that of torch's exact attention, at "
        "so many tokens. Near: keys of a window on either side, and heavy: keys of most weight, both exact; fitted: "
        f"kernels of features fitted to the model; bare: without features. {constant}".strip(),
        provenance=results.replaced_caption(),
        strong=frozenset((int(row), quality_of(values)) for row in replaced[:1]),
    )


def _figure(models: list[str], results: Results) -> Figure:
    canvas, panels = new_canvas(6.6, 4.8, len(models), share_y=False)
    length = max(results.params.trained.lengths)
    for axes, model in zip(panels, models, strict=True):
        values = measured(model, results).set_index("cell")
        what = quality_of(values)
        values["away"] = values[f"{what}_less_exact"].abs()
        own = values[values.away > 0].dropna(subset=[f"of_sdpa_{length}"])
        for name, time, away in zip(own.index, own[f"of_sdpa_{length}"], own.away, strict=True):
            colour, marker = LOOKS[group_of(results, name)]
            fill = "none" if results.params.trained.cells[name].fit else colour
            axes.plot(time, away, color=colour, marker=marker, markerfacecolor=fill, markersize=6, linestyle="none")
            add_label(axes, time, away, name.partition("-")[2], colour)
        axes.axvline(1.0, color="#000000", linestyle="--", linewidth=1)
        set_log(axes, "x")
        set_log(axes, "y")
        axes.invert_yaxis()
        quality = "loss above exact attention, nats" if what == "loss" else "1 - cosine with the exact embedding"
        axes.set(xlabel=f"time over that of exact attention, {length:,} tokens", ylabel=quality, title=model)
    return Figure(
        name="trained",
        title="Quality of trained models against the time of the attention that replaces theirs",
        canvas=canvas,
        caption="Higher is closer to exact attention, further left is faster. Dashed: exact "
        "attention. Blue: ours, near and heavy keys exact (numbers: near, heavy, features; hollow: fitted); star: "
        "chosen for each layer; squares: features alone; grey: others.",
        provenance=results.replaced_caption(),
    )
