"""How much of a trained cell's attention estimates of its kernel explain, at equal numbers of features."""

from collections.abc import Iterator

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._results import ERROR_VALUES, Results
from pipeline.reporting._table import MISSING, Table, show_number, without_constants


class Errors(Report):
    """Where attention is close to uniform a relative error says little: the share explained tells estimates apart."""

    title = "Errors of the estimators in trained cells"
    order = 35

    def make(self, comparison: Comparison) -> Iterator[Table]:
        results = comparison.results
        if not results.errors.empty:
            errors = results.errors.assign(share=1 - results.errors.unexplained**2)
            yield _table(errors, results)


def _table(errors: pd.DataFrame, results: Results) -> Table:
    accuracies = errors.cell.map(100 * results.cells.set_index("id").test_accuracy)
    named = errors[["cell", "dotf", "estimator"]].rename(columns={"dotf": "kernel"})
    named["accuracy"] = accuracies.map(show_number)
    wide = named.assign(size=errors.num_features, text=errors.share.map(_share))
    wide = wide.pivot(index=[*named], columns="size", values="text").fillna(MISSING).reset_index()
    shown = named.drop_duplicates().merge(wide, on=[*named])
    told, constant = without_constants(
        shown.rename(columns=lambda name: name if isinstance(name, str) else f"{name:,}")
    )
    return Table(
        name="errors",
        title="Share of the exact attention that estimates explain in trained cells, by number of features",
        values=errors[["cell", "dotf", "estimator", "num_features", *ERROR_VALUES, "share"]],
        shown=told,
        caption="Share: 1 - u^2, with u the norm of the difference over the distance of the exact output from that of "
        "uniform weights; 1 is exact, 0 is uniform attention, and less than 0 is further off than that. Means over "
        "draws (spreads, and relative errors of outputs and of the kernel matrix: CSV). Accuracy: of the cell on test, "
        "in percent. ... as trained: the one draw that the cell has learned with, which may be accurate without being "
        f"an estimate of its kernel any more; taylor1 has head_dim + 1 features at any budget. {constant}".strip(),
        provenance=results.errors_caption(),
    )


def _share(share: float) -> str:
    """Format with three decimals that do not round up to all of the attention."""
    if share > 0.999:
        return "> 0.999"
    return "< -99" if share < -99 else f"{share:.3f}"
