"""With what the results were made, on which data, and how to make them again."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._table import MISSING, Table, Text


class Setup(Report):
    """The data, model and training of each task, the environment, and the command."""

    title = "Set-up, and how to reproduce it"
    order = 95

    def make(self, comparison: Comparison) -> Iterator[Text | Table]:
        results = comparison.results
        command = f"To make it again: schoenbat-exp use {results.profile} && schoenbat-exp run --grid"
        files = f"All tables are computed from the files in runs/{results.profile}; tables/cells.csv has every cell."
        yield Text("", (command, files))
        if results.cells.empty:
            return
        options = {}
        for task in results.tasks:
            data, section = results.data.get(task), results.params.task[task]
            options[task] = (_of_data(data) if data else {}) | asdict(section.model) | asdict(section.training)
        values = pd.DataFrame.from_dict(options, orient="index", dtype=object)
        shown = values.fillna(MISSING).map(lambda value: f"{value:,}" if isinstance(value, int) else str(value))
        shown = shown.T.rename(index=lambda name: name.replace("_", " "))
        notes = " ".join(f"{task}: {note}" for task, data in results.data.items() for note in data["notes"])
        yield Table(
            name="setup",
            title="Data, model and training of each task",
            values=values.infer_objects().rename_axis("task").reset_index(),
            shown=shown.rename_axis("option").reset_index(),
            caption="Lengths are tokens, before texts are cut at max length. The section of a mechanism may replace "
            "options of training. At one seed all mechanisms start from the same weights and see the same batches. "
            f"{notes}".strip(),
            provenance=results.caption(),
        )


def _of_data(summary: Any) -> dict[str, Any]:
    lengths = {f"{name}_length": summary["lengths"][key] for name, key in (("median", "median"), ("longest", "max"))}
    counts = {
        "classes": summary["num_classes"],
        "vocabulary": summary["vocab_size"],
        "max_length": summary["max_length"],
    }
    return {"data": summary["label"], **summary["splits"], **counts, **lengths}
