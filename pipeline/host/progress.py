"""Progress of one long operation: a bar or plain lines on stderr for who waits, and a small file for who asks."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from schoenbat.files import write_bytes

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_FILES = 1.0


class Meter:
    """Shows how far something is; use it as a context manager.

    Args:
        label: what is going on.
        scale: how many units of the caller make one unit shown, such as 10**6 for bytes shown as megabytes.
    """

    def __init__(self, label: str, scale: int = 1) -> None:
        self._label = label
        self._scale = scale
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(label, total=None, detail="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Show that `done` of `total` is done, with `detail` beside it."""
        done, total = done // self._scale, total // self._scale
        self._bar.update(self._task, completed=done, total=total, detail=detail)
        if self._bar.disable and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self.line(f"{self._label}: {done}/{total} {detail}".rstrip())

    def line(self, text: str) -> None:
        """Print one line that stays, above the bar if there is one."""
        self._last_line = time.monotonic()
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


class ProgressFile:
    """Where an operation stands, as a JSON file that is always whole; `schoenbat-exp status` reads it."""

    def __init__(self, path: Path, **facts: Any) -> None:
        self._path = path
        self._facts = {**facts, "pid": os.getpid()}
        self._written = 0.0

    def is_due(self) -> bool:
        """Return whether the file is a second old; asked before facts are collected that cost something."""
        return time.monotonic() - self._written >= SECONDS_BETWEEN_FILES

    def update(self, **facts: Any) -> None:
        """Add facts to those noted before, and write them."""
        self._facts |= facts
        # It is written often, and worth nothing after the machine went down.
        write_bytes(self._path, json.dumps({**self._facts, "updated": time.time()}).encode(), durable=False)
        self._written = time.monotonic()
