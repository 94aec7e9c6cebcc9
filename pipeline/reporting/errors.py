"""How much of a trained cell's attention estimates of its kernel explain, at equal numbers of features."""

import math
from collections.abc import Iterator

import pandas as pd
from matplotlib.ticker import NullLocator

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import COLOURS, MARKERS, widened
from pipeline.reporting._output import Figure, add_legend, new_canvas
from pipeline.reporting._setting import Setting
from pipeline.reporting._table import MISSING, Table, show_number

FIGURE_KERNEL = "exp"
COLUMNS = 3
"""Panels of a figure side by side."""
LEAST_SHARE = -0.5
"""Where the axis of shares ends: an estimate can be further off than uniform weights without bound."""
AS_TRAINED = " as trained"
"""How the estimator is called that a cell has learned with."""
_KEYS = ["cell", "dotf", "estimator", "num_features"]


class Errors(Report):
    """Where attention is close to uniform a relative error says little: the share explained tells estimates apart."""

    title = "Errors of the estimators in trained cells"
    order = 35

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        frame, setting = comparison.frame, comparison.setting
        found = frame[frame.quantity.str.startswith("error_")]
        if found.empty:
            return
        errors = widened(found, "error_", ["direction", "dotf", "attn", "num_features"])
        errors = errors.rename(columns={"direction": "cell", "attn": "estimator"})
        errors["share"] = 1 - errors.unexplained**2
        beside = _beside_accuracy(errors, frame)
        if not beside.empty:
            yield _trained_table(beside, setting)
        yield _table(errors, setting)
        yield _figure(errors[errors.dotf == FIGURE_KERNEL], setting)


def _beside_accuracy(errors: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the shares of what cells were trained with, with the accuracies of these cells."""
    cells = frame[frame.quantity == "test_accuracy"]
    parts = cells[["task", "attn", "dotf", "former"]].to_numpy().tolist()
    accuracies = {
        "-".join([*filter(None, axes), str(seed)]): value
        for axes, seed, value in zip(parts, cells.seed, cells.value, strict=True)
    }
    own = errors[errors.estimator.str.endswith(AS_TRAINED)].copy()
    own["accuracy"] = own.cell.map(accuracies)
    return own[["cell", "estimator", "num_features", "kernel_error", "output_error", "share", "accuracy"]]


def _trained_table(beside: pd.DataFrame, setting: Setting) -> Table:
    shown = [
        {
            "cell": row["cell"],
            "features": f"{row['num_features']:,}",
            "kernel error": f"{row['kernel_error']:.1e}",
            "output error": f"{row['output_error']:.1e}",
            "share explained": _share(row["share"]),
            "test accuracy": show_number(100 * row["accuracy"]),
        }
        for row in beside.to_dict("records")
    ]
    return Table(
        name="explained",
        title="Share of the exact attention that a trained cell computes, beside its test accuracy in percent",
        values=beside,
        shown=pd.DataFrame(shown),
        caption="On the queries, keys and values inside the cell, with the one draw of features that it has learned "
        "with. Share: 1 is the exact kernel's attention, 0 knows nothing of it, less is further off than uniform "
        "weights: a cell may be accurate without being an estimate of its kernel any more.",
        provenance=setting.errors_caption(),
    )


def _table(errors: pd.DataFrame, setting: Setting) -> Table:
    texts = [f"{e:.1e}; {_share(share)}" for e, share in zip(errors.output_error, errors.share, strict=True)]
    sizes = sorted(errors.num_features.unique())
    shown = []
    for (cell, dotf, estimator), rows in errors.assign(text=texts).groupby(_KEYS[:-1], sort=False):
        found = dict(zip(rows.num_features, rows.text, strict=True))
        names = {"cell": str(cell), "kernel": str(dotf), "estimator": str(estimator)}
        shown.append(names | {f"{size:,}": found.get(size, MISSING) for size in sizes})
    spread = ["kernel_error", "kernel_spread", "output_error", "output_spread", "unexplained", "unexplained_spread"]
    return Table(
        name="errors",
        title="Relative error of the attention output; share of the attention explained, by number of features",
        values=errors[[*_KEYS, *spread, "share"]],
        shown=pd.DataFrame(shown),
        caption="Error: norm of the difference over the norm of the exact output. Share: 1 - u^2, with u the norm of "
        "the difference over the distance of the exact output from that of uniform weights; 1 is exact, 0 is uniform "
        "attention, and less than 0 is further off than that. Means over draws (spreads, and errors of the kernel "
        "matrix: CSV). rmfa: as published; rmfa-sketch: least expected error, shifted where the kernel is exp; ... as "
        "trained: the one draw that the cell has learned with; taylor1 has head_dim + 1 features at any budget; "
        "FAVOR+: positive orthogonal.",
        provenance=setting.errors_caption(),
    )


def _share(share: float) -> str:
    """Format with three decimals that do not round up to all of the attention."""
    if share > 0.999:
        return "> 0.999"
    return "< -99" if share < -99 else f"{share:.3f}"


def _figure(errors: pd.DataFrame, setting: Setting) -> Figure:
    cells = list(dict.fromkeys(errors.cell))
    columns = min(COLUMNS, len(cells))
    rows_of_panels = math.ceil(len(cells) / columns)
    canvas, panels = new_canvas(3.6 * columns, 3.2 * rows_of_panels + 0.6, columns, rows_of_panels)
    sizes = sorted(errors.num_features.unique())
    for axes, cell in zip(panels, cells, strict=False):
        for index, estimator in enumerate(dict.fromkeys(errors.estimator)):
            rows = errors[(errors.cell == cell) & (errors.estimator == estimator)]
            spreads = (2 * rows.unexplained * rows.unexplained_spread).where(rows.share > LEAST_SHARE)
            axes.errorbar(
                rows.num_features,
                rows.share,
                spreads,
                label=estimator,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                linewidth=1.5,
            )
        axes.set_xscale("log", base=2)
        axes.axhline(0, color="0.5", linewidth=1)
        axes.set_ylim(LEAST_SHARE, 1.05)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("features")
        axes.set_title(cell, fontsize=7)
    for axes in panels[::columns]:
        axes.set_ylabel("share explained")
    for axes in panels[len(cells) :]:
        axes.remove()
    add_legend(panels[0])
    return Figure(
        name="errors",
        title=f"Share of the attention explained over the number of features, kernel {FIGURE_KERNEL}",
        canvas=canvas,
        caption="Mean and standard deviation over draws. Uniform weights are at 0; what lies below the axis is in the "
        "table.",
        provenance=setting.errors_caption(),
    )
