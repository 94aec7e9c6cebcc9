"""What is on record is what ran: code, settings and data of the start of a grid, or it is out of date."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from project_folder import ROOT, Project
from small_grid import CELLS, MEAN, make_small, start_grid

from pipeline.grid.axes import stage_names
from pipeline.grid.cells import expand
from pipeline.grid.params import load_params
from pipeline.grid.results import CellResults

pytestmark = pytest.mark.slow

STARTED = f"{MEAN}: started"
GROUP = CellResults("tiny", MEAN).group
TRAIN, EVALUATE = f"train@tiny-{GROUP}", f"evaluate@tiny-{GROUP}"


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


def recorded() -> set[str]:
    return set(yaml.safe_load(Path("dvc.lock").read_text())["stages"]) if Path("dvc.lock").exists() else set()


def train_stage(cell: str) -> str:
    (stage,) = [stage_names("tiny", each)[0] for each in expand(load_params()) if each.id == cell]
    return stage


def states() -> dict[str, str]:
    """What a process with the code of the current folder says of each cell."""
    command = [sys.executable, "-m", "pipeline.cli", "status", "--json"]
    snapshot = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {row["cell"]: row["state"] for row in snapshot["cells"]}


def test_code_that_is_edited_while_a_grid_runs_is_not_the_code_of_its_results(small: Project) -> None:
    source = small.folder / "schoenbat/lra/encoder.py"
    before = source.read_text()
    edited = before.replace("nn.LayerNorm(config.width)", "nn.LayerNorm(config.width, 1e-3)")
    assert edited != before
    code, out = run_and_change(small, lambda: source.write_text(edited), "--jobs", "1")
    assert code == 1
    first, second = sorted(CELLS, key=lambda cell: CellResults("tiny", cell).metrics() is None)
    assert CellResults("tiny", second).metrics() is None
    assert f"the code of {second} has changed since the grid started; run again" in out
    # What the first was made from is on record, and that this is no more what the code computes.
    assert {name for name in recorded() if name.startswith("train")} == {train_stage(first)}
    assert states() == {first: "to run", second: "failed"}
    assert "numerics" in dvc_changes()

    # With the code that it was trained with, nothing of it has to be done again.
    source.write_text(before)
    code, out = finish(small.folder)
    assert code == 0, out
    assert f"{first}: started" not in out, out
    assert dvc_changes() <= {"bench@tiny", "errors@tiny"}
    assert states() == dict.fromkeys(CELLS, "done")


def test_text_that_is_edited_while_a_cell_trains_changes_nothing(small: Project) -> None:
    source = small.folder / "schoenbat/lra/encoder.py"
    edited = source.read_text() + "# edited\n"
    code, out = run_and_change(small, lambda: source.write_text(edited), "--cell", MEAN)
    assert code == 0, out
    assert {TRAIN, EVALUATE}.isdisjoint(dvc_changes())
    assert states()[MEAN] == "done"


def test_settings_that_change_while_a_grid_runs_are_not_mixed_into_it(small: Project) -> None:
    code, out = run_and_change(
        small, lambda: small.set("task.lra-listops.training.steps", 6), "--jobs", "1", "--task", "lra-listops"
    )
    assert code == 1
    assert f"not on record: {TRAIN}: code, settings or data have changed since it ran" in out
    for cell in CELLS:
        metrics = CellResults("tiny", cell).metrics()
        assert metrics is not None
        assert metrics.steps == 1600
    assert states() == dict.fromkeys(CELLS, "to run")
    assert {name for name in recorded() if name.startswith("train")} == set()

    # Another profile, and then back: what was computed gets on record.
    small.set("task.lra-listops.training.steps", 1600)
    code, out = finish(small.folder)
    assert code == 0, out
    assert STARTED not in out, out
    assert states() == dict.fromkeys(CELLS, "done")
    assert {TRAIN, EVALUATE} < recorded()


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


def test_what_cannot_be_recorded_is_told_and_is_recorded_without_training_again(small: Project) -> None:
    # A file where a folder is needed stops root as well, whom a full disk would not.
    Path(".dvc/cache").write_text("")
    code, out = finish(small.folder, "--cell", MEAN)
    assert code == 1
    assert f"not on record: {TRAIN}: " in out

    Path(".dvc/cache").unlink()
    code, out = finish(small.folder, "--cell", MEAN)
    assert code == 0, out
    assert STARTED not in out, out
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


def test_a_seed_added_to_the_grid_is_trained_alone(small: Project) -> None:
    code, out = finish(small.folder)
    assert code == 0, out
    files = [file for cell in CELLS for file in CellResults("tiny", cell).files()]
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    small.set("grid.seeds", [0, 1])
    assert dvc_changes() >= {TRAIN}
    new = [cell.id for cell in expand(load_params()) if cell.seed == 1]
    assert states() == dict.fromkeys(CELLS, "done") | dict.fromkeys(new, "to run")

    code, out = finish(small.folder)
    assert code == 0, out
    assert [cell for cell in (*CELLS, *new) if f"{cell}: started" in out] == new, out
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files} == before
    assert dvc_changes() <= {"bench@tiny", "errors@tiny"}
    assert set(states().values()) == {"done"}
    lock = yaml.safe_load(Path("dvc.lock").read_text())["stages"][TRAIN]
    assert lock["params"]["params.yaml"]["grid.seeds"] == [0, 1]
    assert {out["path"]: out["nfiles"] for out in lock["outs"]} == {
        f"runs/tiny/{GROUP}/curves": 2,
        f"runs/tiny/{GROUP}/metrics": 2,
        f"weights/tiny/{GROUP}": 2,
    }

    # By DVC, which knows a group of seeds only as a whole, it is the same.
    small.set("grid.seeds", [0, 1, 2])
    scripts = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(small.folder)}
    command = [sys.executable, "-m", "dvc", "repro", "--quiet", EVALUATE]
    subprocess.run(command, env=os.environ | scripts, capture_output=True, text=True, check=True)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files} == before
    assert {TRAIN, EVALUATE}.isdisjoint(dvc_changes())
    assert states()[MEAN.removesuffix("0") + "2"] == "done"
