"""Fixtures of the pipeline's tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_node
import small_grid
import trained_project
from project_folder import Project


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "slurm_machine" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("slurm"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    # MLflow puts the address it was given into the environment, where the next test would find it.
    for name in ("SCHOENBAT_DATA_MIRROR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return Project(tmp_path)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original of the trained project, one for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return trained_project.train_once(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture
def trained(trained_once: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of a project of two cells that are trained and on record, as the current folder."""
    folder = project.folder / trained_once.name
    trained_project.hand_out(trained_once, folder)
    monkeypatch.chdir(folder)
    return small_grid.set_small(Project(folder))


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr)."""
    from pipeline.cli.app import main

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def slurm_machine() -> Iterator[slurm_node.Node]:
    """A running Slurm of one node with two CPUs."""
    if reason := slurm_node.missing():
        pytest.skip(f"no Slurm: {reason}")
    with slurm_node.slurm_node() as node:
        yield node
