"""MLflow's database in a file: it is whole, or it is not there.

MLflow makes its tables in dozens of steps, and refuses a database in which only some of them were done or which several
processes made at once. So one process makes a new one aside and renames it.
"""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

_SQLITE = "sqlite:///"


def address(path: Path) -> str:
    """Return the URI of a database for processes in the current folder."""
    # In an address ? begins a query and % an escape, so a folder with such a name must not be part of it.
    return f"{_SQLITE}{os.path.relpath(path) if {'?', '%'} & set(str(path)) else path}"


def file_of(uri: str) -> Path | None:
    """Return the path of the database at `uri`; None for a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def is_absent(uri: str) -> bool:
    """Return whether `uri` names a file in which there is no database yet."""
    path = file_of(uri)
    return path is not None and not (path.is_file() and path.stat().st_size)


def create(path: Path, make_tables: Callable[[str], object]) -> None:
    """Create a database; `make_tables` makes the tables of one at a URI. To be called under a lock."""
    # MLflow remembers by its name that a database has its tables.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        make_tables(address(part))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        # Journals of a database that was deleted would be applied to the new one.
        for leftover in (*path.parent.glob(f".{path.name}.*.tmp*"), *path.parent.glob(f"{path.name}-*")):
            leftover.unlink(missing_ok=True)
