"""The process that does one job: `python -m pipeline.launch.worker [--force] STAGE...`, or a fork of the nursery.

It is `dvc --wait-for-lock repro --single-item --no-run-cache STAGE...` with four differences: it stops when the grid's
lease ends, it says in the outcome file why a stage failed, it reads and writes DVC's lock file stage by stage, and the
project's own commands are run by forks. It leads a process group; whoever ends that group ends the stage with it.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

from pipeline.launch import OUTCOME_VARIABLE
from pipeline.launch._forks import fork, name_process, preload, set_environment
from pipeline.lease import STOPPED, watch

_EXIT_STATUS = re.compile(r"exited with (-?\d+)$")
_COMMAND = "schoenbat-exp"
_NAME = "schoenbat-work"


def main(arguments: Sequence[str]) -> int:
    """Do a job in a process of its own; the status of `lead`."""
    preload()
    return lead(arguments)


def lead(arguments: Sequence[str]) -> int:
    """Do a job: one fork takes the stages through DVC, and others run their commands.

    DVC has threads, so it cannot fork; this process has one.

    Returns:
        0 when all stages are done, STOPPED when asked to stop, 1 otherwise. If DVC is killed, this process dies alike.
    """
    name_process(_NAME)
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt_group)
    ours, theirs = Pipe()
    dvc = fork("schoenbat-dvc", lambda: _take_stages(arguments, theirs), ours)
    theirs.close()
    while True:
        try:
            words, environment, folder = ours.recv()
        except EOFError:
            ended, status = os.waitpid(dvc, 0)
            break
        fork(_COMMAND, lambda: _run_command(words, environment, folder), ours)  # noqa: B023 - called at once
        ended, status = os.waitpid(-1, 0)
        if ended == dvc:
            break
        ours.send(os.waitstatus_to_exitcode(status))
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


def _take_stages(arguments: Sequence[str], leader: Connection) -> int:
    signal.signal(signal.SIGTERM, _interrupt_group)
    lease_ended = watch()
    from dvc.exceptions import DvcException

    from pipeline.record.dvc_project import drop_damaged_rwlock, project, run_commands

    def run_command(words: Sequence[str], environment: Mapping[str, str], folder: str) -> int:
        leader.send((words, environment, folder))
        return leader.recv()

    run_commands(_COMMAND, run_command)
    force = arguments[:1] == ["--force"]
    stage, killed_before = "", _kills_for_memory()
    try:
        drop_damaged_rwlock()
        with project() as repo:
            for stage in arguments[force:]:
                # DVC could restore results that it has seen before, but not what the stage tells MLflow.
                repo.reproduce(stage, single_item=True, force=force, run_cache=False)
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


def _run_command(words: Sequence[str], environment: Mapping[str, str], folder: str) -> int:
    set_environment(environment)
    os.chdir(folder)
    sys.argv = list(words)
    from pipeline.cli import main

    main(sys.argv[1:])


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
