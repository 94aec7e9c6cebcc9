"""Where a grid stands, from files alone: of a grid that runs, of one that has died, and of none."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from project_folder import ROOT, Project
from rich.console import Console, Group

from pipeline.launch import GridState, Heartbeat
from pipeline.monitor import status, view
from pipeline.monitor.status import Row, Snapshot, take_snapshot

MEAN = [f"lra-listops-mean-transformer-{seed}" for seed in (0, 1)]
SOFTMAX = [f"lra-listops-softmax-transformer-{seed}" for seed in (0, 1)]


@pytest.fixture
def heartbeat(project: Project) -> Heartbeat:
    """The heartbeat of a grid with one job in each state, half way through its first cell."""
    shutil.copy(ROOT / "dvc.yaml", project.folder)
    project.set("grid.tasks", ["lra-listops"])
    project.set("grid.kernel.dotf", [])
    made = Heartbeat(Path("logs"))
    state = GridState(Path("logs/tiny/grid.json"), made.path)
    for name in (*SOFTMAX, *MEAN, "report@tiny"):
        state.set(name, "queued", expected=100.0)
    state.set(SOFTMAX[0], "done", seconds=50.0)
    state.set(SOFTMAX[1], "failed", reason="loss is nan", log="logs/tiny/x.log")
    state.set(MEAN[0], "running", device="cpu", attempt=2)
    state.save()
    folder = Path("checkpoints/tiny", MEAN[0])
    folder.mkdir(parents=True)
    said = {"stage": "train", "step": 30, "steps": 60, "loss": 1.25, "dev_accuracy": 0.5, "steps_per_second": 2.0}
    (folder / "progress.json").write_text(json.dumps({**said, "memory_mb": 200.0, "updated": time.time()}))
    (folder / "last.pt").touch()
    Path("logs/tiny", f"{SOFTMAX[1]}.outcome.json").write_text('{"kind": "failed", "message": "loss is nan"}')
    return made


def test_a_running_grid_is_shown_as_its_engine_and_its_cells_see_it(heartbeat: Heartbeat) -> None:
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
    title, *shown, summary = view.lines(snapshot)
    assert " ".join(title.split()) == "cell state progress left dev accuracy loss steps/s memory device"
    (mean,) = (" ".join(line.split()) for line in shown if line.startswith(MEAN[0]))
    assert mean == f"{MEAN[0]} running (2) train 30/60 15 s 0.5000 1.2500 2.0 200 MB cpu"
    assert f"{SOFTMAX[1]}  failed       loss is nan" in shown
    assert summary == "profile tiny: 1 of 4 cells done, 1 running, 1 failed, 1 queued; about 2 min left"
    assert [line.plain.split()[0] for line in view.screen(snapshot, width=160, height=6)] == [
        "cell",
        MEAN[0],
        SOFTMAX[1],
        "...",
        "profile",
    ]


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (72, ["cell", "state", "progress", "left"]),
        (80, ["cell", "state", "progress", "left"]),
        (100, ["cell", "state", "progress", "left", "dev accuracy"]),
        (140, ["cell", "state", "progress", "left", "dev accuracy", "loss", "steps/s", "memory", "device"]),
    ],
)
def test_a_narrow_terminal_shows_fewer_columns_and_whole_figures(width: int, titles: list[str]) -> None:
    told = {"stage": "train", "step": 100, "steps": 200, "loss": 1.25, "dev_accuracy": 0.5, "memory_mb": 250.0}
    cell = Row("recall-mqar-kernelized-exp-maclauformer+gain8-42", "running", device="cpu", attempt=2)
    running = replace(cell, progress={**told, "steps_per_second": 12.3}, seconds_left=720)
    failed = Row("lra-text-softmax-transformer-42", "failed", reason="loss is not a number any more " * 5)
    drawn = io.StringIO()
    console = Console(file=drawn, width=width)
    console.print(Group(*view.screen(Snapshot("quick", True, [running, failed], []), width, 20)))
    title, first, second, _ = drawn.getvalue().splitlines()
    assert [each.strip() for each in re.split("  +", title)] == titles
    assert re.match(r"recall-mqar-ker\S*…?\S*gain8-42 +running \(2\)  train 100/200  12 min", first)
    assert ("0.5000" in first) == ("dev accuracy" in titles)
    assert re.match(r"lra-text-softmax-transformer-42 +failed +loss is .*…$", second)
    assert max(map(len, (title, first, second))) <= width


def test_the_summary_names_what_runs_when_no_cell_does() -> None:
    others = [Row("bench@tiny", "running"), Row("errors@tiny", "queued"), Row("report@tiny", "queued")]
    assert view.summary(Snapshot("tiny", True, [Row("a", "done")], others)) == (
        "profile tiny: 1 of 1 cell done; running bench@tiny; then errors@tiny, report@tiny"
    )
    assert view.summary(Snapshot("tiny", True, [], others[:1])) == "profile tiny: running bench@tiny"


def test_nobody_knows_how_long_benchmarks_take(heartbeat: Heartbeat) -> None:
    state = GridState(Path("logs/tiny/grid.json"), heartbeat.path)
    state.set(SOFTMAX[0], "queued", expected=100.0)
    state.set(SOFTMAX[0], "done", seconds=50.0)
    state.set("bench@tiny", "queued", expected=0.0)
    state.set("bench@tiny", "running")
    state.save()
    snapshot = take_snapshot()
    assert (snapshot.running, snapshot.seconds_left) == (True, None)


def test_a_heartbeat_of_the_future_beats_or_the_grid_has_died(
    heartbeat: Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "TOUCH_SECONDS", 0.5)
    future = time.time() + 3600
    os.utime(heartbeat.path, (future, future))
    assert not take_snapshot().running
    beat = threading.Timer(0.3, os.utime, (heartbeat.path, (future + 2, future + 2)))
    beat.start()
    assert take_snapshot().running
    beat.join()


def test_of_a_grid_that_has_died_the_files_of_its_cells_tell(heartbeat: Heartbeat) -> None:
    heartbeat.end()
    snapshot = take_snapshot()
    assert not snapshot.running
    assert {row.cell: (row.state, row.reason) for row in snapshot.cells} == {
        SOFTMAX[0]: ("to run", ""),
        SOFTMAX[1]: ("failed", "loss is nan"),
        MEAN[0]: ("interrupted", "goes on from its checkpoint"),
        MEAN[1]: ("to run", ""),
    }


def test_what_many_cells_wait_for_is_said_once(heartbeat: Heartbeat) -> None:
    heartbeat.end()
    Path("logs/tiny/data-lra-listops.outcome.json").write_text('{"kind": "unavailable", "message": "no network"}')
    shown = view.lines(take_snapshot())
    assert [line.split() for line in shown if "unavailable" in line][:3] == [
        [SOFTMAX[0], "unavailable"],
        [MEAN[0], "unavailable"],
        [MEAN[1], "unavailable"],
    ]
    assert [line for line in shown if "no network" in line] == ["unavailable: 3 cells: no network"]
    assert any(line.startswith(SOFTMAX[1]) and line.endswith("failed       loss is nan") for line in shown)


def test_asking_imports_nothing_that_takes_long() -> None:
    modules = "pipeline.cli, pipeline.monitor.status, pipeline.monitor.view"
    code = f"import sys, {modules}; print({{'torch', 'mlflow', 'dvc'}} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"
