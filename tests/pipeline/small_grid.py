"""A project of two small cells, run as a grid in a process of its own, and what is left of it on disk and in MLflow."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import psutil
from project_folder import Project

from pipeline.grid.results import CellResults
from pipeline.host.heartbeat import HEARTBEAT_VARIABLE

TASK = ("--task", "lra-listops")
CELLS = {
    "lra-listops-mean-transformer-0": (*TASK, "--attn", "mean", "--former", "transformer"),
    "lra-listops-rmfa-exp-maclauformer-0": (*TASK, "--attn", "rmfa", "--dotf", "exp", "--former", "maclauformer"),
}
MEAN, RMFA = CELLS


def make_small(folder: Path) -> Project:
    """Two cells of generated data, in a folder that is made; it has to be the current one."""
    project = set_small(Project(folder))
    project.add_dvc()
    return project


def set_small(project: Project) -> Project:
    """Set the settings of the two cells."""
    project.set("grid.tasks", ["lra-listops"])
    project.set("grid.seeds", [0])
    project.set("grid.plain.attn", ["mean"])
    project.set("grid.kernel.dotf", ["exp"])
    return project


def start_grid(
    folder: Path, *options: str, output: int | IO[str] = subprocess.PIPE, **variables: str
) -> "subprocess.Popen[str]":
    """`schoenbat-exp run` of all cells as a process of its own that heeds signals, with variables set for it."""
    command = [sys.executable, "-m", "pipeline.cli", "run", "--task", "lra-listops", *options]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **variables},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def numbers(folder: Path, cells: Iterable[str] = CELLS) -> dict[str, bytes]:
    """Return the content of each file of results but the weights."""
    files = [file for cell in cells for file in CellResults("tiny", cell, folder).files()[1:]]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that live under a heartbeat of this folder's grids, and all others that run in it."""
    found, own = [], str(folder.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.cwd() == own or process.environ().get(HEARTBEAT_VARIABLE, "").startswith(own):
                found.append(process)
    return found


def tracked_runs(folder: Path) -> dict[str, list[int]]:
    """The steps of dev accuracy that MLflow holds for each cell; more than one run of a cell is an error."""
    steps: dict[str, list[int]] = {}
    # By SQL, because MLflow's client keeps a database open that a test may delete.
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        query = "select run_uuid, tags.value, status from runs join tags using (run_uuid) where tags.key = 'cell'"
        for run, cell, status in database.execute(query).fetchall():
            assert cell not in steps, f"two runs of {cell}"
            assert status == "FINISHED"
            history = database.execute(
                "select step from metrics where key = 'dev_accuracy' and run_uuid = ? order by step", [run]
            )
            steps[cell] = [step for (step,) in history]
    return steps
