"""Two clones of one project: what one has trained and pushed, the other pulls and goes on from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project_folder import ROOT, Project
from small_grid import CELLS, MEAN, make_small, numbers, start_grid


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def call(folder: Path, module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_colleague_pulls_what_was_trained_and_has_nothing_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Project
) -> None:
    first, second, shared = tmp_path / "first", tmp_path / "second", tmp_path / "shared"
    first.mkdir()
    monkeypatch.chdir(first)
    make_small(first)
    shutil.copy(ROOT / ".gitignore", first)
    shutil.copy(ROOT / ".dvc/.gitignore", first / ".dvc")
    config = (ROOT / ".dvc/config").read_text()
    (first / ".dvc/config").write_text(f"{config}    remote = shared\n['remote \"shared\"']\n    url = {shared}\n")
    git(first, "init")
    git(first, "add", "--all")
    git(first, "commit", "--message", "code")

    grid = start_grid(first, "--jobs", "2")
    out, _ = grid.communicate()
    assert grid.returncode == 0, out
    assert {line.split()[-1] for line in git(first, "status", "--porcelain").splitlines()} == {"dvc.lock", "reports/"}
    call(first, "dvc", "push")
    git(first, "add", "--all")
    git(first, "commit", "--message", "results")

    git(tmp_path, "clone", str(first), str(second))
    call(second, "dvc", "pull", "--allow-missing")
    assert numbers(second) == numbers(first)
    weights = f"runs/tiny/{MEAN}/best.pt"
    assert (second / weights).read_bytes() == (first / weights).read_bytes()
    grid = start_grid(second)
    out, _ = grid.communicate()
    assert grid.returncode == 0, out
    assert "nothing to do: all 2 cells" in out
    assert git(second, "status", "--porcelain") == ""

    shown = json.loads(call(second, "dvc", "metrics", "show", "--json"))
    assert f"runs/tiny/{MEAN}/test.json" in shown[""]["data"]
    report = files(second / "reports")
    call(second, "pipeline.cli", "report")
    assert files(second / "reports") == report == files(first / "reports")
    call(second, "pipeline.cli", "eval", *CELLS[MEAN])
    assert numbers(second) == numbers(first)
