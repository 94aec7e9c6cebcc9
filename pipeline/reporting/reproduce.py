"""With what the results were made, and how to make them again."""

from collections.abc import Iterator

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._table import MISSING, Table, Text


class Setup(Report):
    """The set-up of each task, the environment, and the command."""

    title = "Set-up, and how to reproduce it"
    order = 95

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Text | Table]:
        yield Text(
            "",
            (
                f"Seeds: {', '.join(map(str, setting.seeds)) or 'none'}. At one seed all mechanisms start from the "
                "same weights and see the same batches.",
                f"Code: git revision {', '.join(sorted(setting.revisions)) or 'none yet'}.",
                f"Device: {', '.join(sorted(setting.devices)) or 'none yet'}; "
                f"torch {', '.join(sorted(setting.torch)) or 'none yet'}.",
                f"To make it again: schoenbat-exp use {setting.profile} && schoenbat-exp run --grid",
                f"All tables are computed from the files in runs/{setting.profile}.",
            ),
        )
        names = dict.fromkeys(name for options in setting.training.values() for name in options)
        if setting.training:
            shown = [
                {"option": name.replace("_", " ")}
                | {task: _text(options.get(name)) for task, options in setting.training.items()}
                for name in names
            ]
            yield Table(
                name="setup",
                title="Model and training of each task",
                values=pd.DataFrame([{"task": task, **options} for task, options in setting.training.items()]),
                shown=pd.DataFrame(shown),
                caption="The section of a mechanism may replace options of training.",
                provenance=setting.caption(),
            )


def _text(value: object) -> str:
    if value is None:
        return MISSING
    return f"{value:,}" if isinstance(value, int) else str(value)
