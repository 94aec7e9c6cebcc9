"""Hashes are those of DVC."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.hashes import Hashes, hash_of


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


@pytest.mark.parametrize("replaced", [False, True])
def test_what_is_remembered_of_a_file_is_forgotten_when_its_size_or_its_place_on_the_disk_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """Also where its time is that of before, as after `cp --preserve`."""
    monkeypatch.chdir(tmp_path)
    file, memory = Path("file"), Path("hashes.json")

    def write(path: Path, text: str) -> None:
        path.write_text(text)
        os.utime(path, (1e9, 1e9))

    write(file, "before")
    hashes = Hashes(memory)
    before = hashes.of("file")
    hashes.save()
    assert Hashes(memory).of("file") == before
    assert before in memory.read_text()
    if replaced:
        write(Path("other"), "behind")
        Path("other").replace(file)
    else:
        write(file, "longer than before")
    assert Hashes(memory).of("file") == hash_of("file") != before
