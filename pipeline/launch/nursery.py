"""The process from which the workers of this machine are forked: `python -m pipeline.launch.nursery DESCRIPTOR`.

On the connection whose descriptor it is given it receives (number, arguments, environment, log) for each worker to be
started, and sends (number, process id, None) when it has been and (number, process id, status) when it has ended. It
ends when nobody is at the other end any more.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.launch._forks import fork, preload, set_environment
from pipeline.launch.worker import lead

_WAIT_SECONDS = 0.05


def main(descriptor: int) -> None:
    preload()
    engine = Connection(descriptor)
    numbers: dict[int, int] = {}
    with suppress(EOFError, ConnectionError):
        while True:
            if engine.poll(_WAIT_SECONDS):
                number, arguments, environment, log = engine.recv()
                child = fork("schoenbat-new", lambda: _work(arguments, environment, log), engine)  # noqa: B023
                # Also done by the child; whoever ends its group must not come before both.
                with suppress(ProcessLookupError, PermissionError):
                    os.setpgid(child, child)
                numbers[child] = number
                engine.send((number, child, None))
            while numbers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                child, status = ended
                engine.send((numbers.pop(child), child, os.waitstatus_to_exitcode(status)))


def _work(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    set_environment(environment)
    return lead(arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]))
