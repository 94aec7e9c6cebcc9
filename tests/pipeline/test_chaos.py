"""Faults struck at grids of real cells, in a seeded order: whatever happens, reruns end with the undisturbed numbers.

Each fault is a row of `FAULTS`. A few are struck here; SCHOENBAT_CHAOS=100 strikes a hundred, and SCHOENBAT_CHAOS_SEED
chooses other moments. What is expected after all of them: every number byte for byte that of cells which ran alone, one
MLflow run per cell that holds each evaluation once, DVC with nothing to do, and no process left.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from project_folder import Project
from small_grid import CELLS, make_small, numbers, processes_of, start_grid, tracked_runs

NUM_FAULTS = int(os.environ.get("SCHOENBAT_CHAOS", "6"))
SEED = int(os.environ.get("SCHOENBAT_CHAOS_SEED", "0"))
STEPS, EVAL_EVERY = 3000, 500
MOST_RERUNS = 10

Grid = "subprocess.Popen[str]"


def signal_grid(*numbers: signal.Signals) -> Callable[[Path, Grid], None]:
    def strike(folder: Path, grid: "subprocess.Popen[str]") -> None:
        for number in numbers:
            grid.send_signal(number)

    return strike


def signal_children(part: str, number: signal.Signals) -> Callable[[Path, Grid], None]:
    """Send a signal to the workers, or to the stages that they run."""

    def strike(folder: Path, grid: "subprocess.Popen[str]") -> None:
        for process in children(folder, part):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    return strike


def kill_all(folder: Path, grid: "subprocess.Popen[str]") -> None:
    grid.kill()
    signal_children("pipeline.launch.worker", signal.SIGKILL)(folder, grid)


def limit_stages(resource: int, amount: int) -> Callable[[Path, Grid], None]:
    """Take something away from the stages while they run, as a full disk or a full memory does."""

    def strike(folder: Path, grid: "subprocess.Popen[str]") -> None:
        for process in children(folder, "schoenbat-exp"):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(resource, (amount, amount))

    return strike


def hold_database(folder: Path, grid: "subprocess.Popen[str]") -> None:
    if (folder / "mlflow.db").exists():
        with contextlib.closing(sqlite3.connect(folder / "mlflow.db", timeout=60)) as database:
            database.execute("BEGIN EXCLUSIVE")
            time.sleep(2)


def damage_rwlock(folder: Path, grid: "subprocess.Popen[str]") -> None:
    """What DVC leaves when it is killed while it writes this file, struck together with the kill."""
    kill_all(folder, grid)
    (folder / ".dvc/tmp/rwlock").write_text("")


FAULTS: dict[str, Callable[[Path, Grid], None]] = {
    "kill -9 of the stages": signal_children("schoenbat-exp", signal.SIGKILL),
    "kill -9 of the workers": signal_children("pipeline.launch.worker", signal.SIGKILL),
    "kill -9 of the parent": signal_grid(signal.SIGKILL),
    "kill -9 of parent and workers": kill_all,
    "kill -9 while DVC writes its locks": damage_rwlock,
    "Ctrl-C": signal_grid(signal.SIGINT),
    "Ctrl-C twice": signal_grid(signal.SIGINT, signal.SIGINT),
    "SIGTERM": signal_grid(signal.SIGTERM),
    "SIGTERM to the stages": signal_children("schoenbat-exp", signal.SIGTERM),
    "a stage that hangs": signal_children("schoenbat-exp", signal.SIGSTOP),
    "out of memory": limit_stages(psutil.RLIMIT_AS, 2**20),
    "disk full": limit_stages(psutil.RLIMIT_FSIZE, 5_000),
    "database locked": hold_database,
}


def children(folder: Path, part: str) -> list[psutil.Process]:
    found = []
    for process in processes_of(folder):
        with contextlib.suppress(psutil.Error):
            if part in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def chaotic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Project) -> Project:
    folder = tmp_path / "grid"
    folder.mkdir()
    monkeypatch.chdir(folder)
    made = make_small(folder)
    made.set("task.lra-listops.training.steps", STEPS)
    made.set("task.lra-listops.training.eval_every", EVAL_EVERY)
    made.set("run.timeout_minutes", 1.0)
    return made


def test_whatever_happens_reruns_end_with_the_undisturbed_numbers(chaotic: Project, invoke: Callable) -> None:
    folder = chaotic.folder
    for command in ("download", "preprocess"):
        assert invoke(command, "--task", "lra-listops")[0] == 0
    for verb in ("train", "eval"):
        for axes in CELLS.values():
            assert invoke(verb, *axes)[0] == 0
    undisturbed = numbers(folder)
    start_over(folder)

    moments = random.Random(SEED)
    struck: list[str] = []
    while len(struck) < NUM_FAULTS:
        grid = start_grid(folder, "--jobs", "2")
        while grid.poll() is None and len(struck) < NUM_FAULTS:
            wait_for_a_cell(folder, grid, moments.uniform(0.0, 3.0))
            if grid.poll() is None:
                fault = shuffled(len(struck))
                FAULTS[fault](folder, grid)
                struck.append(fault)
        if grid.wait() == 0:
            check(folder, undisturbed, struck)
            start_over(folder)
        grid.communicate()
    outputs = []
    for _ in range(MOST_RERUNS):
        grid = start_grid(folder, "--jobs", "2")
        outputs.append(grid.communicate()[0])
        if grid.returncode == 0:
            break
    assert grid.returncode == 0, (struck, outputs)
    check(folder, undisturbed, struck)


def shuffled(position: int) -> str:
    """The fault of a position: all of the table in a seeded order, then all of it in another."""
    turn, place = divmod(position, len(FAULTS))
    order = list(FAULTS)
    random.Random(SEED * 1000 + turn).shuffle(order)
    return order[place]


def wait_for_a_cell(folder: Path, grid: "subprocess.Popen[str]", seconds: float) -> None:
    """Until a stage runs, and then for some time: at any moment of loading, training, testing or recording."""
    while grid.poll() is None and not children(folder, "schoenbat-exp"):
        time.sleep(0.05)
    time.sleep(seconds)


def start_over(folder: Path) -> None:
    for name in ("runs", "checkpoints", "mlruns", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder / "dvc.lock", *folder.glob("mlflow.db*")):
        path.unlink(missing_ok=True)


def check(folder: Path, undisturbed: dict[str, bytes], struck: list[str]) -> None:
    assert numbers(folder) == undisturbed, struck
    expected = {cell: list(range(EVAL_EVERY, STEPS + 1, EVAL_EVERY)) for cell in CELLS}
    assert tracked_runs(folder) == expected, struck
    assert processes_of(folder) == [], struck
    status = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True)
    assert set(json.loads(status.stdout)) <= {"bench@tiny", "errors@tiny"}, struck
    assert [path for path in folder.rglob("*.tmp") if "mlruns" not in path.parts] == [], struck
