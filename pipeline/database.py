"""mlflow.db, which takes what MLflow records where no server is named: it is whole, or it is not there.

MLflow makes its tables in dozens of steps, and refuses a database in which only some of them were done. So a new one is
made aside and renamed. One that holds no run is made anew: nothing is lost, and it may be such a half-made one.
"""

import contextlib
import os
import sqlite3
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from schoenbat.errors import UserError

NAME = "mlflow.db"


def default_uri(root: Path) -> str:
    """The address of the database of the project in `root`, for processes in the current folder."""
    return _address(root / NAME)


def _address(path: Path) -> str:
    # In an address ? begins a query and % an escape, so a folder with such a name must not be part of it.
    return f"sqlite:///{os.path.relpath(path) if {'?', '%'} & set(str(path)) else path}"


def ensure(root: Path, make: Callable[[str], object]) -> None:
    """Make the database where there is none. To be called under a lock.

    Args:
        make: makes the tables of a new database at an address.

    Raises:
        UserError: the one that is there is damaged, or locked by another process.
    """
    path = root / NAME
    for leftover in root.glob(f".{NAME}.*"):
        leftover.unlink(missing_ok=True)
    if path.exists() and _holds_runs(path):
        return
    part = root / f".{NAME}.{os.getpid()}.tmp"
    try:
        make(_address(part))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        for journal in root.glob(f"{NAME}-*"):
            journal.unlink(missing_ok=True)
        part.replace(path)
    finally:
        for leftover in root.glob(f".{NAME}.*"):
            leftover.unlink(missing_ok=True)


def _holds_runs(path: Path) -> bool:
    address = f"file:{urllib.parse.quote(str(path))}?mode=rw"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
            return database.execute("select 1 from runs limit 1").fetchone() is not None
    except sqlite3.DatabaseError as error:
        if "no such table" in str(error):
            return False
        if "locked" in str(error):
            raise UserError(f"{path} is locked by another process; wait for its end and run again") from None
        raise UserError(
            f"{path} cannot be used ({error}); move it away and run again: reports do not need it"
        ) from None
