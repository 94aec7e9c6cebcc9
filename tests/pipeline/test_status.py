"""Where a grid stands, from files alone: of a grid that runs, of one that has died, and of none."""

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project_folder import ROOT, Project
from rich.console import Console

from pipeline.launch import GridState, Lease
from pipeline.monitor import view
from pipeline.monitor.status import take_snapshot

MEAN = [f"lra-listops-mean-transformer-{seed}" for seed in (0, 1)]
SOFTMAX = [f"lra-listops-softmax-transformer-{seed}" for seed in (0, 1)]


@pytest.fixture
def lease(project: Project) -> Lease:
    """The lease of a grid with one job in each state, half way through its first cell."""
    shutil.copy(ROOT / "dvc.yaml", project.folder)
    project.set("grid.tasks", ["lra-listops"])
    project.set("grid.kernel.dotf", [])
    made = Lease(Path("logs"))
    state = GridState(Path("logs/tiny/grid.json"), made.path)
    for name in (*SOFTMAX, *MEAN, "report@tiny"):
        state.expect(name, expected=100.0)
    state.set(SOFTMAX[0], "done", seconds=50.0)
    state.set(SOFTMAX[1], "failed", reason="loss is nan", log="logs/tiny/x.log")
    state.set(MEAN[0], "running", device="cpu", attempt=2)
    state.save()
    folder = Path("checkpoints/tiny", MEAN[0])
    folder.mkdir(parents=True)
    said = {"stage": "train", "step": 30, "steps": 60, "loss": 1.25, "dev_accuracy": 0.5, "steps_per_second": 2.0}
    (folder / "progress.json").write_text(
        json.dumps({**said, "memory_mb": 200.0, "gpu_percent": 87, "updated": time.time()})
    )
    (folder / "last.pt").touch()
    Path("logs/tiny", f"{SOFTMAX[1]}.outcome.json").write_text('{"kind": "failed", "message": "loss is nan"}')
    return made


def test_a_running_grid_is_shown_as_its_engine_and_its_cells_see_it(lease: Lease) -> None:
    snapshot = take_snapshot()
    rows = {row.cell: row for row in snapshot.cells}
    assert snapshot.running
    assert {cell: row.state for cell, row in rows.items()} == {
        SOFTMAX[0]: "done",
        SOFTMAX[1]: "failed",
        MEAN[0]: "running",
        MEAN[1]: "queued",
    }
    assert [row.cell for row in snapshot.others] == ["report@tiny"]
    assert rows[MEAN[0]].seconds_left == 15.0
    # The only cell that is done took half of what was expected, so what is queued is taken to be 2 x 50 s.
    assert snapshot.seconds_left == 115.0
    text = "\n".join(view.lines(snapshot))
    assert (
        f"{MEAN[0]}     running: train 30/60, loss 1.2500, dev accuracy 0.5000, 2.0 steps/s, 15 s left, 200 MB, "
        "GPU 87 % busy" in text
    )
    assert f"{SOFTMAX[1]}  failed: loss is nan" in text
    summary = "profile tiny: 1 of 4 cells done, 1 running, 1 failed, 1 queued; about 2 min left"
    assert text.splitlines()[-1] == summary
    drawn = io.StringIO()
    Console(file=drawn, width=160).print(view.table(snapshot, height=6))
    shown = drawn.getvalue().splitlines()
    assert [line.split()[0] for line in shown] == ["cell", MEAN[0], SOFTMAX[1], "...", "profile"]


def test_of_a_grid_that_has_died_the_files_of_its_cells_tell(lease: Lease) -> None:
    lease.end()
    snapshot = take_snapshot()
    assert not snapshot.running
    assert {row.cell: (row.state, row.reason) for row in snapshot.cells} == {
        SOFTMAX[0]: ("to run", ""),
        SOFTMAX[1]: ("failed", "loss is nan"),
        MEAN[0]: ("interrupted", "goes on from its checkpoint"),
        MEAN[1]: ("to run", ""),
    }


def test_what_many_cells_wait_for_is_said_once(lease: Lease) -> None:
    lease.end()
    Path("logs/tiny/data-lra-listops.outcome.json").write_text('{"kind": "unavailable", "message": "no network"}')
    shown = view.lines(take_snapshot())
    assert [line.split() for line in shown if "unavailable" in line][:3] == [
        [SOFTMAX[0], "unavailable"],
        [MEAN[0], "unavailable"],
        [MEAN[1], "unavailable"],
    ]
    assert [line for line in shown if "no network" in line] == ["unavailable: 3 cells: no network"]
    assert any(line.startswith(SOFTMAX[1]) and line.endswith("failed: loss is nan") for line in shown)


def test_asking_imports_nothing_that_takes_long() -> None:
    modules = "pipeline.cli, pipeline.monitor.status, pipeline.monitor.view"
    code = f"import sys, {modules}; print({{'torch', 'mlflow', 'dvc'}} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"
