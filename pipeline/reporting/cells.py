"""Every cell by itself: the chosen step, and accuracy on the dev data that chose it beside that on the test data."""

import math
from collections.abc import Hashable, Iterator
from typing import Any

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import columns
from pipeline.reporting._results import CELL, CELL_VALUES
from pipeline.reporting._table import Table, Text, show_number, without_constants


class Cells(Report):
    """One row per cell of the grid, by task the highest first; what is not finished stays empty."""

    title = "Cells"
    order = 80

    def make(self, comparison: Comparison) -> Iterator[Text | Table]:
        results = comparison.results
        if results.gaps():
            yield Text("What is not there", (*results.gaps(), "schoenbat-exp status says why."))
        if results.cells.empty:
            return
        values = results.cells[[*CELL, *CELL_VALUES]].sort_values(
            ["task", "test_accuracy"], ascending=[True, False], kind="stable", ignore_index=True
        )
        shown, constant = without_constants(pd.DataFrame([_show(row, comparison) for row in values.to_dict("records")]))
        yield Table(
            name="cells",
            title="Dev and test accuracy in percent of every cell, at the step with the best dev accuracy",
            values=values,
            shown=shown,
            caption="Baseline passed at: the first evaluation at which dev accuracy was two standard errors above the "
            f"best baseline that needs no model. {constant}".strip(),
            provenance=results.caption(),
        )


def _show(row: dict[Hashable, Any], comparison: Comparison) -> dict[str, str]:
    dev, test, passed = 100 * row["dev_accuracy"], 100 * row["test_accuracy"], row["passed_baseline_at"]
    return {
        "task": row["task"],
        **columns(comparison.results.params, (row["attn"], row["dotf"], row["former"])),
        "seed": str(row["seed"]),
        "parameters": show_number(row["num_parameters"], ",.0f"),
        "step": show_number(row["best_step"], ",.0f"),
        "dev": show_number(dev),
        "test": show_number(test),
        "test - dev": show_number(test - dev, "+z.2f"),
        "baseline passed at": "never" if math.isinf(passed) else show_number(passed, ",.0f"),
    }
