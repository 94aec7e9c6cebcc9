"""Stopping a stage so that nothing is lost: a signal is a request, and the work ends where its state is on disk."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.host.heartbeat import HEARTBEAT_VARIABLE


class Stopped(Exception):
    """The work was saved and ended because somebody asked for it."""


@contextmanager
def stop_request(on_request: Callable[[], None]) -> Iterator[None]:
    """Call `on_request` at the first SIGINT or SIGTERM inside the block; a person's second SIGINT ends the process.

    A grid repeats its signals, and kills what does not stop, so under its heartbeat all but the first are ignored.
    """
    requested = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT and HEARTBEAT_VARIABLE not in os.environ:
            raise KeyboardInterrupt
        if not requested:
            requested = True
            on_request()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        # The grid's repeated signals must not reach what is left to do, which is to say how it ended.
        ignored = requested and HEARTBEAT_VARIABLE in os.environ
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ignored else handler)
