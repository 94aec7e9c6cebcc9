"""The process that does one job: `python -m pipeline.launch.worker [--force] STAGE...`.

It is `dvc --wait-for-lock repro --single-item STAGE...` with three differences: it stops when the grid's lease ends, it
says in the outcome file why a stage failed, and it reads and writes DVC's lock file stage by stage. It leads a process
group, so that whoever ends that group ends the stage with it.
"""

import json
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType

from pipeline.launch import OUTCOME_VARIABLE
from pipeline.lease import STOPPED, watch

_EXIT_STATUS = re.compile(r"exited with (-?\d+)$")


def main(arguments: list[str]) -> int:
    """Run the stages; 0 when all are done, STOPPED when asked to stop, 1 otherwise."""
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt_group)
    lease_ended = watch()
    from dvc.exceptions import DvcException

    from pipeline.dvc_project import drop_damaged_rwlock, project

    force = arguments[:1] == ["--force"]
    stage, killed_before = "", _kills_for_memory()
    try:
        drop_damaged_rwlock()
        with project() as repo:
            for stage in arguments[force:]:
                repo.reproduce(stage, single_item=True, force=force)
    except KeyboardInterrupt:
        _tell("stopped", "stopped between two stages", stage)
        return STOPPED
    except DvcException as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        found = _EXIT_STATUS.search(reason)
        status = int(found[1]) if found else 1
        if status == STOPPED or lease_ended.is_set():
            _tell("stopped", "stopped", stage)
            return STOPPED
        if status in (-signal.SIGKILL, 128 + signal.SIGKILL) and _kills_for_memory() > killed_before:
            _tell("memory", "killed by the system, which had run out of memory", stage)
        elif status < 0 or status > 128:
            _tell("crash", f"ended by {_signal_name(status)}", stage)
        else:
            # What the command itself printed last says more than that it failed.
            _tell("crash", "" if found else reason, stage)
        return 1
    return 0


def _interrupt_group(number: int, frame: FrameType | None) -> None:
    os.killpg(0, signal.SIGINT)


def _tell(kind: str, message: str, stage: str) -> None:
    """Add to what the stage's own command said, if it said anything, which of the stages it was."""
    path = Path(os.environ[OUTCOME_VARIABLE])
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"kind": kind, "message": message}
    path.write_text(json.dumps({**told, "stage": stage}), encoding="utf-8")


def _kills_for_memory() -> int:
    """How many processes of this machine Linux has killed for lack of memory; 0 where it cannot be told."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _signal_name(status: int) -> str:
    number = -status if status < 0 else status - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
