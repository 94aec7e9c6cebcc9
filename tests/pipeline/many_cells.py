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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.grid.graph import Stage, lookup, read_graph
from pipeline.hashes import Hashes
from pipeline.record.freshness import stage_states, write_receipt
from pipeline.record.lock_file import Entry
from project_folder import ROOT, Project, write_results

from pipeline import reporting
from pipeline.files import read_json
from pipeline.grid.cells import expand, settings_fingerprint, summary_file
from pipeline.grid.params import load_params
from pipeline.launch import Attempt, Device, Ended, GridState, Job, Lease, Options, plan, run_jobs
from pipeline.monitor.status import take_snapshot
from pipeline.record.writer import record
from pipeline.results import CellResults, Fingerprint
from pipeline.stages import download, preprocess

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


def make_receipts(settings: dict[str, Any], stages: Iterable[Stage]) -> None:
    hashes = Hashes()
    for stage in stages:
        deps, outs = ({path: hashes.of(path) for path in paths} for paths in (stage.deps, stage.outs))
        values = {key: lookup(settings, key) for key in stage.params}
        write_receipt(stage.name, Entry(stage.command, deps, values, outs))


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
        measure(project.settings, options.recorded)


def measure(settings: dict[str, Any], recorded: bool) -> None:
    params = load_params()
    cells = timed("expand", lambda: expand(params))
    graph = timed("stages", lambda: read_graph(settings))
    wanted = graph.upstream(graph.cell_stages())
    hashes = Hashes()
    states = timed("out of date", lambda: stage_states(graph, settings, hashes, wanted))
    due = [name for name in graph.stages if states.get(name) == "due"]
    jobs = timed("plan", lambda: plan.plan_jobs(params, cells, graph, due, settings, hashes, device="cpu"))
    lease = Lease(Path("logs"))
    state = GridState(Path("logs/tiny/grid.json"), lease.path)
    todo = Options(Path("logs/tiny"), {}, jobs=2)
    events = timed("engine", lambda: [event for event in run_jobs(jobs, Instant(), lease, todo, state) if event])
    lease.end()
    done = sum(event.state == "done" for event in events)

    download.run(params, "lra-listops")
    preprocess.run(params, "lra-listops")
    data = read_json(summary_file("tiny", "lra-listops"))["fingerprint"]
    for cell in cells:
        made_from = Fingerprint("code", settings_fingerprint(cell, params), data)
        write_results(CellResults("tiny", cell.id), cell, made_from, 0.5 + (cell.seed % 97) / 1000)
        (cell.run_folder("tiny") / "best.pt").write_bytes(b"weights")
    timed("status", take_snapshot)
    timed("report", lambda: reporting.build("tiny", params, Path()))
    print(f"{len(cells)} cells, {done} jobs")
    if recorded:
        for name in ("bench.csv", "bench-checks.csv"):
            Path("runs/tiny", name).write_text("made up")
        timed("receipts", lambda: make_receipts(settings, graph.stages.values()))
        timed("DVC's record made", lambda: print(set(record(list(graph.stages)).values())))
        timed("schoenbat-exp run, nothing to do", lambda: ask("run", "--grid"))
        timed("schoenbat-exp status", lambda: ask("status"))


if __name__ == "__main__":
    main()
