"""schoenbat-exp doctor: what is wrong is named with what to do, and decides the exit code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from project_folder import Project

from pipeline.host.files import git_revision

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def whole(project: Project) -> Project:
    project.add_dvc()
    return project


def lines(out: str) -> dict[str, str]:
    return {line.split()[1]: line for line in out.splitlines()}


def made(folder: Path) -> set[str]:
    """What is in a folder, besides logs and what DVC needs while it looks."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {file for file in files if not file.startswith(("logs", ".dvc/tmp"))}


def test_where_everything_is_there_nothing_is_wrong_and_nothing_is_made(whole: Project, invoke: Invoke) -> None:
    before = made(whole.folder)
    code, out, err = invoke("doctor")
    assert (code, err) == (0, "")
    found = lines(out)
    assert list(found) == [
        "python",
        "settings",
        "code",
        "git",
        "torch",
        "compiled",
        "threads",
        "dvc",
        "mlflow",
        "disk",
        "data",
    ]
    assert all(line.split()[0] in ("ok", "note") for line in found.values())
    assert sys.version.split()[0] in found["python"]
    assert torch.__version__ in found["torch"]
    assert "profile tiny, 16 cells" in found["settings"]
    assert "stages out of date, or not here" in found["dvc"]
    assert "the first run makes its database" in found["mlflow"]
    assert "lra-text not fetched yet" in found["data"]
    assert made(whole.folder) == before


def test_findings_can_be_read_by_programs(whole: Project, invoke: Invoke) -> None:
    code, out, _ = invoke("doctor", "--json")
    report = json.loads(out)
    assert (code, report["ok"]) == (0, True)
    assert {finding["subject"] for finding in report["findings"]} >= {"torch", "dvc", "mlflow", "data"}
    assert all(set(finding) == {"subject", "state", "text", "mend"} for finding in report["findings"])


def no_such_device(project: Project) -> None:
    project.set("run.device", "cuda:99")


def too_many_threads(project: Project) -> None:
    project.set("run.threads", 1000)


def a_wrong_key(project: Project) -> None:
    project.set("grid.surprise", 1)


def no_mirror(project: Project) -> None:
    project.set("data", {"mirror": "nowhere"})


def no_dvc(project: Project) -> None:
    (project.folder / ".dvc" / "config").unlink()
    (project.folder / ".dvc").rmdir()


def results_on_another_disk(project: Project) -> None:
    other = project.folder.with_name(f"{project.folder.name} on another disk")
    other.mkdir()
    (project.folder / "runs").symlink_to(other)


def a_lock_file_cut_short(project: Project) -> None:
    (project.folder / "dvc.lock").write_text("<<<<<<< HEAD\n")


def a_database_of_noise(project: Project) -> None:
    (project.folder / "mlflow.db").write_bytes(b"noise" * 1000)


def other_code(project: Project) -> None:
    (project.folder / "schoenbat" / "norm.py").write_text("import torch\n")


@pytest.mark.parametrize(
    ("break_it", "subject", "said"),
    [
        (no_such_device, "torch", "to mend it: "),
        (too_many_threads, "threads", "to mend it: set run.threads to at most "),
        (a_wrong_key, "settings", "unknown key 'surprise'"),
        (no_mirror, "data", "to mend it: correct SCHOENBAT_DATA_MIRROR or data.mirror"),
        (no_dvc, "dvc", "to mend it: dvc init"),
        (results_on_another_disk, "dvc", "on another disk, out of the checkout, where DVC records nothing"),
        (a_lock_file_cut_short, "dvc", "settle it, or move it away"),
        (a_database_of_noise, "mlflow", "move it away"),
        (other_code, "code", "set PYTHONPATH="),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_wrong_is_one_line_that_says_how_to_mend_it(
    whole: Project, invoke: Invoke, break_it: Callable[[Project], None], subject: str, said: str
) -> None:
    break_it(whole)
    code, out, err = invoke("doctor")
    assert (code, err) == (1, "")
    found = lines(out)
    assert [name for name, line in found.items() if line.startswith("wrong")] == [subject]
    assert said in found[subject]


def test_a_grid_is_refused_where_its_results_would_lie_on_another_disk(whole: Project, invoke: Invoke) -> None:
    results_on_another_disk(whole)
    code, _, err = invoke("run", "--grid")
    assert code == 2
    assert err.startswith("error: runs is a link to ")
    assert not list(whole.folder.with_name(f"{whole.folder.name} on another disk").iterdir())


def test_a_checkout_of_another_user_has_no_revision_and_that_is_said(
    whole: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not a git repository" in lines(invoke("doctor")[1])["git"]
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    assert lines(invoke("doctor")[1])["git"] == f"ok     git       revision {git_revision().removesuffix('+')}"
    # As where the folder belongs to somebody else.
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert git_revision() == "none"
    code, out, _ = invoke("doctor")
    assert code == 0
    assert lines(out)["git"] == (
        f"note   git       detected dubious ownership in repository at '{whole.folder}'; "
        f"results will not name a revision; to mend it: git config --global --add safe.directory {whole.folder}"
    )
