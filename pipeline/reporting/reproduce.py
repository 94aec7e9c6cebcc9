"""With what the results were made, and how to make them again."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._table import MISSING, Table, Text


class Setup(Report):
    """The set-up of each task, the environment, and the command."""

    title = "Set-up, and how to reproduce it"
    order = 95

    def make(self, comparison: Comparison) -> Iterator[Text | Table]:
        results = comparison.results
        of_cells = (
            f"Seeds: {', '.join(map(str, results.seeds)) or 'none'}. At one seed all mechanisms start from the "
            "same weights and see the same batches.",
            f"Code: git revision {results.made_with('git_revision')}.",
            f"Device: {results.made_with('device')}; torch {results.made_with('torch')}.",
        )
        yield Text(
            "",
            (
                *(() if results.cells.empty else of_cells),
                f"To make it again: schoenbat-exp use {results.profile} && schoenbat-exp run --grid",
                f"All tables are computed from the files in runs/{results.profile}.",
            ),
        )
        if results.cells.empty:
            return
        sections = {task: results.params.task[task] for task in results.tasks}
        options = {task: asdict(section.model) | asdict(section.training) for task, section in sections.items()}
        values = pd.DataFrame.from_dict(options, orient="index", dtype=object)
        shown = values.map(_text).T.rename(index=lambda name: name.replace("_", " "))
        yield Table(
            name="setup",
            title="Model and training of each task",
            values=values.infer_objects().rename_axis("task").reset_index(),
            shown=shown.rename_axis("option").reset_index(),
            caption="The section of a mechanism may replace options of training.",
            provenance=results.caption(),
        )


def _text(value: Any) -> str:
    if pd.isna(value):
        return MISSING
    return f"{value:,}" if isinstance(value, int) else str(value)
