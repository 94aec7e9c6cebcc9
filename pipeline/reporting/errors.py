"""How much of a trained cell's attention estimates of its kernel explain, at equal numbers of features."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import Figure, add_legend, new_canvas, set_doubling
from pipeline.reporting._mechanisms import COLOURS, MARKERS
from pipeline.reporting._results import CELL, ERROR_VALUES, Results
from pipeline.reporting._table import MISSING, Table, show_number

COLUMNS = 3
"""Panels of a figure side by side."""
LEAST_SHARE = -0.5
"""Where the axis of shares ends: an estimate can be further off than uniform weights without bound."""
AS_TRAINED = " as trained"
"""How the estimator is called that a cell has learned with."""


class Errors(Report):
    """Where attention is close to uniform a relative error says little: the share explained tells estimates apart."""

    title = "Errors of the estimators in trained cells"
    order = 35

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        results = comparison.results
        if results.errors.empty:
            return
        errors = results.errors.assign(share=1 - results.errors.unexplained**2)
        own = errors[errors.estimator.str.endswith(AS_TRAINED)]
        if not own.empty:
            yield _trained_table(own, results)
        yield _table(errors, results)
        yield _figure(errors, results)


def _trained_table(own: pd.DataFrame, results: Results) -> Table:
    ids = ["-".join(filter(None, map(str, cell))) for cell in results.cells[CELL].itertuples(index=False)]
    own = own.assign(accuracy=own.cell.map(dict(zip(ids, results.cells.test_accuracy, strict=True))))
    shown = [
        {
            "cell": row["cell"],
            "features": f"{row['num_features']:,}",
            "kernel error": f"{row['kernel_error']:.1e}",
            "output error": f"{row['output_error']:.1e}",
            "share explained": _share(row["share"]),
            "test accuracy": show_number(100 * row["accuracy"]),
        }
        for row in own.to_dict("records")
    ]
    return Table(
        name="explained",
        title="Share of the exact attention that a trained cell computes, beside its test accuracy in percent",
        values=own[["cell", "estimator", "num_features", "kernel_error", "output_error", "share", "accuracy"]],
        shown=pd.DataFrame(shown),
        caption="On the queries, keys and values inside the cell, with the one draw of features that it has learned "
        "with. Share: 1 is the exact kernel's attention, 0 knows nothing of it, less is further off than uniform "
        "weights: a cell may be accurate without being an estimate of its kernel any more.",
        provenance=results.errors_caption(),
    )


def _table(errors: pd.DataFrame, results: Results) -> Table:
    texts = [f"{e:.1e}; {_share(share)}" for e, share in zip(errors.output_error, errors.share, strict=True)]
    named = errors[["cell", "dotf", "estimator"]].rename(columns={"dotf": "kernel"})
    wide = named.assign(size=errors.num_features, text=texts).pivot(index=[*named], columns="size", values="text")
    shown = named.drop_duplicates().merge(wide.fillna(MISSING).reset_index(), on=[*named])
    return Table(
        name="errors",
        title="Relative error of the attention output; share of the attention explained, by number of features",
        values=errors[["cell", "dotf", "estimator", "num_features", *ERROR_VALUES, "share"]],
        shown=shown.rename(columns=lambda name: name if isinstance(name, str) else f"{name:,}"),
        caption="Error: norm of the difference over the norm of the exact output. Share: 1 - u^2, with u the norm of "
        "the difference over the distance of the exact output from that of uniform weights; 1 is exact, 0 is uniform "
        "attention, and less than 0 is further off than that. Means over draws (spreads, and errors of the kernel "
        "matrix: CSV). rmfa: as published; rmfa-sketch: least expected error, shifted where the kernel is exp; ... as "
        "trained: the one draw that the cell has learned with; taylor1 has head_dim + 1 features at any budget; "
        "FAVOR+: positive orthogonal.",
        provenance=results.errors_caption(),
    )


def _share(share: float) -> str:
    """Format with three decimals that do not round up to all of the attention."""
    if share > 0.999:
        return "> 0.999"
    return "< -99" if share < -99 else f"{share:.3f}"


def _figure(errors: pd.DataFrame, results: Results) -> Figure:
    cells = errors.cell.unique()
    columns = min(COLUMNS, len(cells))
    canvas, panels = new_canvas(3.6 * columns, 3.2 * -(-len(cells) // columns) + 0.6, len(cells), columns)
    for number, (axes, cell) in enumerate(zip(panels, cells, strict=True)):
        for index, estimator in enumerate(errors.estimator.unique()):
            rows = errors[(errors.cell == cell) & (errors.estimator == estimator)]
            spreads = (2 * rows.unexplained * rows.unexplained_spread).where(rows.share > LEAST_SHARE)
            look: Any = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            axes.errorbar(rows.num_features, rows.share, spreads, label=estimator, markersize=4, linewidth=1.5, **look)
        axes.axhline(0, color="0.5", linewidth=1)
        axes.set_ylim(LEAST_SHARE, 1.05)
        set_doubling(axes, errors.num_features)
        axes.set_xlabel("features")
        axes.set_title(cell, fontsize=7)
        if number % columns == 0:
            axes.set_ylabel("share explained")
    add_legend(panels[0])
    return Figure(
        name="errors",
        title="Share of the attention explained over the number of features",
        canvas=canvas,
        caption="Mean and standard deviation over draws. Uniform weights are at 0; what lies below the axis is in the "
        "table.",
        provenance=results.errors_caption(),
    )
