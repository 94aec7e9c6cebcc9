"""Read what the stages of a profile have left, as one tidy frame and the setting in which it came about."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.grid.cells import Cell, expand
from pipeline.grid.freshness import Freshness, summary_file
from pipeline.grid.params import Params
from pipeline.grid.results import CellResults, Metrics, read_rows
from pipeline.host.files import read_json
from pipeline.reporting._mechanisms import Mechanism
from pipeline.reporting._setting import Cells, Measured, Setting, TaskData
from pipeline.reporting._statistics import MARGIN, Scores
from schoenbat.lra.training import Predictions

TEXT_KEYS = ("task", "attn", "dotf", "former", "direction", "quantity")
NUMBER_KEYS = ("seed", "step", "length", "num_features", "threads")
KEYS = (*TEXT_KEYS, *NUMBER_KEYS)
"""Columns of the frame before `value`. A key that does not apply is "" or 0.

Quantities by where they come from:

- every cell of the grid, NaN until it is finished: `test_accuracy` and `test_loss` (test.json); `dev_accuracy`,
  `dev_loss`, `best_step`, `num_parameters`, `state_bytes` (metrics.json)
- every evaluation: `curve_*` for the columns of curves.csv
- every prepared task: `data_*` for counts and lengths of its summary; `baseline_accuracy` of each baseline, which needs
  no model and whose name is the direction
- every timing: `bench_*` for the numeric columns of bench.csv
- every estimate of a kernel in a trained cell: `error_*` for the numeric columns of errors/GROUP.csv, with the name of
  the estimator as attn and the cell as direction
"""

CELL_VALUES = ("test_accuracy", "test_loss", "dev_accuracy", "dev_loss", "best_step", "num_parameters", "state_bytes")
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

Rows = list[dict[str, Any]]


def collect(
    profile: str, params: Params, root: Path, reference: str = "softmax", margin: float = MARGIN
) -> tuple[pd.DataFrame, Setting]:
    """Return all observations on the cells of the grid, and their setting.

    Args:
        reference, margin: see `Setting`.
    """
    summaries = {
        task: read_json(path) for task in params.grid.tasks if (path := root / summary_file(profile, task)).is_file()
    }
    rows = [row for task, summary in summaries.items() for row in _data_rows(task, summary)]
    cells, scores = _read_cells(params, root, summaries, rows)
    setting = Setting(
        params=params,
        cells=cells,
        data={task: TaskData(summary["label"], summary["notes"]) for task, summary in summaries.items()},
        scores=scores,
        bench=_read_bench(root / "runs" / profile / "bench.csv", rows),
        errors=_read_errors(root / "runs" / profile / "errors", params.errors.trained, rows),
        reference=reference,
        margin=margin,
    )
    empty = dict.fromkeys(TEXT_KEYS, "") | dict.fromkeys(NUMBER_KEYS, 0)
    frame = pd.DataFrame([empty | row for row in rows], columns=[*KEYS, "value"])
    return frame.astype({"value": float}), setting


def _data_rows(task: str, summary: dict[str, Any]) -> Rows:
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
    return counts + [
        {"task": task, "direction": name, "quantity": "baseline_accuracy", "value": value}
        for name, value in summary.get("baselines", {}).items()
    ]


def _read_cells(
    params: Params, root: Path, summaries: dict[str, Any], rows: Rows
) -> tuple[Cells, dict[tuple[str, Mechanism], Scores]]:
    """Add the observations on all cells to `rows`; return which have results, and what they get right."""
    planned, freshness = expand(params), Freshness(params.written)
    missing: list[str] = []
    outdated: list[str] = []
    current: list[Metrics] = []
    predictions: dict[tuple[str, Mechanism], dict[int, Predictions]] = {}
    for cell in planned:
        results = CellResults(params.profile, cell.id, root)
        metrics, test = results.metrics(), results.test()
        values = dict.fromkeys(CELL_VALUES, float("nan"))
        wanted = (freshness.settings(cell), summaries.get(cell.task, {}).get("fingerprint"))
        is_current = metrics is not None and (metrics.fingerprint.settings, metrics.fingerprint.data) == wanted
        if metrics is not None and is_current:
            current.append(metrics)
            values |= _training_values(metrics)
            rows += _curve_rows(cell, results)
        tested = test is not None and metrics is not None and test.fingerprint == metrics.fingerprint
        if test is not None and is_current and tested and (found := results.predictions()) is not None:
            values |= {"test_accuracy": test.accuracy, "test_loss": test.loss}
            predictions.setdefault((cell.task, (cell.attn, cell.dotf or "", cell.former)), {})[cell.seed] = found
        else:
            (missing if metrics is None or is_current else outdated).append(cell.id)
        rows += [{**_key(cell), "quantity": name, "value": value} for name, value in values.items()]
    cells = Cells(
        planned,
        missing,
        outdated,
        devices=sorted({f"{m.device}, {m.threads} thread{'s' if m.threads > 1 else ''}" for m in current}),
        revisions=sorted({m.git_revision for m in current}),
        torch=sorted({m.torch for m in current}),
    )
    return cells, {key: Scores.of(by_seed) for key, by_seed in predictions.items()}


def _key(cell: Cell) -> dict[str, Any]:
    return dataclasses.asdict(cell) | {"dotf": cell.dotf or ""}


def _training_values(metrics: Metrics) -> dict[str, float]:
    return {
        "dev_accuracy": metrics.best_dev_accuracy,
        "dev_loss": metrics.best_dev_loss,
        "best_step": metrics.best_step,
        "num_parameters": metrics.num_parameters,
        "state_bytes": float("nan") if metrics.state_bytes is None else metrics.state_bytes,
    }


def _curve_rows(cell: Cell, results: CellResults) -> Rows:
    return [
        {**_key(cell), "step": int(row["step"]), "quantity": f"curve_{name}", "value": value}
        for row in results.curve()
        for name, value in row.items()
        if name != "step"
    ]


def _read_bench(path: Path, rows: Rows) -> Measured:
    """Add the timings to `rows`; return their circumstances."""
    timings = read_rows(path, ("length", *BENCH_VALUES)) if path.is_file() else []
    rows += [
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
    return Measured(_distinct(timings, BENCH_SETTING))


def _read_errors(folder: Path, trained: Sequence[str], rows: Rows) -> Measured:
    """Add the errors of estimates in trained cells to `rows`; return their circumstances."""
    paths = {group: folder / f"{group}.csv" for group in trained}
    found = [row for path in paths.values() if path.is_file() for row in read_rows(path, ERROR_VALUES)]
    rows += [
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
    return Measured(_distinct(found, ERROR_SETTING), [cell for cell, path in paths.items() if not path.is_file()])


def _distinct(rows: Rows, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each column, in order of appearance; nothing where there are no rows."""
    return {name: list(dict.fromkeys(row[name] for row in rows if row[name])) for name in names} if rows else {}
