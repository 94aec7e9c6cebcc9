"""Faults struck at grids of real cells, in a seeded order: whatever happens, reruns end with the undisturbed numbers.

A few are struck here; SCHOENBAT_CHAOS=100 strikes a hundred, two thirds of them on this machine and the others on
Slurm, and SCHOENBAT_CHAOS_SEED chooses other orders and moments. A grid is struck up to four times and then run again
until it is complete. What is expected of each: every number byte for byte that of cells which ran alone, one MLflow run
per cell that holds each evaluation once and the weights, DVC with nothing to do, and no process and no Slurm job left.
How often each fault was struck is printed in the end (`pytest -s`) and stands in `struck*.txt` of the test's folder.
"""

import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from faults import FAULTS, SERVER_FAULTS, SLURM_FAULTS, STAGES, Scene, Strike
from mlflow_server import Server, running_server
from slurm_node import Node
from small_grid import CELLS, make_small, numbers, processes_of, start_grid, tracked_runs

from pipeline.grid.results import CellResults

pytestmark = pytest.mark.slow

NUM_FAULTS = int(os.environ.get("SCHOENBAT_CHAOS", "6"))
NUM_SLURM = NUM_FAULTS // 3
SEED = int(os.environ.get("SCHOENBAT_CHAOS_SEED", "34"))
"""The first faults of this one are of several kinds."""
STEPS, EVAL_EVERY = 1200, 200
MOST_AT_ONE_GRID = 4
MOST_RERUNS = 10
GRID_SECONDS = 900
"""One that takes longer hangs."""


