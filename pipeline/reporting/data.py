"""What the models were trained and tested on."""

from collections.abc import Iterator

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._table import Table

COLUMNS = {
    "train": "train",
    "dev": "dev",
    "test": "test",
    "classes": "classes",
    "vocabulary": "vocabulary",
    "median": "median length",
    "p95": "95 % below",
    "longest": "longest",
    "max_length": "cut at",
}


class Data(Report):
    """Counts of examples, and lengths of texts in tokens before they are cut."""

    title = "Data"
    order = 85

    def make(self, comparison: Comparison) -> Iterator[Table]:
        frame, setting = comparison.frame, comparison.setting
        found = frame[frame.quantity.str.startswith("data_")]
        if found.empty:
            return
        wide = found.pivot(index="task", columns="quantity", values="value").rename(
            columns=lambda name: name.removeprefix("data_")
        )
        tasks = [task for task in setting.tasks if task in wide.index]
        values = wide.loc[tasks, list(COLUMNS)].reset_index()
        values.insert(1, "data", [setting.data[task].label for task in tasks])
        shown = pd.DataFrame(
            {
                "task": tasks,
                "data": [setting.data[task].label for task in tasks],
                **{heading: [f"{value:,.0f}" for value in values[name]] for name, heading in COLUMNS.items()},
            }
        )
        notes = [f"{task}: {note}" for task in tasks for note in setting.data[task].notes]
        yield Table(
            name="data",
            title="Numbers of examples, and lengths of texts in tokens before they are cut",
            values=values,
            shown=shown,
            caption=" ".join(notes),
            provenance=setting.caption(tasks),
        )
