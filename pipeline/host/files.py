"""JSON and CSV files, locks, and facts about where a run happened."""

import csv
import io
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from schoenbat.errors import UserError
from schoenbat.files import write_bytes


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write `value` with sorted keys, so that equal values give equal bytes; `durable` as for `write_bytes`."""
    write_bytes(path, (json.dumps(value, sort_keys=True, indent=2) + "\n").encode(), durable=durable)


def read_json(path: Path) -> Any:
    """Return the content of a file; raises UserError if it is damaged, and FileNotFoundError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, error) from None


def peek(path: Path) -> Any:
    """Return the content of a JSON file; None where there is none, or somebody is writing it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}); delete it, and run again")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same columns; None leaves a place empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def remove_unfinished(folder: Path) -> None:
    """Delete what writers of files leave in `folder` when they are killed in the middle."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Wait until no other process is inside such a block, and keep others waiting; raises OSError without locks.

    The system releases the lock when its process ends, however that happens.

    Args:
        on_wait: called if there is somebody to wait for.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def git_revision() -> str:
    """Return the short commit of the working folder, with "+" when code differs; "none" outside a repository."""
    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "none"
    changed = git("status", "--porcelain", "--", "schoenbat", "pipeline")
    return f"{commit}+" if changed else commit


def git(*arguments: str) -> str | None:
    """Return what git says; None where it fails or is not there."""
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
