"""Every cell by itself: the chosen step, and accuracy on the dev data that chose it beside that on the test data."""

import math
from collections.abc import Iterator

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._comparison import compared
from pipeline.reporting._mechanisms import named
from pipeline.reporting._table import MISSING, Table, Text

CELL = ["task", "attn", "dotf", "former", "seed"]
QUANTITIES = ["num_parameters", "state_bytes", "best_step", "dev_accuracy", "dev_loss", "test_accuracy", "test_loss"]


class Cells(Report):
    """One row per cell of the grid; what is not finished stays empty."""

    title = "Cells"
    order = 80

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Text | Table]:
        if setting.gaps():
            yield Text("What is not there", (*setting.gaps(), "schoenbat-exp status says why."))
        found = frame[frame.quantity.isin(QUANTITIES)]
        if found.empty:
            return
        order = found[CELL].drop_duplicates()
        wide = found.pivot(index=CELL, columns="quantity", values="value").reset_index()
        values = order.merge(wide, on=CELL, validate="one_to_one")[[*CELL, *QUANTITIES]]
        passed = compared(frame, setting).passed
        values["passed_rule_at"] = [
            passed.get((row["task"], (row["attn"], row["dotf"], row["former"]), row["seed"]), float("nan"))
            for row in values.to_dict("records")
        ]
        shown = pd.DataFrame([_show(row) for row in values.to_dict("records")])
        yield Table(
            name="cells",
            title="Dev and test accuracy in percent of every cell, at the step with the best dev accuracy",
            values=values,
            shown=shown,
            caption="Rule passed at: the first evaluation at which dev accuracy was two standard errors above the best "
            "rule that needs no model.",
            provenance=setting.caption(),
        )


def _show(row: dict) -> dict[str, str]:
    dev, test = 100 * row["dev_accuracy"], 100 * row["test_accuracy"]
    return {
        "task": row["task"],
        **named((row["attn"], row["dotf"], row["former"])),
        "seed": str(row["seed"]),
        "parameters": _number(row["num_parameters"], ",.0f"),
        "step": _number(row["best_step"], ",.0f"),
        "dev": _number(dev, ".2f"),
        "test": _number(test, ".2f"),
        "test - dev": _number(test - dev, "+.2f"),
        "rule passed at": "never" if math.isinf(row["passed_rule_at"]) else _number(row["passed_rule_at"], ",.0f"),
    }


def _number(value: float, how: str) -> str:
    return MISSING if pd.isna(value) else format(value, how)
