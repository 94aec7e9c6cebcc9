"""The project of `small_grid`, trained as a grid and on record once for all tests of a session; each gets a copy.

Results, data and DVC's cache are hard links in a copy: programs put a new file in the place of an old one, and a test
that wants to change one in place has to unlink it first. All else is copied, and MLflow's database led to the copy.
"""

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

from filelock import FileLock
from small_grid import make_small, start_grid

LINKED = ("checkpoints", "data", "reports", "runs", ".dvc/cache")
ADDRESSES = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))
"""Columns of MLflow's database."""
OUTPUT = "output.txt"
"""What the grid said."""


def train_once(shared: Path) -> Path:
    """Return the original in a folder that the processes of a session share; the first of them makes it."""
    folder = shared / "trained" / "a folder with spaces"
    with FileLock(shared / "trained.lock"):
        if not (folder / OUTPUT).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            before = Path.cwd()
            os.chdir(folder)
            try:
                make_small(folder)
                grid = start_grid(folder, "--jobs", "2")
                output, _ = grid.communicate()
                assert grid.returncode == 0, output
            finally:
                os.chdir(before)
            (folder / OUTPUT).write_text(output)
    return folder


def hand_out(original: Path, target: Path) -> None:
    """Make a copy, after a look at whether a copy handed out before has changed the original."""
    untouched = (original / OUTPUT).stat().st_mtime_ns

    def copy(source: str, destination: str) -> str:
        if not any(Path(source).is_relative_to(original / folder) for folder in LINKED):
            return shutil.copy2(source, destination)
        assert os.stat(source).st_mtime_ns <= untouched, f"{source} was written in place"
        os.link(source, destination)
        return destination

    shutil.copytree(original, target, copy_function=copy, dirs_exist_ok=True)
    with contextlib.closing(sqlite3.connect(target / "mlflow.db")) as database, database:
        for table, column in ADDRESSES:
            moved = f"update {table} set {column} = replace({column}, ?, ?)"
            database.execute(moved, (str(original.parent), str(target.parent)))
