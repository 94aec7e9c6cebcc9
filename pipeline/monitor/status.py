"""Where the grid of params.yaml stands, from files alone: the engine's state, the cells' progress, logs and results.

It imports neither torch nor mlflow nor dvc, so that asking costs nothing, and it works while cells run.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.grid.axes import Cell, read_cells
from pipeline.grid.checked import ensure_checked
from pipeline.grid.freshness import Freshness
from pipeline.grid.results import CellResults
from pipeline.grid.settings import PARAMS_FILE, read_yaml
from pipeline.host.files import peek
from pipeline.host.heartbeat import EXPIRY_SECONDS, TOUCH_SECONDS

STATE_FILE = "grid.json"
"""In logs/PROFILE, written by the engine."""


@dataclass(frozen=True)
class Row:
    """One cell.

    Attributes:
        state: "done", "to run", "queued", "waiting" (for Slurm), "running", "failed", "unavailable", "skipped",
            "interrupted".
        reason: why it failed, or what is to be known.
        log: the file with its output, if it has any.
        progress: what the cell itself says: step, steps, loss, accuracy, dev_accuracy, steps_per_second, memory_mb.
        attempt: how often it was started in this grid.
        device: where it runs.
        seconds_left: estimated; None if nothing is known yet.
    """

    cell: str
    state: str
    reason: str = ""
    log: str = ""
    progress: Mapping[str, Any] | None = None
    attempt: int = 1
    device: str = ""
    seconds_left: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """All cells, and the jobs of the running grid that are no cells.

    Attributes:
        running: whether a grid is running now.
        seconds_left: of the running grid, estimated.
    """

    profile: str
    running: bool
    cells: list[Row]
    others: list[Row]
    seconds_left: float | None = None


def read_grid() -> tuple[str, list[Cell], dict[str, Any]]:
    """Return profile, cells and content of params.yaml; raises UserError."""
    ensure_checked()
    settings = read_yaml(PARAMS_FILE)
    return settings["profile"], read_cells(settings), settings


def take_snapshot() -> Snapshot:
    """Return the state of every cell of params.yaml."""
    profile, cells, settings = read_grid()
    state = peek(Path("logs", profile, STATE_FILE)) or {}
    running = "heartbeat" in state and _is_alive(Path(state["heartbeat"]))
    jobs: Mapping[str, Mapping[str, Any]] = state["jobs"] if running else {}
    freshness = Freshness(settings)
    rows = [
        job_row(profile, cell.id, jobs[cell.id])
        if cell.id in jobs
        else Row(cell.id, "done")
        if freshness.is_finished(cell)
        else _idle_row(profile, cell)
        for cell in cells
    ]
    for name in freshness.replacing:
        idle = Row(name, "done") if freshness.is_replaced(name) else _failed_row(profile, name, name)
        rows.append(job_row(profile, name, jobs[name]) if name in jobs else idle or Row(name, "to run"))
    return assemble(profile, running, rows, jobs)


def assemble(profile: str, running: bool, rows: list[Row], jobs: Mapping[str, Mapping[str, Any]]) -> Snapshot:
    """Return a snapshot of cells and of the jobs that are no cells, with the time that is left."""
    known = {row.cell for row in rows}
    others = [job_row(profile, name, job) for name, job in jobs.items() if name not in known]
    return Snapshot(profile, running, rows, others, _seconds_left(jobs, [*rows, *others]) if running else None)


def job_row(profile: str, name: str, job: Mapping[str, Any]) -> Row:
    """Return what the engine and the cell say of a job of the running grid."""
    progress = peek(Path("checkpoints", profile, name, "progress.json")) if job["state"] == "running" else None
    if progress and progress.get("updated", 0.0) < job.get("since", 0.0):
        progress = None
    left = None
    if progress and progress.get("steps_per_second"):
        left = (progress["steps"] - progress["step"]) / progress["steps_per_second"]
    told = {name: job[name] for name in ("reason", "log", "attempt", "device") if name in job}
    return Row(name, job["state"], progress=progress, seconds_left=left, **told)


def _idle_row(profile: str, cell: Cell) -> Row:
    """Return the row of a cell that is not finished and that no grid is running."""
    for name in (cell.id, f"data-{cell.task}"):
        if failed := _failed_row(profile, cell.id, name):
            return failed
    if CellResults(profile, cell.id).checkpoint.is_file():
        return Row(cell.id, "interrupted", "goes on from its checkpoint")
    return Row(cell.id, "to run")


def _failed_row(profile: str, cell: str, job: str) -> Row | None:
    """Return the row of a cell for which a job failed; None where it did not."""
    outcome = peek(Path("logs", profile, f"{job}.outcome.json"))
    if not outcome or outcome["kind"] == "stopped":
        return None
    state = "unavailable" if outcome["kind"] == "unavailable" else "failed"
    return Row(cell, state, outcome["message"], str(Path("logs", profile, f"{job}.log")))


def _seconds_left(jobs: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]) -> float | None:
    """Return the work that is left, by the expected times, over the number of jobs that run now."""
    done = [job for job in jobs.values() if job["state"] == "done" and job.get("expected")]
    active = [row for row in rows if row.state == "running"]
    if not done or not active:
        return None
    # Expectations may be far off, but they are off alike.
    scale = sum(job["seconds"] for job in done) / sum(job["expected"] for job in done)
    left = sum(job.get("expected") or 0.0 for job in jobs.values() if job["state"] == "queued") * scale
    for row in active:
        spent = time.time() - jobs[row.cell]["since"]
        expected = (jobs[row.cell].get("expected") or 0.0) * scale
        left += row.seconds_left if row.seconds_left is not None else max(0.0, expected - spent)
    # Of what measures time, or gathers results, nothing is expected: nobody knows how long it takes.
    return left / len(active) or None


def _is_alive(heartbeat: Path) -> bool:
    """Return whether a grid still touches its heartbeat; if the file is of the future, by looking whether it changes.

    It can be of the future where a clock was set back, or where the file system has a clock of its own.
    """
    with contextlib.suppress(FileNotFoundError):
        first = heartbeat.stat().st_mtime
        if time.time() >= first:
            return time.time() - first < EXPIRY_SECONDS
        end = time.monotonic() + 2 * TOUCH_SECONDS
        while time.monotonic() < end:
            time.sleep(TOUCH_SECONDS / 20)
            if heartbeat.stat().st_mtime != first:
                return True
    return False
