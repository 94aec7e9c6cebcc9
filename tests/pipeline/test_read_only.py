"""A checkout that may only be read can be asked everything."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator

import pytest
from project_folder import ROOT, Project

# Root may write everywhere, but for this.
PREFIX = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []


@pytest.fixture
def read_only(project: Project) -> Iterator[None]:
    """The current folder is a project that may only be read."""
    if PREFIX and shutil.which(PREFIX[0]) is None:
        pytest.skip("root may write everywhere, and there is no setpriv")
    project.add_dvc()
    paths = [project.folder, *project.folder.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    yield
    for path in paths:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("status",), 0, "profile tiny: 0 of 16 cells done, 16 to run"),
        (("results",), 0, "profile tiny: 0 of 16 cells done"),
        (("list", "dotf"), 0, "exp"),
        (("run", "--grid", "--dry-run"), 0, "profile tiny: 16 of 16 cells to run"),
        (("doctor",), 1, "cannot be written to"),
        (("report",), 1, "error: Permission denied: "),
        (("run", "--grid"), 1, "error: Permission denied: "),
    ],
)
def test_every_question_is_answered(read_only: None, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = subprocess.run(
        [*PREFIX, sys.executable, "-m", "pipeline.cli", *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert said in done.stdout
    assert "Traceback" not in done.stdout
