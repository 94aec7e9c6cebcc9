"""Progress of one long operation on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


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
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar_task = self._bar.add_task(label, total=None, detail="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Say that `done` of `total` is done; `detail` is shown beside it."""
        done, total = done // self._scale, total // self._scale
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=done, total=total, detail=detail)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self.line(f"{self._label}: {done}/{total} {detail}".rstrip())

    def line(self, text: str) -> None:
        """Print one line that stays, above the bar if there is one."""
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
