"""What the stages of a profile have left, as DataFrames; and how it came about, as captions and status say."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.grid.cells import expand
from pipeline.grid.freshness import Freshness, summary_file
from pipeline.grid.params import Params
from pipeline.grid.results import CellResults, Fingerprint, Replaced, read_rows
from pipeline.host.files import read_json
from pipeline.host.text import counted
from pipeline.reporting._mechanisms import Mechanism
from pipeline.reporting._statistics import MARGIN, Scores
from schoenbat.lra.tasks import TASKS
from schoenbat.lra.training import Evaluation, Predictions

CELL = ["task", "attn", "dotf", "former", "seed"]
CELL_VALUES = [
    *("num_parameters", "state_bytes", "best_step", "dev_accuracy", "dev_loss", "test_accuracy", "test_loss"),
    "passed_baseline_at",
]
"""Infinity where the best baseline was never passed, NaN where there is none."""
CELL_SETTING = ["device", "torch", "git_revision"]
BENCH_TEXTS = ["attn", "dotf", "direction"]
BENCH_COUNTS = ["num_features", "length"]
BENCH_VALUES = ["milliseconds", "peak_memory_mb", "relative_error", "speedup_vs_sdpa", "spread"]
BENCH_SETTING = ["batch", "heads", "head_dim", "num_features", "threads", "repeats", "device", "torch", "git_revision"]
ERROR_VALUES = ["kernel_error", "kernel_spread", "output_error", "output_spread", "unexplained", "unexplained_spread"]
REPLACED_SETTING = ["device", "threads", "torch", "transformers", "git_revision"]
REPLACED_TIMED = ["device", "threads", "torch", "git_revision"]
ERROR_SETTING = ["tokens", "draws", "head_dim", "torch", "git_revision"]
BEYOND = 2.0
"""Standard errors by which dev accuracy must be above a baseline to have passed it."""
_NO_SCORES = Scores((), np.empty((0, 1)))


@dataclass(frozen=True)
class Results:
    """The results of a profile.

    Attributes:
        cells: one row per cell of the grid: CELL, with "" for no kernel; `id`; `state`, one of finished, missing and
            outdated; CELL_VALUES and CELL_SETTING, NaN until it is finished.
        curves: one row per evaluation: CELL and the columns of curves/SEED.csv.
        bench: one row per timing, with the columns of bench.csv; 0 features where a mechanism has none.
        errors: one row per estimate in a trained cell, with the columns of errors/GROUP.csv and the id as `cell`.
        replaced: of each cell of `trained.cells` that is up to date the values of its texts, and what they were made
            with.
        replaced_times: one row per timing of these, with the columns of bench-trained.csv.
        data: of each prepared task, the summary of its data.
        scores: by (task, mechanism), what a mechanism gets right.
        reference: the mechanism that the others are compared with.
        margin: points of accuracy within which two mechanisms count as equal.
    """

    params: Params
    cells: pd.DataFrame
    curves: pd.DataFrame
    bench: pd.DataFrame
    errors: pd.DataFrame
    replaced: Mapping[str, tuple[pd.DataFrame, Mapping[str, Any]]]
    replaced_times: pd.DataFrame
    data: Mapping[str, Mapping[str, Any]]
    scores: Mapping[tuple[str, Mechanism], Scores]
    reference: str
    margin: float

    @property
    def profile(self) -> str:
        return self.params.profile

    @property
    def tasks(self) -> list[str]:
        return self.params.grid.tasks

    @property
    def seeds(self) -> list[int]:
        return self.params.grid.seeds

    @property
    def num_finished(self) -> int:
        return int((self.cells.state == "finished").sum()) + len(self.replaced)

    @property
    def num_cells(self) -> int:
        return len(self.cells) + len(self.params.trained.cells)

    @property
    def is_check(self) -> bool:
        """Whether the profile shows that everything works, and no more."""
        return self.profile.startswith("quick") or (len(self.seeds) < 2 and not self.params.trained.cells)

    def scores_of(self, task: str, mechanism: Mechanism) -> Scores:
        """Return the scores of all seeds that are finished, which may be none."""
        return self.scores.get((task, mechanism), _NO_SCORES)

    def first_timings(self) -> pd.DataFrame:
        """Return the timings at the first of `bench.num_features` where there are several."""
        bench = self.bench
        firsts = bench.groupby("attn").num_features.transform("first")
        return bench[bench.num_features == firsts]

    def heading(self, task: str) -> str:
        """Return the task with the first two parts of its data's label, one of which names a subset."""
        label = self.data[task]["label"] if task in self.data else "no data"
        return f"{task}: {', '.join(label.split(', ')[:2])}"

    def caption(self, tasks: Sequence[str] | None = None) -> str:
        """Describe the circumstances of results on `tasks` (all of them by default) in one line."""
        tasks = self.tasks if tasks is None else tasks
        labels = {task: self.data[task]["label"] if task in self.data else "not available" for task in tasks}
        return self._described(
            {
                "data": ", ".join(f"{task} = {label}" for task, label in labels.items()),
                "seeds": ", ".join(map(str, self.seeds)),
                **{name: ", ".join(sorted(self.cells[name].dropna().unique())) or "none yet" for name in CELL_SETTING},
            }
        )

    def bench_caption(self) -> str:
        """Describe the circumstances of the timings in one line."""
        return self._described(_distinct(self.bench, BENCH_SETTING))

    def errors_caption(self) -> str:
        """Describe the circumstances of the errors of estimates in one line."""
        groups = set(self.errors.cell.str.rpartition("-")[0])
        missing = [group for group in self.params.errors.trained if group not in groups]
        note = f" Not trained yet, so left out: {', '.join(missing)}." if missing else ""
        return self._described(_distinct(self.errors, ERROR_SETTING)) + note

    def replaced_caption(self) -> str:
        """Describe the circumstances of replaced attentions in one line."""
        missing = [name for name in self.params.trained.cells if name not in self.replaced]
        note = f" Not measured, or out of date, so left out: {', '.join(missing)}." if missing else ""
        made = _distinct(pd.DataFrame([about for _, about in self.replaced.values()]), REPLACED_SETTING)
        timed = {f"{name} of times": text for name, text in _distinct(self.replaced_times, REPLACED_TIMED).items()}
        return self._described(made | (timed if len(self.replaced_times) else {})) + note

    def _described(self, circumstances: Mapping[str, str]) -> str:
        profile = f"Profile {self.profile}: {self.params.note}".rstrip(": .")
        parts = (f"{name.replace('_', ' ')}: {text}" for name, text in circumstances.items())
        return "; ".join([profile, *parts]) + "."

    def status(self) -> list[str]:
        """Return what the report covers and what is missing, as paragraphs of Markdown."""
        check = ["**This is a check, not a result.**"] if self.is_check else []
        finished = f"{self.num_finished} of {self.num_cells} cells are finished."
        return [self.params.note or "No note.", finished, *check, *self.gaps()]

    def gaps(self) -> list[str]:
        """Return what is missing and why, as sentences."""
        unavailable = [task for task in self.tasks if task not in self.data]
        sentences = [
            f"No prepared data, so no results, for {task}: "
            f"{TASKS.get(task).how_to_get or 'made by schoenbat-exp run --grid.'}"
            for task in unavailable
        ]
        without_data = tuple(f"{task}-" for task in unavailable)
        for state, title in (("missing", "Not finished"), ("outdated", "Left out because they are out of date")):
            named = [cell for cell in self.cells.id[self.cells.state == state] if not cell.startswith(without_data)]
            if named:
                sentences.append(f"{title}: {', '.join(named)}.")
        if self.scores and self.bench.empty:
            sentences.append("No benchmark.")
        return sentences


