"""What another attention makes of trained models: quality against exact attention, and time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from pipeline.grid.params import ReplacementParams, model_of
from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import Figure, add_legend, new_canvas, set_log
from pipeline.reporting._results import Results
from pipeline.reporting._statistics import LEVEL, REPLICATES
from pipeline.reporting._table import MISSING, Table, show_number

EXACT = "exact"
NEAR, CHOSEN, ALONE, OTHERS = (
    "ours: near and heavy keys",
    "ours: chosen for each layer",
    "ours: features alone",
    "others",
)
LOOKS: dict[str, dict[str, Any]] = {
    NEAR: {"color": "tab:blue", "marker": "o"},
    CHOSEN: {"color": "tab:green", "marker": "*", "markersize": 11},
    ALONE: {"color": "tab:orange", "marker": "s"},
    OTHERS: {"color": "0.45", "marker": "X"},
}
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
    """Return a row for each method: means over texts, less exact attention with 95 % by a paired bootstrap, times."""
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
    return pd.DataFrame(rows)


def _table(model: str, results: Results) -> Table:
    values = measured(model, results)
    shown = []
    for row in values.to_dict("records"):
        texts = {"method": str(row["cell"]).partition("-")[2]}
        for what in filter(row.__contains__, QUALITIES):
            name = what.replace("_", " ")
            low, high = (show_number(row[f"{what}_{end}"], "+z.3f") for end in ("low", "high"))
            texts |= {name: show_number(row[what], "z.3f"), f"{name} less exact": f"{low} to {high}"}
        if "share_median" in row:
            texts["share, median / worst head"] = f"{row['share_median']:z,.2f} / {row['share_worst']:z,.2f}"
        for length in results.params.trained.lengths:
            if f"of_sdpa_{length}" in row:
                texts[f"time at {length:,}"] = show_number(row[f"of_sdpa_{length}"], ".2f")
        shown.append(texts)
    return Table(
        name=f"trained-{model}",
        title=f"{model}: what is left of a trained model when its attention is replaced",
        values=values,
        shown=pd.DataFrame(shown).fillna(MISSING),
        caption="Means over texts or windows; less exact: 95 % of the difference from exact attention, by a bootstrap "
        "over them in pairs. Cosine: with the embedding of a review by exact attention. Reciprocal rank: at which the "
        "beginning of a paper finds its middle. Share: of the attention explained; 1 is exact, 0 is uniform. Loss: of "
        "a token, in nats. Time: of one layer's attention over that of torch's exact attention, at so many tokens. "
        "Methods of three numbers: window, heavy keys, features; bare: without features.",
        provenance=results.replaced_caption(),
    )


def _figure(models: list[str], results: Results) -> Figure:
    canvas, panels = new_canvas(6.2 * len(models), 4.6, len(models), len(models), share_y=False)
    length = max(results.params.trained.lengths)
    times = f"milliseconds_{length}"
    for axes, model in zip(panels, models, strict=True):
        values = measured(model, results).set_index("cell")
        exact = float(values[times][f"{model}-{EXACT}"])
        what = "loss" if "loss" in values else "cosine"
        values["away"] = values[f"{what}_less_exact"].abs()
        for group, look in LOOKS.items():
            own = values[[_group(results, name) == group for name in values.index]].dropna(subset=[times])
            own = own[own.away > 0]
            axes.plot(own[times], own.away, label=group, linestyle="none", **look)
            for name, x, y in zip(own.index, own[times], own.away, strict=True):
                shift: Any = {"xytext": (5, 3), "textcoords": "offset points"}
                axes.annotate(name.partition("-")[2], (x, y), **shift, fontsize=6, color=look["color"])
        axes.axvline(exact, color="k", linestyle="--", linewidth=1, label="exact attention")
        set_log(axes, "x")
        set_log(axes, "y")
        axes.invert_yaxis()
        quality = "loss above exact attention, nats" if what == "loss" else "1 - cosine with the exact embedding"
        axes.set(xlabel=f"milliseconds of one layer's attention, {length:,} tokens", ylabel=quality, title=model)
    add_legend(panels[0])
    return Figure(
        name="trained",
        title="Quality of trained models against the time of the attention that replaces theirs",
        canvas=canvas,
        caption="Higher is closer to exact attention, further left is faster; both axes are logarithmic.",
        provenance=results.replaced_caption(),
    )


def _group(results: Results, name: str) -> str:
    method: ReplacementParams = results.params.trained.cells[name]
    if method.share is not None:
        return CHOSEN
    if method.bare or not method.estimate:
        return OTHERS
    return NEAR if method.estimate.get("window") or method.estimate.get("heavy") else ALONE