@dataclass(frozen=True)
class Undisturbed:
    """A project with its data, and the numbers of its cells when each was trained alone."""

    folder: Path
    numbers: dict[str, bytes]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    from pipeline.cli.app import main

    folder = tmp_path_factory.mktemp("chaos") / "grid"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        project = make_small(folder)
        project.set("task.lra-listops.training.steps", STEPS)
        project.set("task.lra-listops.training.eval_every", EVAL_EVERY)
        project.set("run.timeout_minutes", 1.0)
        project.set("run.slurm", {"max_jobs": 2, "walltime_minutes": 2})
        data = [(command, "--task", "lra-listops") for command in ("download", "preprocess")]
        for command in [*data, *((verb, *axes) for axes in CELLS.values() for verb in ("train", "eval"))]:
            with pytest.raises(SystemExit) as ended:
                main(list(command))
            assert not ended.value.code
    # It is MLflow's client that puts it there.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    found = numbers(folder)
    yield Undisturbed(folder, found)
    for process in processes_of(folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class Chaos:
    """Grids that are struck.

    Args:
        undisturbed: the project, and what its numbers have to be.
        faults: of which each is struck about as often as any other.
        num_faults: how many are to be struck.
        options: of the grids.
        node: of Slurm, if they run there.
    """

    def __init__(
        self,
        undisturbed: Undisturbed,
        faults: Mapping[str, Strike],
        num_faults: int,
        *options: str,
        node: Node | None = None,
    ) -> None:
        self._folder, self._numbers = undisturbed.folder, undisturbed.numbers
        self._faults, self._options, self._node = faults, options, node
        self._moments = random.Random(SEED)
        self._deck: list[str] = []
        self._struck: Counter[str] = Counter()
        self._told: list[str] = []
        self._grids = 0
        self._runs = 0
        self.left = num_faults

    def run_grid(self, server: Server | None = None) -> None:
        """Strike one grid a few times, run it until it is complete, and see that it is as if nothing had happened."""
        self._grids += 1
        self._told = []
        variables = {} if server is None else {"MLFLOW_TRACKING_URI": server.address}
        due, reruns = min(self.left, self._moments.randint(1, MOST_AT_ONE_GRID)), 0
        while reruns <= MOST_RERUNS:
            self._runs += 1
            # To a file, not a pipe, whose end would come with that of all processes: what is stopped when the parent is
            # killed is there until the next run ends it.
            with (self._folder / "said.txt").open("w", encoding="utf-8") as output:
                grid = start_grid(self._folder, *self._options, output=output, **variables)
            scene = Scene(self._folder, grid, self._moments, server, self._node)
            reruns += due == 0
            due -= self._strike(scene, due)
            grid.wait(timeout=GRID_SECONDS)
            self._told.append((self._folder / "said.txt").read_text(encoding="utf-8"))
            if grid.returncode == 0:
                break
        assert grid.returncode == 0, self._said()
        self._check()

    def _strike(self, scene: Scene, most: int) -> int:
        struck = 0
        while struck < most and scene.runs():
            wait_for_a_cell(scene)
            if not scene.runs():
                break
            fault = self._draw(scene)
            print(f"grid {self._grids}, run {self._runs}: {fault}", flush=True)
            if self._faults[fault](scene):
                self._struck[fault] += 1
                self._told.append(f"-- struck: {fault}")
                self.left -= 1
                struck += 1
            else:
                self._deck.append(fault)
        return struck

    def _draw(self, scene: Scene) -> str:
        """The next fault: all of the table in a seeded order, then all of it in another. Some need a server."""
        while True:
            for fault in self._deck:
                if scene.server is not None or fault not in SERVER_FAULTS:
                    self._deck.remove(fault)
                    return fault
            self._deck += self._moments.sample(list(self._faults), len(self._faults))

    def _check(self) -> None:
        said = self._said()
        assert numbers(self._folder) == self._numbers, said
        expected = {cell: list(range(EVAL_EVERY, STEPS + 1, EVAL_EVERY)) for cell in CELLS}
        assert tracked_runs(self._folder) == expected, said
        assert scores_and_weights(self._folder) == dict.fromkeys(CELLS, (1, True)), said
        if self._node is not None:
            node = self._node
            # Slurm takes a moment to end what was cancelled.
            wait_until(lambda: not node.answer("squeue", "--noheader") and not processes_of(self._folder), said)
        assert processes_of(self._folder) == [], said
        status = subprocess.run(
            [sys.executable, "-m", "dvc", "status", "--json"], cwd=self._folder, capture_output=True, text=True
        )
        assert set(json.loads(status.stdout)) <= {"bench@tiny"}, said
        assert [path for path in self._folder.rglob("*.tmp") if "mlruns" not in path.parts] == [], said

    def _said(self) -> str:
        return "\n".join([f"seed {SEED}, grid {self._grids}:", *self._told])

    def report(self) -> None:
        """Print how often each fault was struck, and write it beside the project."""
        head = (
            f"seed {SEED}: {self._struck.total()} faults at {self._grids} grids, which were started {self._runs} times"
        )
        text = "\n".join([head, *(f"{times:4} {fault}" for fault, times in sorted(self._struck.items()))])
        name = "struck.txt" if self._node is None else "struck-on-slurm.txt"
        self._folder.with_name(name).write_text(f"{text}\n")
        print(f"\n{text}")


def test_on_this_machine_reruns_end_with_the_undisturbed_numbers(undisturbed: Undisturbed) -> None:
    chaos = Chaos(undisturbed, FAULTS | SERVER_FAULTS, NUM_FAULTS - NUM_SLURM, "--jobs", "2")
    folder = undisturbed.folder
    while chaos.left:
        start_over(folder)
        with running_server(folder.parent, folder / "mlflow.db", folder / "mlruns") as server:
            chaos.run_grid(server)
        if chaos.left:
            start_over(folder)
            chaos.run_grid()
    chaos.report()


def test_on_slurm_reruns_end_with_the_undisturbed_numbers(
    undisturbed: Undisturbed, slurm_machine: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm_machine.environment.items():
        monkeypatch.setenv(name, value)
    chaos = Chaos(undisturbed, SLURM_FAULTS, NUM_SLURM, "--backend", "slurm", node=slurm_machine)
    while chaos.left:
        start_over(undisturbed.folder)
        chaos.run_grid()
    chaos.report()


def wait_for_a_cell(scene: Scene) -> None:
    """Until a stage runs, and then for some time: at any moment of loading, training, testing or recording."""
    while scene.runs() and not scene.children(STAGES):
        time.sleep(0.1)
    scene.pause(0.0, 10.0)


def wait_until(condition: Callable[[], bool], said: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, said
        time.sleep(0.2)


def start_over(folder: Path) -> None:
    for name in ("runs", "weights", "checkpoints", "mlruns", "logs", ".dvc/cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder / "dvc.lock", *folder.glob("mlflow.db*")):
        path.unlink(missing_ok=True)


def scores_and_weights(folder: Path) -> dict[str, tuple[int, bool]]:
    """How many test scores MLflow holds of each cell, and whether it has the weights that the cell ended with."""
    found = {}
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        cells = database.execute("select run_uuid, value from tags where key = 'cell'").fetchall()
        for run, cell in cells:
            query = "select count(*) from metrics where key = 'test_accuracy' and run_uuid = ?"
            ((scores,),) = database.execute(query, [run])
            best = CellResults("tiny", cell, folder).best
            weights = [path.read_bytes() for path in folder.glob(f"mlruns/**/{run}/artifacts/{best.name}")]
            found[cell] = scores, weights == [best.read_bytes()]
    return found
