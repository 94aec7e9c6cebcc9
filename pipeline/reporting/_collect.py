"""Read what the stages of a profile have left, as one tidy frame and the setting in which it came about."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline.files import read_json
from pipeline.grid.cells import Cell, expand
from pipeline.grid.freshness import Freshness, summary_file
from pipeline.grid.params import Params, cell_training
from pipeline.reporting._statistics import MARGIN, Scores
from pipeline.results import CellResults, read_rows
from schoenbat.lra.tasks import TASKS
from schoenbat.lra.training import Predictions

if TYPE_CHECKING:
    from pipeline.reporting._comparison import Comparison

Mechanism = tuple[str, str, str]
"""attn, dotf ("" for none) and former."""

TEXT_KEYS = ("task", "attn", "dotf", "former", "direction", "quantity")
NUMBER_KEYS = ("seed", "step", "length", "num_features", "threads")
KEYS = (*TEXT_KEYS, *NUMBER_KEYS)
"""Columns of the frame before `value`. A key that does not apply is "" or 0.

Quantities by where they come from:

- every cell of the grid, NaN until it is finished: `test_accuracy` and `test_loss` (test.json); `dev_accuracy`,
  `dev_loss`, `best_step`, `num_parameters` (metrics.json)
- every evaluation: `curve_*` for the columns of curves.csv
- every prepared task: `data_*` for counts and lengths of its summary; `rule_accuracy`, of each rule that needs no
  model, whose name is the direction
- every timing: `bench_*` for the numeric columns of bench.csv
- every estimate of a kernel in a trained cell: `error_*` for the numeric columns of errors/GROUP.csv, with the name of
  the estimator as attn and the cell as direction
"""

BENCH_VALUES = ("milliseconds", "spread", "peak_memory_mb", "relative_error", "speedup_vs_sdpa")
ERROR_VALUES = (
    "kernel_error",
    "kernel_spread",
    "output_error",
    "output_spread",
    "unexplained",
    "unexplained_spread",
)
ERROR_SETTING = ("tokens", "draws", "head_dim", "torch", "git_revision")
BENCH_SETTING = ("batch", "heads", "head_dim", "num_features", "threads", "repeats", "device", "torch", "git_revision")


@dataclass
class Setting:
    """How the results came about: what captions and the status of the report are made of.

    Attributes:
        training: the options of model and training, by task.
        own_steps: by task, the steps of those whose section says other ones than their task.
        reference: the mechanism that the others are compared with.
        margin: points of accuracy within which two count as equal.
        scores: what each mechanism (attn, dotf, former) gets right on each task, by (task, mechanism).
        comparison: see `pipeline.reporting._comparison.compared`.
    """

    profile: str
    note: str
    seeds: list[int]
    tasks: list[str]
    steps: dict[str, int]
    max_lengths: dict[str, int]
    num_cells: int
    labels: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)
    data_notes: dict[str, list[str]] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)
    revisions: set[str] = field(default_factory=set)
    torch: set[str] = field(default_factory=set)
    bench: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    errors_missing: list[str] = field(default_factory=list)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    own_steps: dict[str, dict[str, int]] = field(default_factory=dict)
    reference: str = "softmax"
    margin: float = MARGIN
    scores: dict[tuple[str, Mechanism], Scores] = field(default_factory=dict)
    comparison: "Comparison | None" = None

    @property
    def num_finished(self) -> int:
        return self.num_cells - len(self.missing) - len(self.outdated)

    @property
    def is_check(self) -> bool:
        """Whether the profile shows that everything works, and no more."""
        return self.profile.startswith("quick") or len(self.seeds) < 2

    def heading(self, task: str) -> str:
        """The task with the first two parts of its data's label, one of which names a subset; captions have all."""
        return f"{task}: {', '.join(self.labels.get(task, 'no data').split(', ')[:2])}"

    def caption(self, tasks: list[str] | None = None) -> str:
        """The circumstances of results on `tasks` (all of them by default), as one line."""
        tasks = self.tasks if tasks is None else tasks
        parts = [
            f"Profile {self.profile}: {self.note}".rstrip(": ."),
            "data: " + ", ".join(f"{task} = {self.labels.get(task, 'not available')}" for task in tasks),
            "steps: " + ", ".join(map(self._described_steps, tasks)),
            "seeds: " + ", ".join(map(str, self.seeds)),
            f"device: {', '.join(sorted(self.devices)) or 'none yet'}",
            f"git revision: {', '.join(sorted(self.revisions)) or 'none yet'}",
        ]
        return "; ".join(parts) + "."

    def _described_steps(self, task: str) -> str:
        own = "; ".join(f"{name} {steps:,}" for name, steps in self.own_steps.get(task, {}).items())
        return f"{task} {self.steps[task]:,}" + (f" ({own})" if own else "")

    def bench_caption(self) -> str:
        """The circumstances of the timings, as one line."""
        return self._described(self.bench)

    def errors_caption(self) -> str:
        """The circumstances of the errors, as one line."""
        missing = f" Not trained yet, so left out: {', '.join(self.errors_missing)}." if self.errors_missing else ""
        return self._described(self.errors) + missing

    def _described(self, values: dict[str, list[str]]) -> str:
        described = "; ".join(f"{name.replace('_', ' ')}: {', '.join(found)}" for name, found in values.items())
        return f"Profile {self.profile}: {self.note}".rstrip(": .") + f"; {described}."

    def status(self) -> list[str]:
        """What the report covers and what is missing, as paragraphs of Markdown."""
        paragraphs = [
            self.note or "No note.",
            f"{self.num_finished} of {self.num_cells} cells are finished.",
        ]
        if self.is_check:
            paragraphs.append("**This is a check, not a result.**")
        return [*paragraphs, *self.gaps()]

    def gaps(self) -> list[str]:
        """What is missing and why, as sentences; none if nothing is."""
        sentences = [
            f"No prepared data, so no results, for {task}: {how or 'made by schoenbat-exp run --grid.'}"
            for task, how in self.unavailable.items()
        ]
        for title, cells in (("Not finished", self.missing), ("Left out because they are out of date", self.outdated)):
            cells = [cell for cell in cells if not any(cell.startswith(f"{task}-") for task in self.unavailable)]
            if cells:
                sentences.append(f"{title}: {', '.join(cells)}.")
        if self.num_finished and not self.bench:
            sentences.append("No benchmark.")
        return sentences


