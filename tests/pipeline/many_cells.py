"""How long a grid of many cells takes before and after its cells, with made-up results: not a test, but a measurement.

    python tests/pipeline/many_cells.py [--cells 10000] [--recorded]

Cells are expanded, planned and sent through the engine by a backend that does nothing; then status and report are made
of made-up results. With --recorded DVC has a record of them all, and the command line is asked what is to be done.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from project_folder import ROOT, Project

from pipeline import reporting
from pipeline.files import read_json, write_csv, write_json
from pipeline.grid.cells import Cell, expand, report_stage, stage_graph, summary_file
from pipeline.grid.params import load_params
from pipeline.launch import Attempt, Device, Ended, GridState, Job, Lease, Options, plan, run_jobs
from pipeline.monitor.status import take_snapshot
from pipeline.stages import download, preprocess
from schoenbat.training import CURVE_FIELDS

T = TypeVar("T")
CELLS_PER_SEED = 4


class Instant:
    """Every job is done as soon as it is started."""

    devices = (Device("cpu", 2),)

    def clear(self) -> None: ...

    def start(self, job: Job, device: str, attempt: Attempt) -> None:
        attempt.log.touch()

    def waits(self, handle: None) -> bool:
        return False

    def poll(self, handle: None) -> Ended:
        return Ended(0)

    def kill(self, handle: None) -> None: ...

    def close(self) -> None: ...


def timed(what: str, action: Callable[[], T]) -> T:
    began = time.perf_counter()
    found = action()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{what:40} {time.perf_counter() - began:7.2f} s   peak so far {peak:6.0f} MB", flush=True)
    return found


def make_up(cell: Cell, folder: Path, steps: int, data: str) -> None:
    """What a finished cell leaves."""
    accuracy = 0.5 + (cell.seed % 97) / 1000
    metrics: dict[str, Any] = {"steps": steps, "best_step": steps, "best_dev_accuracy": accuracy, "best_dev_loss": 0.7}
    write_json(folder / "metrics.json", {**metrics, "num_parameters": 1000, "data_fingerprint": data})
    write_json(folder / "test.json", {"accuracy": accuracy, "loss": 0.7, "best_step": steps})
    taken = {"steps_per_second": 10.0, "peak_memory_mb": 300.0, "threads": 1}
    write_json(folder / "resources.json", {**taken, "device": "cpu", "git_revision": "none"})
    write_csv(folder / "curves.csv", CURVE_FIELDS, [[step, *[0.5] * (len(CURVE_FIELDS) - 1)] for step in (3, steps)])
    (folder / "best.pt").write_bytes(b"weights")


def record(stages: list[str]) -> None:
    """Let DVC believe that these stages have run."""
    from pipeline.record.dvc_project import project

    with project() as repo, repo.lock:
        for stage in stages:
            (made,) = repo.stage.collect(stage)
            made.save()
            made.commit()
            made.dump(update_pipeline=False)


def ask(*arguments: str) -> None:
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    said = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    print(f"    {said.stdout.splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--recorded", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        project = Project(Path(folder))
        project.set("grid.tasks", ["lra-listops"])
        project.set("grid.seeds", list(range(options.cells // CELLS_PER_SEED)))
        project.add_dvc()
        measure(options.recorded)


def measure(recorded: bool) -> None:
    params = load_params()
    cells = timed("expand", lambda: expand(params))
    graph = timed("stages", lambda: stage_graph(params, cells))
    due = timed("out of date", lambda: plan.due_stages(graph, plan.changed_stages(list(graph))))
    jobs = timed("plan", lambda: plan.plan_jobs(params, cells, due, device="cpu"))
    lease = Lease(Path("logs"))
    state = GridState(Path("logs/tiny/grid.json"), lease.path)
    todo = Options(Path("logs/tiny"), {}, jobs=2)
    events = timed("engine", lambda: [event for event in run_jobs(jobs, Instant(), lease, todo, state) if event])
    lease.end()
    done = sum(event.state == "done" for event in events)

    download.run(params, "lra-listops")
    preprocess.run(params, "lra-listops")
    steps = params.task["lra-listops"].training.steps
    data = read_json(summary_file("tiny", "lra-listops"))["fingerprint"]
    for cell in cells:
        make_up(cell, cell.run_folder("tiny"), steps, data)
    timed("status", take_snapshot)
    timed("report", lambda: reporting.build("tiny", params, Path()))
    print(f"{len(cells)} cells, {done} jobs")
    if recorded:
        timed("DVC's record made", lambda: record([*graph, report_stage("tiny")]))
        timed("schoenbat-exp run, nothing to do", lambda: ask("run", "--task", "lra-listops"))
        timed("schoenbat-exp status", lambda: ask("status"))


if __name__ == "__main__":
    main()
