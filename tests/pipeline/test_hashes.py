"""Hashes are those of DVC."""

import subprocess
import sys
from pathlib import Path

import pytest
from pipeline.hashes import hash_of


def test_a_folder_has_the_hash_that_dvc_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one in which a folder and a file begin alike, whose order by folders is not that of their whole paths."""
    from dvc.repo import Repo

    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    for name in ("errors.csv", "errors/a.csv", "errors-b/c.csv", "z"):
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "dvc.yaml").write_text("stages:\n  report:\n    cmd: 'true'\n    deps: [results]\n")
    with Repo(str(tmp_path)) as repo:
        (stage,) = repo.index.stages
        stage.save()
        assert hash_of("results") == stage.deps[0].hash_info.value