def collect(
    profile: str, params: Params, root: Path, reference: str = "softmax", margin: float = MARGIN
) -> tuple[pd.DataFrame, Setting]:
    """All observations on the cells of the grid, and their setting.

    Args:
        reference, margin: see `Setting`.
    """
    cells = expand(params)
    setting = Setting(
        profile=profile,
        note=params.note,
        seeds=params.grid.seeds,
        tasks=params.grid.tasks,
        steps={task: params.task[task].training.steps for task in params.grid.tasks},
        max_lengths={task: params.task[task].data.max_length for task in params.grid.tasks},
        num_cells=len(cells),
        training={
            task: dataclasses.asdict(params.task[task].model) | dataclasses.asdict(params.task[task].training)
            for task in params.grid.tasks
        },
        own_steps={task: _own_steps(task, cells, params) for task in params.grid.tasks},
        reference=reference,
        margin=margin,
    )
    rows: list[dict[str, Any]] = []
    fingerprints: dict[str, str] = {}
    for task in params.grid.tasks:
        path = root / summary_file(profile, task)
        if path.is_file():
            summary = read_json(path)
            fingerprints[task] = summary["fingerprint"]
            setting.labels[task] = summary["label"]
            setting.data_notes[task] = summary["notes"]
            rows += _data_rows(task, summary)
        else:
            setting.unavailable[task] = TASKS.get(task).how_to_get
    freshness = Freshness(params.written)
    predictions: dict[tuple[str, Mechanism], dict[int, Predictions]] = {}
    for cell in cells:
        wanted = (freshness.settings(cell), fingerprints.get(cell.task))
        results = CellResults(profile, cell.id, root)
        rows += _cell_rows(cell, results, wanted, setting)
        if cell.id not in (*setting.missing[-1:], *setting.outdated[-1:]):
            found = results.predictions()
            assert found is not None
            mechanism = (cell.attn, cell.dotf or "", cell.former)
            predictions.setdefault((cell.task, mechanism), {})[cell.seed] = found
    setting.scores = {key: Scores.of(by_seed) for key, by_seed in predictions.items()}
    rows += _bench_rows(root / "runs" / profile / "bench.csv", params, setting)
    rows += _error_rows(root / "runs" / profile / "errors", params, setting)
    empty = dict.fromkeys(TEXT_KEYS, "") | dict.fromkeys(NUMBER_KEYS, 0)
    frame = pd.DataFrame([empty | row for row in rows], columns=[*KEYS, "value"])
    return frame.astype({"value": float}), setting


