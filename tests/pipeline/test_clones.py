"""Two clones of one project: what one has published and pushed, the other has, pulls, and goes on from."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project_folder import ROOT, Project
from small_grid import CELLS, MEAN, make_small, numbers

from pipeline.grid.results import CellResults

pytestmark = pytest.mark.slow


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


def shown_of(*command: str) -> set[str]:
    """The files of results that a command of DVC's shows."""
    return set(re.findall(r"runs/tiny/[^/]+/(?:metrics|test)/0\.json", call(Path.cwd(), "dvc", *command)))


def test_published_results_are_in_git_and_a_colleague_who_pulls_the_weights_has_nothing_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Project
) -> None:
    first, second, shared = tmp_path / "first", tmp_path / "second", tmp_path / "shared"
    first.mkdir()
    monkeypatch.chdir(first)
    make_small(first)
    for name in (".gitignore", ".dvc/.gitignore"):
        shutil.copy(ROOT / name, first / name)
    config = (ROOT / ".dvc/config").read_text()
    (first / ".dvc/config").write_text(f"{config}    remote = shared\n['remote \"shared\"']\n    url = {shared}\n")
    git(first, "init")
    git(first, "add", "--all")
    git(first, "commit", "--message", "code")

    call(first, "pipeline.cli", "run", "--grid", "--jobs", "2")
    # A run of a profile that is not published leaves nothing else for git.
    assert git(first, "status", "--porcelain").split() == ["??", "dvc.lock", "??", "numerics/"]
    published = Path(".gitignore").read_text()
    Path(".gitignore").write_text(published.replace("!/*/cpu/\n", "!/*/cpu/\n!/*/tiny/\n"))
    git(first, "add", "--all")
    git(first, "commit", "--message", "results")
    in_git = git(first, "ls-files", "runs/tiny")
    assert {"bench.csv", "bench-checks.csv", "0.npz"} < {Path(name).name for name in in_git.split()}
    assert not re.search(r"\.pt|\.gitignore", in_git)

    git(tmp_path, "clone", str(first), str(second))
    monkeypatch.chdir(second)
    assert numbers(second) == numbers(first)
    results = {str(file) for cell in CELLS for file in CellResults("tiny", cell).files() if file.suffix == ".json"}
    assert shown_of("metrics", "show", "--json") == results
    assert shown_of("metrics", "diff", "HEAD~1", "--json") == results
    (workspace, *_) = json.loads(call(second, "dvc", "exp", "show", "--json"))
    assert results <= workspace["data"]["metrics"].keys()
    call(second, "dvc", "plots", "show", "--out", "plots")
    page = Path("plots/index.html").read_text()
    assert all(f"{CellResults('tiny', cell).group}/curves" in page for cell in CELLS)
    shutil.rmtree("plots")
    report = files(first / "reports/tiny")
    shutil.rmtree("reports")
    call(second, "pipeline.cli", "report")
    assert files(second / "reports/tiny") == report
    assert git(second, "status", "--porcelain") == ""

    call(first, "dvc", "push")
    call(second, "dvc", "pull", "--allow-missing")
    weights = CellResults("tiny", MEAN).best
    assert (second / weights).read_bytes() == (first / weights).read_bytes()
    assert "nothing to do: all 2 cells" in call(second, "pipeline.cli", "run", "--grid")
    call(second, "pipeline.cli", "eval", *CELLS[MEAN], "--force")
    assert numbers(second) == numbers(first)
    assert git(second, "status", "--porcelain") == ""
