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
from typing import TypeVar

from project_folder import ROOT, Project, make_up_results

from pipeline import reporting
from pipeline.grid.axes import stage_names
from pipeline.grid.cells import expand
from pipeline.grid.freshness import Freshness
from pipeline.grid.params import load_params
from pipeline.grid.settings import PARAMS_FILE, read_yaml
from pipeline.launch import Attempt, Device, Ended, GridState, Heartbeat, Job, Options, plan, run_jobs
from pipeline.monitor.status import take_snapshot
from pipeline.record.writer import record

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
    params, settings = load_params(), read_yaml(PARAMS_FILE)
    cells = timed("expand", lambda: expand(params))
    due = timed("out of date", lambda: [cell for cell in cells if not Freshness(settings).is_finished(cell)])
    others = [f"{stage}@tiny" for stage in ("bench", "report")]
    freshness = Freshness(settings)
    jobs = timed("plan", lambda: plan.plan_jobs(params, due, freshness, others, force=False, device="cpu"))
    heartbeat = Heartbeat(Path("logs"))
    state = GridState(Path("logs/tiny/grid.json"), heartbeat.path)
    todo = Options(Path("logs/tiny"), {}, jobs=2)
    events = timed("engine", lambda: [event for event in run_jobs(jobs, Instant(), heartbeat, todo, state) if event])
    heartbeat.end()
    done = sum(event.state == "done" for event in events)

    timed("results made up", make_up_results)
    timed("status", take_snapshot)
    timed("report", lambda: reporting.build(params, Path()))
    print(f"{len(cells)} cells, {done} jobs")
    if recorded:
        for name in ("bench.csv", "bench-checks.csv"):
            Path("runs/tiny", name).write_text("made up")
        # Those of the measurements and the report, which DVC runs, are taken as they are.
        command = [sys.executable, "-m", "dvc", "commit", "--force", "--quiet"]
        timed("dvc commit", lambda: subprocess.run(command, check=True))
        stages = {name for cell in cells for name in stage_names("tiny", cell)}
        timed("the cells recorded again", lambda: print(set(record(sorted(stages)).values())))
        timed("schoenbat-exp run, nothing to do", lambda: ask("run", "--grid"))
        timed("schoenbat-exp status", lambda: ask("status"))


if __name__ == "__main__":
    main()
