"""One grid at a time in a checkout, and what its user asks for by signals."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.host.files import locked
from schoenbat.errors import UserError

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def only_grid(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other grid runs in this checkout, and keep others waiting inside the block.

    Raises:
        UserError: the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / "grid.pid"

    def say_whose() -> None:
        number = owner.read_text(encoding="utf-8") if owner.exists() else "?"
        say(f"another grid runs in this checkout (process {number}); waiting for its end")

    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "grid.lock", say_whose))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UserError(
                f"the file system of {folder.absolute()} has no file locks ({error.strerror}), so grids and DVC "
                "could damage each other's files; put the checkout on one that has"
            ) from error
        owner.write_text(str(os.getpid()), encoding="utf-8")
        yield


@contextmanager
def counted_stops() -> Iterator[Callable[[], int]]:
    """Count SIGINT, SIGTERM and SIGHUP inside the block: one asks to stop, a second to stop at once."""
    received: list[int] = []
    # `nohup` ignores SIGHUP, and that is to stay so.
    wanted = [number for number in _STOPS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in wanted}
    try:
        yield lambda: len(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
