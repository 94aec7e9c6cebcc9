"""The heartbeat file of a grid: workers stop when it is deleted or stale.

The engine touches it every few seconds and deletes it when they shall stop; each worker and each stage watches it. So
nothing survives an engine that was killed, on whatever machine, and stopping needs no signal that has to travel there.
Watchers compare the file's time with what it was before, never with their own clock, so clocks may differ.
"""

import contextlib
import os
import secrets
import signal
import threading
import time
from pathlib import Path

HEARTBEAT_VARIABLE = "SCHOENBAT_HEARTBEAT"
STAGE_VARIABLE = "DVC_STAGE"
"""Tells a command which stage it is; DVC sets it too."""
OUTCOME_VARIABLE = "SCHOENBAT_OUTCOME_FILE"
"""Names a file into which a failing command writes {"kind": ..., "message": ...}."""
TOUCH_SECONDS = 2.0
EXPIRY_SECONDS = 20.0
STOPPED = 75
"""The exit code of a command that was asked to stop and has saved its work; EX_TEMPFAIL of sysexits.h."""
GRACE_SECONDS = 12.0
"""What is still running so long after it was asked to stop is killed."""
_WATCH_SECONDS = 0.5
_REPEAT_SECONDS = 2.0


class Heartbeat:
    """The heartbeat as the engine keeps it, a file in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = (folder / f"heartbeat-{os.getpid()}-{secrets.token_hex(4)}").absolute()
        self.path.touch()
        self._touched = time.monotonic()

    def renew(self) -> None:
        if time.monotonic() - self._touched >= TOUCH_SECONDS:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path)
            self._touched = time.monotonic()

    def end(self) -> None:
        """Ask all who watch to stop."""
        self.path.unlink(missing_ok=True)


def watch() -> threading.Event:
    """If this process has a heartbeat, stop its process group, and set the event, when that ends."""
    ended = threading.Event()
    path = os.environ.get(HEARTBEAT_VARIABLE)
    if path:
        threading.Thread(target=_watch, args=(Path(path), ended), name="heartbeat", daemon=True).start()
    return ended


def wait_for_end(path: Path, seconds: float) -> None:
    """Return when a heartbeat has not been touched for so many seconds, or at once when it is deleted."""
    seen, since = -1, time.monotonic()
    with contextlib.suppress(FileNotFoundError):
        while time.monotonic() - since < seconds:
            modified = path.stat().st_mtime_ns
            if modified != seen:
                seen, since = modified, time.monotonic()
            time.sleep(_WATCH_SECONDS)


def _watch(path: Path, ended: threading.Event) -> None:
    wait_for_end(path, EXPIRY_SECONDS)
    ended.set()
    # Repeated, because a process that just starts is not ready for it.
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end:
        os.killpg(0, signal.SIGINT)
        time.sleep(_REPEAT_SECONDS)
    os.killpg(0, signal.SIGKILL)
