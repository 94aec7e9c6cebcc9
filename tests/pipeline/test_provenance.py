"""What is on record is what ran: code, settings and data of the start of a grid, or it is out of date."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline.record.lock_file import read_blocks
from project_folder import ROOT, Project
from small_grid import CELLS, MEAN, make_small, start_grid

pytestmark = pytest.mark.slow

Invoke = Callable[..., tuple[int, str, str]]
STARTED = f"{MEAN}: started"
TRAIN, EVALUATE = f"train@tiny-{MEAN}", f"evaluate@tiny-{MEAN}"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Project) -> Project:
    folder = tmp_path / "grid"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return make_small(folder)


def finish(folder: Path, *options: str) -> tuple[int, str]:
    grid = start_grid(folder, *options)
    out, _ = grid.communicate()
    return grid.returncode, out


def run_and_change(project: Project, change: Callable[[], None], *options: str) -> tuple[int, str]:
    """Run a grid, and change something as soon as a cell trains."""
    project.set("task.lra-listops.training.steps", 1600)
    project.set("task.lra-listops.training.eval_every", 800)
    grid = start_grid(project.folder, *options)
    while not list(project.folder.glob("checkpoints/tiny/*/progress.json")):
        assert grid.poll() is None, grid.communicate()
        time.sleep(0.05)
    change()
    out, _ = grid.communicate()
    return grid.returncode, out


def dvc_changes() -> set[str]:
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    return set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def state_of(cell: str, invoke: Invoke) -> str:
    (row,) = [row for row in json.loads(invoke("status", "--json")[1])["cells"] if row["cell"] == cell]
    return row["state"]


def test_code_that_is_edited_while_a_cell_trains_is_not_the_code_of_its_result(small: Project, invoke: Invoke) -> None:
    source = small.folder / "schoenbat/lra/encoder.py"
    before = source.read_bytes()
    code, out = run_and_change(small, lambda: source.write_bytes(before + b"# edited\n"), "--cell", MEAN)
    assert code == 1
    assert "schoenbat/lra/encoder.py" in out
    assert "changed" in out
    assert TRAIN not in read_blocks()
    assert TRAIN in dvc_changes()
    assert state_of(MEAN, invoke) in ("to run", "failed")

    # With the code that it was trained with, nothing of the training has to be done again.
    source.write_bytes(before)
    code, out = finish(small.folder, "--cell", MEAN)
    assert code == 0, out
    log = Path("logs/tiny", f"{MEAN}.log").read_text()
    assert ("schoenbat-exp eval" in log, "schoenbat-exp train" in log) == (True, False)
    assert {TRAIN, EVALUATE}.isdisjoint(dvc_changes())
    assert state_of(MEAN, invoke) == "done"


def test_settings_that_change_while_a_grid_runs_are_not_mixed_into_it(small: Project, invoke: Invoke) -> None:
    code, out = run_and_change(
        small, lambda: small.set("task.lra-listops.training.steps", 6), "--jobs", "1", "--task", "lra-listops"
    )
    assert code == 1
    assert "params.yaml has changed since it ran" in out
    for cell in CELLS:
        assert json.loads(Path("runs/tiny", cell, "metrics.json").read_bytes())["steps"] == 1600
        assert state_of(cell, invoke) == "to run"
    assert {name for name in read_blocks() if name.startswith("train")} == set()

    # Another profile, and then back: what was computed gets on record.
    small.set("task.lra-listops.training.steps", 1600)
    code, out = finish(small.folder)
    assert code == 0, out
    assert STARTED not in out, out
    assert {state_of(cell, invoke) for cell in CELLS} == {"done"}


def test_the_code_of_another_checkout_is_an_error_of_one_line(small: Project) -> None:
    with Path("schoenbat/lra/encoder.py").open("a") as file:
        file.write("raise RuntimeError\n")
    for arguments in (
        ("train", "--task", "lra-listops", "--attn", "mean", "--former", "transformer"),
        ("run", "--grid"),
    ):
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "pipeline.cli", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2, ended.stdout + ended.stderr
        (line,) = ended.stderr.splitlines()
        assert line.startswith(f"error: the code that runs is that of {ROOT}, and its schoenbat/lra/encoder.py is not")
        assert "PYTHONPATH" in line


def test_what_cannot_be_recorded_keeps_its_checkpoint_and_is_recorded_without_training_again(small: Project) -> None:
    # A file where a folder is needed stops root as well, whom a full disk would not.
    Path(".dvc/cache").write_text("")
    code, out = finish(small.folder, "--cell", MEAN)
    assert code == 1
    assert f"not on record: {TRAIN}: " in out
    assert Path("checkpoints/tiny", MEAN, "last.pt").is_file()

    Path(".dvc/cache").unlink()
    code, out = finish(small.folder, "--cell", MEAN)
    assert code == 0, out
    assert STARTED not in out, out
    assert not Path("checkpoints/tiny", MEAN, "last.pt").exists()
    assert {TRAIN, EVALUATE}.isdisjoint(dvc_changes())

    # A record that is lost, as by git checkout, is made again as well.
    Path("dvc.lock").unlink()
    code, out = finish(small.folder, "--cell", MEAN)
    assert code == 0, out
    assert STARTED not in out, out
    assert {TRAIN, EVALUATE}.isdisjoint(dvc_changes())

    code, out = finish(small.folder, "--cell", MEAN, "--force")
    assert code == 0, out
    assert STARTED in out, out
    assert {TRAIN, EVALUATE}.isdisjoint(dvc_changes())


NEW_STAGE = """
  weigh:
    matrix:
      profile: ["${profile}"]
      task: ${grid.tasks}
      attn: ${grid.plain.attn}
      former: ${grid.plain.former}
      seed: ${grid.seeds}
    cmd: python weigh.py ${item.profile}/${item.task}-${item.attn}-${item.former}-${item.seed}
    deps:
      - weigh.py
      - runs/${item.profile}/${item.task}-${item.attn}-${item.former}-${item.seed}/best.pt
    outs:
      - runs/${item.profile}/${item.task}-${item.attn}-${item.former}-${item.seed}/weight.txt:
          cache: false
"""
WEIGH = """
import pathlib, sys
folder = pathlib.Path("runs", sys.argv[1])
(folder / "weight.txt").write_text(str((folder / "best.pt").stat().st_size))
"""


def test_a_new_stage_is_its_file_and_its_entry_in_dvc_yaml(small: Project) -> None:
    Path("weigh.py").write_text(WEIGH)
    with Path("dvc.yaml").open("a") as file:
        file.write(NEW_STAGE)
    code, out = finish(small.folder, "--cell", MEAN)
    assert code == 0, out
    folder = Path("runs/tiny", MEAN)
    assert int((folder / "weight.txt").read_text()) == (folder / "best.pt").stat().st_size
    assert {TRAIN, EVALUATE, f"weigh@tiny-{MEAN}"}.isdisjoint(dvc_changes())
    assert "nothing to do" in finish(small.folder, "--cell", MEAN)[1]
    Path("weigh.py").write_text(f"{WEIGH}# changed\n")
    out = finish(small.folder, "--cell", MEAN, "--dry-run")[1]
    assert f"  weigh@tiny-{MEAN}\n" in out
    assert TRAIN not in out
