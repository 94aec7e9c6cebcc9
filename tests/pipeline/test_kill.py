"""A cell that is killed and started again ends as if nothing had happened, on disk and in MLflow."""

import contextlib
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from project_folder import ROOT, Project
from small_grid import tracked_runs

from pipeline.grid.results import CellResults
from pipeline.host.heartbeat import STOPPED

pytestmark = pytest.mark.slow

CELL = "lra-listops-rmfa-exp-maclauformer-1"
COMMAND = [
    *(sys.executable, "-m", "pipeline.cli", "train", "--task", "lra-listops", "--attn", "rmfa", "--dotf", "exp"),
    *("--former", "maclauformer", "--seed", "1"),
]
STEPS, EVAL_EVERY = 900, 20


@pytest.fixture
def prepared(project: Project, invoke: Callable[..., tuple[int, str, str]]) -> Project:
    project.add_code()
    project.set("task.lra-listops.training.steps", STEPS)
    project.set("task.lra-listops.training.eval_every", EVAL_EVERY)
    for command in ("download", "preprocess"):
        assert invoke(command, "--task", "lra-listops")[0] == 0
    return project


def start(folder: Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        COMMAND,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def test_killed_three_times_it_ends_with_the_same_bytes_and_one_run(prepared: Project, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(prepared.folder, undisturbed, ignore=shutil.ignore_patterns("undisturbed"))
    assert start(undisturbed).wait() == 0

    checkpoint = prepared.folder / "checkpoints/tiny" / CELL / "last.pt"
    moments = random.Random(0)
    for _ in range(3):
        before, child = modified(checkpoint), start(prepared.folder)
        while modified(checkpoint) == before:
            assert child.poll() is None, child.communicate()
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "it ended before it was killed: give it more steps"
    child = start(prepared.folder)
    assert child.wait() == 0, child.communicate()

    trained = (CellResults("tiny", CELL, folder).files()[:3] for folder in (prepared.folder, undisturbed))
    for ours, expected in zip(*trained, strict=True):
        assert ours.read_bytes() == expected.read_bytes(), ours
    assert not checkpoint.exists()

    assert tracked_runs(prepared.folder) == {CELL: list(range(EVAL_EVERY, STEPS + 1, EVAL_EVERY))}


def test_of_three_that_train_one_cell_at_once_two_wait_and_no_step_is_logged_twice(prepared: Project) -> None:
    children = [start(prepared.folder) for _ in range(3)]
    ended = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], ended
    waited = [f"{CELL}: another process trains it; waiting for its end" in out for out, _ in ended]
    assert sorted(waited) == [False, True, True]
    assert tracked_runs(prepared.folder) == {CELL: list(range(EVAL_EVERY, STEPS + 1, EVAL_EVERY))}
    with contextlib.closing(sqlite3.connect(prepared.folder / "mlflow.db")) as database:
        assert database.execute("select count(*) from logged_models").fetchone() == (1,)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_at_the_next_step_and_goes_on_from_there(
    prepared: Project, number: signal.Signals
) -> None:
    import torch

    prepared.set("task.lra-listops.training.steps", 10_000)
    prepared.set("task.lra-listops.training.eval_every", 5_000)
    checkpoint = prepared.folder / "checkpoints/tiny" / CELL / "last.pt"
    for expected in (0, 1):
        child = start(prepared.folder, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        while not checkpoint.with_name("progress.json").exists():
            assert child.poll() is None, child.communicate()
            time.sleep(0.01)
        child.send_signal(number)
        _, err = child.communicate()
        assert child.returncode == STOPPED, err
        progress = torch.load(checkpoint, weights_only=True)["progress"]
        assert err.splitlines()[-1] == f"error: {CELL}: stopped, and saved at step {progress['step']}"
        assert progress["resumed"] == expected
        checkpoint.with_name("progress.json").unlink()


def test_full_disk_ends_in_one_line_and_keeps_what_was_there(prepared: Project) -> None:
    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    # The tracking database needs more than that too, so it has to exist.
    child = start(prepared.folder)
    while not (prepared.folder / "checkpoints/tiny" / CELL / "last.pt").exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.kill()
    child.wait()
    checkpoint = prepared.folder / "checkpoints/tiny" / CELL / "last.pt"
    before = checkpoint.read_bytes()

    child = start(prepared.folder, preexec_fn=limit_files)
    _, err = child.communicate()
    assert child.returncode == 1, err
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir() if path.suffix == ".tmp"] == []
    assert CellResults("tiny", CELL, prepared.folder).metrics() is None


def test_read_only_folder_ends_in_one_line(prepared: Project) -> None:
    blocked = prepared.folder / "checkpoints"
    # A file where a folder is needed stops root as well, whom permissions do not.
    blocked.write_text("")
    child = start(prepared.folder)
    _, err = child.communicate()
    assert child.returncode == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert "checkpoints" in err.splitlines()[-1]
    assert "Traceback" not in err
