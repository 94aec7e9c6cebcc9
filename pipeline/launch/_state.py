"""What a grid is doing, as a file that anybody can read while it runs and after it has died."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from schoenbat.files import write_bytes

OPEN = ("queued", "waiting", "running")
"""States of a job that has not come to an end."""
SAVE_SECONDS = 1.0
SAVE_SHARE = 0.05
"""Of the time of a grid, which saving takes at most."""


class GridState:
    """The state of every job of one grid, written to a file at most once a second, and less often if that takes long.

    The file names the grid's heartbeat: as long as that is touched, the grid is alive.
    """

    def __init__(self, path: Path, heartbeat: Path) -> None:
        self._path = path
        self._head = {"pid": os.getpid(), "heartbeat": str(heartbeat), "started": time.time()}
        self.jobs: dict[str, dict[str, Any]] = {}
        self._changed = False
        self._due = 0.0

    def set(self, name: str, state: str, **facts: Any) -> None:
        self.jobs.setdefault(name, {}).update(state=state, since=time.time(), **facts)
        self._changed = True

    def is_open(self, name: str) -> bool:
        return self.jobs[name]["state"] in OPEN

    def save_now_and_then(self) -> None:
        if self._changed and time.monotonic() >= self._due:
            self.save()

    def save(self) -> None:
        began = time.monotonic()
        # A full disk is no reason to end a grid, and after a power cut nothing of it is running.
        with contextlib.suppress(OSError):
            write_bytes(self._path, json.dumps({**self._head, "jobs": self.jobs}).encode(), durable=False)
            self._changed = False
        ended = time.monotonic()
        self._due = ended + max(SAVE_SECONDS, (ended - began) / SAVE_SHARE)