def _own_steps(task: str, cells: list[Cell], params: Params) -> dict[str, int]:
    """The steps of each mechanism and former that has others than the task, by name."""
    usual = params.task[task].training.steps
    found = {
        " ".join(filter(None, (cell.attn, cell.dotf, cell.former))): cell_training(params, cell).steps
        for cell in cells
        if cell.task == task
    }
    return {name: steps for name, steps in found.items() if steps != usual}


def _data_rows(task: str, summary: dict[str, Any]) -> list[dict[str, Any]]:
    values = {
        **summary["splits"],
        "classes": summary["num_classes"],
        "vocabulary": summary["vocab_size"],
        "max_length": summary["max_length"],
        **summary["lengths"],
    }
    names = {"max": "longest"}
    counts = [
        {"task": task, "quantity": f"data_{names.get(name, name)}", "value": value} for name, value in values.items()
    ]
    rules = summary.get("baselines", {})
    return counts + [
        {"task": task, "direction": rule, "quantity": "rule_accuracy", "value": value} for rule, value in rules.items()
    ]


def _cell_rows(
    cell: Cell, results: CellResults, wanted: tuple[str, str | None], setting: Setting
) -> list[dict[str, Any]]:
    """Observations on one cell; notes in `setting` where it stands."""
    key = dataclasses.asdict(cell) | {"dotf": cell.dotf or ""}
    names = ("test_accuracy", "test_loss", "dev_accuracy", "dev_loss", "best_step", "num_parameters", "state_bytes")
    values = dict.fromkeys(names, float("nan"))
    rows = []
    metrics, test = results.metrics(), results.test()
    current = metrics is not None and (metrics.fingerprint.settings, metrics.fingerprint.data) == wanted
    if metrics is not None and current:
        values |= {
            "dev_accuracy": metrics.best_dev_accuracy,
            "dev_loss": metrics.best_dev_loss,
            "best_step": metrics.best_step,
            "num_parameters": metrics.num_parameters,
            "state_bytes": float("nan") if metrics.state_bytes is None else metrics.state_bytes,
        }
        rows += [
            {**key, "step": int(row["step"]), "quantity": f"curve_{name}", "value": value}
            for row in results.curve()
            for name, value in row.items()
            if name != "step"
        ]
        setting.devices.add(f"{metrics.device}, {metrics.threads} thread{'s' if metrics.threads > 1 else ''}")
        setting.revisions.add(metrics.git_revision)
        setting.torch.add(metrics.torch)
    tested = test is not None and metrics is not None and test.fingerprint == metrics.fingerprint
    if test is not None and current and tested and results.has_predictions():
        values |= {"test_accuracy": test.accuracy, "test_loss": test.loss}
    elif metrics is not None and not current:
        setting.outdated.append(cell.id)
    else:
        setting.missing.append(cell.id)
    return [*rows, *({**key, "quantity": name, "value": value} for name, value in values.items())]


def _bench_rows(path: Path, params: Params, setting: Setting) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    timings = read_rows(path, ("length", *BENCH_VALUES))
    for name in BENCH_SETTING:
        setting.bench[name] = list(dict.fromkeys(timing[name] for timing in timings if timing[name]))
    return [
        {
            "attn": timing["attn"],
            "dotf": timing["dotf"],
            "direction": timing["direction"],
            "length": int(timing["length"]),
            "num_features": int(timing["num_features"] or 0),
            "threads": int(timing["threads"]),
            "quantity": f"bench_{name}",
            "value": timing[name],
        }
        for timing in timings
        for name in BENCH_VALUES
    ]


def _error_rows(folder: Path, params: Params, setting: Setting) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for group in params.errors.trained:
        path = folder / f"{group}.csv"
        if path.is_file():
            found += read_rows(path, ERROR_VALUES)
        else:
            setting.errors_missing.append(group)
    for name in ERROR_SETTING:
        setting.errors[name] = list(dict.fromkeys(row[name] for row in found))
    return [
        {
            "attn": row["estimator"],
            "dotf": row["dotf"],
            "num_features": int(row["num_features"]),
            "direction": row["points"].removeprefix("trained "),
            "quantity": f"error_{name}",
            "value": row[name],
        }
        for row in found
        for name in ERROR_VALUES
    ]
