"""One grid at a time in a checkout, and what its user asks for by signals."""

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from schoenbat.errors import UserError

_WAIT_SECONDS = 0.5
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def only_grid(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other grid runs in this checkout, and keep others waiting inside the block.

    The system releases the lock when its process ends, however that happens.

    Raises:
        UserError: the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grid.lock"
    with path.open("a+", encoding="utf-8") as file:
        told = False
        while not _lock(file.fileno(), path):
            if not told:
                file.seek(0)
                say(f"another grid runs in this checkout (process {file.read().strip() or '?'}); waiting for its end")
                told = True
            time.sleep(_WAIT_SECONDS)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise UserError(
                f"the file system of {path.parent.absolute()} has no file locks ({error.strerror}), so grids and DVC "
                "could damage each other's files; put the checkout on one that has"
            ) from error
        raise
    return True


class StopSignals:
    """Counts SIGINT, SIGTERM and SIGHUP inside the block: one asks to stop, a second to stop at once."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        return self.count

    def __enter__(self) -> "StopSignals":
        # `nohup` ignores SIGHUP, and that is to stay so.
        wanted = [number for number in _STOPS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
