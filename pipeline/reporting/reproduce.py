"""With what the results were made, and how to make them again."""

from collections.abc import Iterator
from dataclasses import asdict

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._table import MISSING, Table, Text


class Setup(Report):
    """The set-up of each task, the environment, and the command."""

    title = "Set-up, and how to reproduce it"
    order = 95

    def make(self, comparison: Comparison) -> Iterator[Text | Table]:
        setting = comparison.setting
        yield Text(
            "",
            (
                f"Seeds: {', '.join(map(str, setting.seeds)) or 'none'}. At one seed all mechanisms start from the "
                "same weights and see the same batches.",
                f"Code: git revision {', '.join(setting.cells.revisions) or 'none yet'}.",
                f"Device: {', '.join(setting.cells.devices) or 'none yet'}; "
                f"torch {', '.join(setting.cells.torch) or 'none yet'}.",
                f"To make it again: schoenbat-exp use {setting.profile} && schoenbat-exp run --grid",
                f"All tables are computed from the files in runs/{setting.profile}.",
            ),
        )
        sections = {task: setting.params.task[task] for task in setting.tasks}
        written = {task: asdict(found.model) | asdict(found.training) for task, found in sections.items()}
        names = dict.fromkeys(name for options in written.values() for name in options)
        if written:
            shown = [
                {"option": name.replace("_", " ")}
                | {task: _text(options.get(name)) for task, options in written.items()}
                for name in names
            ]
            yield Table(
                name="setup",
                title="Model and training of each task",
                values=pd.DataFrame([{"task": task, **options} for task, options in written.items()]),
                shown=pd.DataFrame(shown),
                caption="The section of a mechanism may replace options of training.",
                provenance=setting.caption(),
            )


def _text(value: object) -> str:
    if value is None:
        return MISSING
    return f"{value:,}" if isinstance(value, int) else str(value)
