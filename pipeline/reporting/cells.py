"""Every cell by itself: the chosen step, and accuracy on the dev data that chose it beside that on the test data."""

import math
from collections.abc import Iterator

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._mechanisms import named
from pipeline.reporting._table import Table, Text, show_number

CELL = ["task", "attn", "dotf", "former", "seed"]
QUANTITIES = ["num_parameters", "state_bytes", "best_step", "dev_accuracy", "dev_loss", "test_accuracy", "test_loss"]


class Cells(Report):
    """One row per cell of the grid; what is not finished stays empty."""

    title = "Cells"
    order = 80

    def make(self, comparison: Comparison) -> Iterator[Text | Table]:
        frame, setting = comparison.frame, comparison.setting
        if setting.gaps():
            yield Text("What is not there", (*setting.gaps(), "schoenbat-exp status says why."))
        found = frame[frame.quantity.isin(QUANTITIES)]
        if found.empty:
            return
        order = found[CELL].drop_duplicates()
        wide = found.pivot(index=CELL, columns="quantity", values="value").reset_index()
        values = order.merge(wide, on=CELL, validate="one_to_one")[[*CELL, *QUANTITIES]]
        values["passed_baseline_at"] = [
            comparison.passed.get((row["task"], (row["attn"], row["dotf"], row["former"]), row["seed"]), float("nan"))
            for row in values.to_dict("records")
        ]
        shown = pd.DataFrame([_show(row) for row in values.to_dict("records")])
        yield Table(
            name="cells",
            title="Dev and test accuracy in percent of every cell, at the step with the best dev accuracy",
            values=values,
            shown=shown,
            caption="Baseline passed at: the first evaluation at which dev accuracy was two standard errors above the "
            "best baseline that needs no model.",
            provenance=setting.caption(),
        )


def _show(row: dict) -> dict[str, str]:
    dev, test, passed = 100 * row["dev_accuracy"], 100 * row["test_accuracy"], row["passed_baseline_at"]
    return {
        "task": row["task"],
        **named((row["attn"], row["dotf"], row["former"])),
        "seed": str(row["seed"]),
        "parameters": show_number(row["num_parameters"], ",.0f"),
        "step": show_number(row["best_step"], ",.0f"),
        "dev": show_number(dev, ".2f"),
        "test": show_number(test, ".2f"),
        "test - dev": show_number(test - dev, "+.2f"),
        "baseline passed at": "never" if math.isinf(passed) else show_number(passed, ",.0f"),
    }
