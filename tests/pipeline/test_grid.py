"""A grid of real cells in parallel: the numbers, DVC's record and MLflow's runs are those of one cell after another."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil
import pytest
from project_folder import ROOT, Project
from small_grid import CELLS, MEAN, RMFA, make_small, numbers, processes_of, start_grid, tracked_runs
from trained_project import OUTPUT

from pipeline.grid.results import CellResults
from pipeline.record import writer

pytestmark = pytest.mark.slow

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Project) -> Project:
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return make_small(folder)


def one_after_another(folder: Path, invoke: Invoke, cells: Iterable[str] = CELLS) -> dict[str, bytes]:
    """The numbers of cells by the commands alone, without DVC and without a grid."""
    for cell in cells:
        for verb in ("train", "eval"):
            assert invoke(verb, *CELLS[cell], "--force")[0] == 0
    return numbers(folder, cells)


def test_in_parallel_as_one_after_another_and_dvc_has_nothing_to_do(trained: Project, invoke: Invoke) -> None:
    small = trained
    assert "all 2 cells of profile tiny are done" in (small.folder / OUTPUT).read_text()
    changed = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True, check=True
    )
    assert set(json.loads(changed.stdout)) <= {"bench@tiny", "report@tiny"}

    snapshot = json.loads(invoke("status", "--json")[1])
    assert {row["cell"]: row["state"] for row in snapshot["cells"]} == dict.fromkeys(CELLS, "done")
    assert not snapshot["running"]
    assert "test accuracy" in invoke("logs", MEAN)[1]
    code, _, err = invoke("logs", "lra-listops")
    assert (code, MEAN in err) == (2, True)
    assert tracked_runs(small.folder) == {cell: [3, 6] for cell in CELLS}

    # What `status` says follows the settings as what DVC says does.
    small.set("attention.rmfa.num_features", 4)
    small.set("run.threads", 2)
    states = {row["cell"]: row["state"] for row in json.loads(invoke("status", "--json")[1])["cells"]}
    assert states == {MEAN: "done", RMFA: "to run"}
    small.set("attention.rmfa.num_features", 8)
    small.set("run.threads", 1)

    found = numbers(small.folder)
    assert one_after_another(small.folder, invoke) == found


def test_dvc_records_nothing_beside_what_measures_time(
    small: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.set("grid.kernel.attn", [])
    measuring, report = Path("logs/tiny/bench@tiny.job.json"), Path("reports/tiny/index.html")
    seen: list[tuple[bool, bool]] = []
    record = writer.record

    def record_slowly(names: Sequence[str]) -> dict[str, str]:
        before = measuring.exists()
        time.sleep(1)
        results = record(names)
        seen.append((before, measuring.exists()))
        assert not report.exists()
        return results

    monkeypatch.setattr(writer, "record", record_slowly)
    code, out, _ = invoke("run", "--grid")
    assert code == 0, out
    # What measures, and the report, DVC records itself.
    assert report.exists()
    assert set(seen) == {(False, False)}


def state_of(cell: str, invoke: Invoke) -> str:
    (row,) = [row for row in json.loads(invoke("status", "--json")[1])["cells"] if row["cell"] == cell]
    return row["state"]


def test_stopped_in_three_ways_nothing_is_left_and_it_ends_the_same(small: Project, invoke: Invoke) -> None:
    small.set("task.lra-listops.training.steps", 12000)
    small.set("task.lra-listops.training.eval_every", 4000)
    cell = MEAN
    folder = small.folder / "checkpoints/tiny" / cell
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    for number in stops:
        grid = start_grid(small.folder, "--cell", cell)
        (folder / "progress.json").unlink(missing_ok=True)
        while not (folder / "progress.json").exists():
            assert grid.poll() is None, grid.communicate()
            time.sleep(0.05)
        # The state of a grid is written once a second.
        while (state := state_of(cell, invoke)) != "running":
            assert state in ("to run", "queued", "waiting", "interrupted")
            assert grid.poll() is None, grid.communicate()
        grid.send_signal(number)
        out, _ = grid.communicate()
        if number == signal.SIGKILL:
            psutil.wait_procs(processes_of(small.folder))
        else:
            assert grid.returncode == 130, out
            assert "run the same again to go on" in out
        assert processes_of(small.folder) == []
        assert (folder / "last.pt").is_file(), "its work was not saved"
        assert CellResults("tiny", cell).metrics() is None
    grid = start_grid(small.folder, "--cell", cell)
    out, _ = grid.communicate()
    assert grid.returncode == 0, out
    resources = json.loads((small.folder / "checkpoints/tiny" / cell / "resources.json").read_bytes())
    assert resources["resumed"] == len(stops)
    assert tracked_runs(small.folder) == {cell: [4000, 8000, 12000]}
    found = numbers(small.folder, (cell,))
    assert one_after_another(small.folder, invoke, (cell,)) == found


def test_a_second_grid_waits_and_says_so(small: Project) -> None:
    first = start_grid(small.folder, "--jobs", "2")
    while not list(small.folder.glob("logs/heartbeat-*")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = start_grid(small.folder)
    out, _ = second.communicate()
    assert first.wait() == 0, first.communicate()
    assert second.returncode == 0, out
    assert f"another grid runs in this checkout (process {first.pid}); waiting for its end" in out
    assert "nothing to do: all 2 cells" in out


def test_it_works_in_a_git_worktree(small: Project, tmp_path: Path) -> None:
    def git(*arguments: str, folder: Path = small.folder) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    shutil.copy(ROOT / ".gitignore", small.folder)
    (small.folder / ".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    git("init")
    git("add", "--all")
    git("commit", "--message", "all")
    tree = tmp_path / "another tree"
    git("worktree", "add", "--detach", str(tree))
    grid = start_grid(tree, "--cell", MEAN)
    out, _ = grid.communicate()
    assert grid.returncode == 0, out
    assert CellResults("tiny", MEAN, tree).test() is not None
