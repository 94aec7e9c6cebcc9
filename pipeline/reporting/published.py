"""Accuracies that others have published on these tasks, kept apart from ours and from each other.

published.csv has what other papers and repositories report, in percent on test, and published_sources.csv where each
source is found, its protocol, and its known faults. Rows of different sources are not to be compared: protocols differ.

The first table is that of Chen, Zeng, Ji and Yang, "Skyformer: Remodel Self-Attention with Gaussian Kernel and Nyström
Method", NeurIPS 2021, Tables 1 and 2. The table of the SchoenbAt paper (arXiv 2505.12252) was not at hand: its row is
empty.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._table import MISSING, Table

COLUMNS = ("Text", "ListOps", "Retrieval", "Pathfinder", "Image", "mean", "Text: hours", "Text: GB")
PUBLISHED: dict[str, tuple[float, ...]] = {
    "Self-attention": (61.95, 38.37, 80.69, 65.26, 40.57, 57.37, 4.30, 10.37),
    "Kernelized attention (Gaussian)": (60.22, 38.78, 81.77, 70.73, 41.29, 58.56, 3.91, 5.73),
    "Nyströmformer": (64.83, 38.51, 80.52, 69.48, 41.30, 58.93, 0.71, 1.21),
    "Linformer": (58.93, 37.45, 78.19, 60.93, 37.96, 54.69, 0.65, 0.99),
    "Informer": (62.64, 32.53, 77.57, 57.83, 38.10, 53.73, 1.60, 5.12),
    "Performer": (64.19, 38.02, 80.04, 66.30, 41.43, 58.00, 0.77, 1.09),
    "Reformer": (62.93, 37.68, 78.99, 66.49, 48.87, 58.99, 0.94, 1.61),
    "BigBird": (63.86, 39.25, 80.28, 68.72, 43.16, 59.05, 2.00, 2.83),
    "Skyformer": (64.70, 38.69, 82.06, 70.73, 40.77, 59.39, 1.02, 1.59),
    "SchoenbAt": (float("nan"),) * len(COLUMNS),
}
STEPS = 50_000
MAX_LENGTHS = {"lra-text": 4000, "lra-listops": 2000, "lra-retrieval": 4000, "lra-image": 1024, "lra-pathfinder": 1024}


TASKS = ("ListOps", "Text", "Retrieval", "Image", "Pathfinder")
_FOLDER = Path(__file__).parent


def published_accuracies() -> pd.DataFrame:
    """One row per source and mechanism: accuracy of each of TASKS in percent, and "TASK std" where it is reported."""
    return pd.read_csv(_FOLDER / "published.csv")


def published_sources() -> pd.DataFrame:
    """One row per source of `published_accuracies`: citation, protocol, faults."""
    return pd.read_csv(_FOLDER / "published_sources.csv")


class Published(Report):
    """Tables of their own; the first also says in which respects this profile differs from its set-up."""

    title = "Published accuracies, for orientation"
    order = 70

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Table]:
        values = pd.DataFrame.from_dict(PUBLISHED, orient="index", columns=list(COLUMNS))
        values = values.rename_axis("model").reset_index()
        shown = values.astype(object)
        for column in COLUMNS:
            shown[column] = [MISSING if pd.isna(value) else f"{value:.2f}" for value in values[column]]
        differences = [text for task in setting.tasks for text in _differences(task, setting)]
        ours = f"The profile {setting.profile} differs: {'; '.join(differences)}. " if differences else ""
        yield Table(
            name="published",
            title="Not our results: test accuracy in percent as published with Skyformer (NeurIPS 2021)",
            values=values,
            shown=shown,
            caption="Tables 1 and 2 there: means of three seeds, 50,000 steps, 128 features, one V100. The figures of "
            f"the SchoenbAt paper are not included. {ours}Where the data or the set-up differs, the figures are not "
            "comparable with ours.",
        )
        yield _by_source()


def _by_source() -> Table:
    values = published_accuracies()
    shown = values[["source", "mechanism"]].astype(object)
    for task in TASKS:
        pairs = zip(values[task], values[f"{task} std"], strict=True)
        shown[f"{task} (published)"] = [
            f"{mean:.2f}" if pd.isna(std) else f"{mean:.2f} ± {std:.2f}" for mean, std in pairs
        ]
    notes = [
        f"{row['source']}: {row['citation']}. Protocol: {row['protocol']}. Known faults: {row['faults'].rstrip('.')}."
        for row in published_sources().to_dict("records")
    ]
    return Table(
        name="published-by-source",
        title="Not our results: test accuracy in percent as published elsewhere, by source",
        values=values,
        shown=shown,
        caption="To be compared within a source only. ± is a standard deviation over seeds.",
        provenance=" ".join(notes),
    )


def _differences(task: str, setting: Setting) -> Iterator[str]:
    if setting.steps[task] != STEPS:
        yield f"{task}: {setting.steps[task]:,} steps"
    if task in MAX_LENGTHS and setting.max_lengths[task] < MAX_LENGTHS[task]:
        yield f"{task}: cut at {setting.max_lengths[task]:,} tokens instead of {MAX_LENGTHS[task]:,}"
    if task in setting.labels:
        yield f"{task}: the data is {setting.labels[task]}"