def collect(params: Params, root: Path, reference: str = "softmax", margin: float = MARGIN) -> Results:
    """Read the results of the cells of the grid, and what was measured beside them.

    Args:
        reference, margin: see `Results`.

    Raises:
        UserError: a file is damaged.
    """
    folder = root / "runs" / params.profile
    summaries = {task: root / summary_file(params.profile, task) for task in params.grid.tasks}
    data = {task: read_json(path) for task, path in summaries.items() if path.is_file()}
    freshness = Freshness(params.written)
    cells: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    predictions: dict[tuple[str, Mechanism], dict[int, Predictions]] = {}
    for cell in expand(params):
        mechanism = (cell.attn, cell.dotf or "", cell.former)
        axes = dict(zip(CELL, (cell.task, *mechanism, cell.seed), strict=True))
        row: dict[str, Any] = {**axes, "id": cell.id, "state": "missing"}
        cells.append(row)
        results = CellResults(params.profile, cell.id, root)
        metrics, test = results.metrics(), results.test()
        if metrics is None:
            continue
        wanted = (freshness.settings(cell), data.get(cell.task, {}).get("fingerprint"))
        if (metrics.fingerprint.settings, metrics.fingerprint.data) != wanted:
            row["state"] = "outdated"
            continue
        curve = results.curve()
        curves += [axes | evaluation for evaluation in curve]
        row |= vars(metrics) | row
        row |= {"dev_accuracy": metrics.best_dev_accuracy, "dev_loss": metrics.best_dev_loss}
        row["passed_baseline_at"] = _passed(curve, data[cell.task])
        row["device"] += f", {counted(metrics.threads, 'thread')}"
        found = results.predictions()
        if found is not None and test is not None and test.fingerprint == metrics.fingerprint:
            row |= {"state": "finished", "test_accuracy": test.accuracy, "test_loss": test.loss}
            predictions.setdefault((cell.task, mechanism), {})[cell.seed] = found
    cell_columns = [*CELL, "id", "state", *CELL_VALUES, *CELL_SETTING]
    curve_columns = [*CELL, *(field.name for field in dataclasses.fields(Evaluation))]
    bench = _read_table([folder / "bench.csv"], [*BENCH_TEXTS, *BENCH_SETTING], BENCH_COUNTS, BENCH_VALUES)
    paths = [folder / "errors" / f"{group}.csv" for group in params.errors.trained]
    errors = _read_table(paths, ["points", "dotf", "estimator", *ERROR_SETTING], ["num_features"], ERROR_VALUES)
    times = [folder / "bench-trained.csv"]
    replaced = {}
    for name in params.trained.cells:
        if (found_texts := Replaced(params.profile, name, root).read()) is not None:
            rows, about = found_texts
            made, wanted_now = Fingerprint(**about["fingerprint"]), freshness.replaced(name)
            if wanted_now is not None and (made.settings, made.data) == (wanted_now.settings, wanted_now.data):
                replaced[name] = pd.DataFrame(rows), about
    return Results(
        params,
        cells=pd.DataFrame(cells, columns=cell_columns).astype(dict.fromkeys(CELL_VALUES, float)),
        curves=pd.DataFrame(curves, columns=curve_columns),
        bench=bench,
        replaced=replaced,
        replaced_times=_read_table(times, ["cell", *REPLACED_TIMED], ["length"], ["milliseconds", "spread", "of_sdpa"]),
        errors=errors.assign(cell=errors.points.str.removeprefix("trained ")),
        data=data,
        scores={key: Scores.of(by_seed) for key, by_seed in predictions.items()},
        reference=reference,
        margin=margin,
    )


