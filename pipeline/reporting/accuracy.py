"""Test accuracy of every mechanism on every task, over seeds."""

from collections.abc import Iterator

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._mechanisms import mechanisms, named, rows_of
from pipeline.reporting._output import MISSING, Table


class Accuracy(Report):
    """Mean ± sample standard deviation over seeds; a mean over tasks only where every task is there.

    Nothing is set in bold: with a handful of seeds the largest mean is seldom beyond the spread.
    """

    title = "Test accuracy"

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Table]:
        found = frame[frame.quantity == "test_accuracy"]
        values, shown = [], []
        for mechanism in mechanisms(frame):
            numbers: dict[str, float] = {}
            texts = {}
            means = []
            for task in setting.tasks:
                scores = 100 * rows_of(found, mechanism).query("task == @task").value.dropna()
                numbers |= {f"{task} mean": scores.mean(), f"{task} std": scores.std(ddof=1), f"{task} n": len(scores)}
                texts[setting.heading(task)] = _show(scores, planned=len(setting.seeds))
                means.append(scores.mean())
            overall = sum(means) / len(means) if setting.tasks else float("nan")
            values.append(named(mechanism) | numbers | {"mean over tasks": overall})
            shown.append(named(mechanism) | texts | {"mean over tasks": _number(overall)})
        if not shown:
            return
        spread = "mean ± sample standard deviation over seeds" if len(setting.seeds) > 1 else "one seed, so no spread"
        yield Table(
            name="accuracy",
            title=f"Test accuracy in percent ({spread}; number of finished seeds in parentheses)",
            values=pd.DataFrame(values),
            shown=pd.DataFrame(shown),
            caption=setting.caption(),
        )


def _show(scores: pd.Series, planned: int) -> str:
    if scores.empty:
        return MISSING
    spread = f" ± {scores.std(ddof=1):.2f}" if len(scores) > 1 else ""
    count = str(len(scores)) if len(scores) == planned else f"{len(scores)} of {planned}"
    return f"{scores.mean():.2f}{spread} ({count})"


def _number(value: float) -> str:
    return MISSING if pd.isna(value) else f"{value:.2f}"