def _passed(curve: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> float:
    """Return the first step at which dev accuracy is BEYOND standard errors above the best baseline."""
    bar, sizes = max(summary.get("baselines", {}).values(), default=None), summary["splits"]
    if bar is None or not curve:
        return float("nan")
    for evaluation in curve:
        reached = evaluation["dev_accuracy"]
        error = (reached * (1 - reached) / sizes["dev"] + bar * (1 - bar) / sizes["test"]) ** 0.5
        if reached - bar > BEYOND * error:
            return evaluation["step"]
    return float("inf")


def _read_table(paths: Iterable[Path], texts: list[str], counts: list[str], values: list[str]) -> pd.DataFrame:
    """Return the rows of all files that are there; a count that is empty is 0."""
    rows = [row for path in paths if path.is_file() for row in read_rows(path, [*counts, *values])]
    table = pd.DataFrame(rows, columns=list(dict.fromkeys([*texts, *counts, *values])))
    return table.fillna(dict.fromkeys(counts, 0)).astype(dict.fromkeys(counts, int))


def _distinct(frame: pd.DataFrame, names: Iterable[str]) -> dict[str, str]:
    """Return the values of columns in order of appearance, without those that say nothing."""
    return {name: ", ".join(str(value) for value in frame[name].unique() if value) for name in names}
