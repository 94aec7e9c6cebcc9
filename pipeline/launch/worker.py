"""The process that does one job: a child of the fork server, or `python -m pipeline.launch.worker FILE`.

It runs the commands of stages one after the other. It leads a process group: whoever ends that group ends the stage.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.host.files import peek, read_json
from pipeline.host.heartbeat import OUTCOME_VARIABLE, STAGE_VARIABLE, STOPPED, watch
from pipeline.launch._job import Work

_PROGRAM = "schoenbat-exp"
_LOOK_SECONDS = 1.0


def work(file: Path, environment: Mapping[str, str], log: Path) -> None:
    """Do a job in a process of the fork server, which ends with the status of `do_job`."""
    status = 1
    try:
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        with log.open("ab") as output:
            os.dup2(output.fileno(), sys.stdout.fileno())
            os.dup2(output.fileno(), sys.stderr.fileno())
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(environment)
        status = do_job(file)
    except BaseException:  # noqa: BLE001 - as at the end of any process: shown, and then it is over
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def do_job(file: Path) -> int:
    """Run the stages that `file` holds; return 0 when all are done, STOPPED when asked to stop, 1 otherwise."""
    if sys.platform == "linux":
        Path("/proc/self/comm").write_text(_PROGRAM)
    # The commands in dvc.yaml are found beside this interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    stages = [Work(**stage) for stage in read_json(file)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    heartbeat_ended = watch()
    name = ""
    try:
        for stage in stages:
            name = stage.name
            status = _run(stage)
            if status == STOPPED or (status != 0 and heartbeat_ended.is_set()):
                _tell("stopped", "stopped", name)
                return STOPPED
            if status != 0:
                _tell("crash", _signal_name(status) if status < 0 or status > 128 else "", name)
                return 1
    except KeyboardInterrupt:
        _tell("stopped", "stopped between two stages", name)
        return STOPPED
    return 0


def _run(stage: Work) -> int:
    """Run the command of a stage; its exit status."""
    os.environ.update(stage.environment)
    os.environ[STAGE_VARIABLE] = stage.name
    print(f"> {stage.command}", flush=True)
    words = shlex.split(stage.command)
    if words[0] == _PROGRAM:
        from pipeline.stages.commands import run_command

        return run_command(words[1:])
    if words[0] == "dvc":
        _wait_for_others()
    return subprocess.run(stage.command, shell=True, stdin=subprocess.DEVNULL, check=False).returncode


def _wait_for_others() -> None:
    """Wait until no other process of DVC works in this project, beside which DVC refuses to run a stage."""
    from pipeline.record.writer import users_of_dvc

    told: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        while users := users_of_dvc():
            if users != told:
                print(f"waits for the end of: {', '.join(users)}", flush=True)
            told = users
            time.sleep(_LOOK_SECONDS)


def _interrupt(number: int, frame: object) -> None:
    os.killpg(0, signal.SIGINT)


def _tell(kind: str, message: str, stage: str) -> None:
    """Add to what the stage's own command said, if it said anything, which of the stages it was."""
    path = Path(os.environ[OUTCOME_VARIABLE])
    told = peek(path) or {"kind": kind, "message": message}
    path.write_text(json.dumps({**told, "stage": stage}), encoding="utf-8")


def _signal_name(status: int) -> str:
    number = -status if status < 0 else status - 128
    try:
        return f"ended by {signal.Signals(number).name}"
    except ValueError:
        return f"ended by signal {number}"


if __name__ == "__main__":
    sys.exit(do_job(Path(sys.argv[1])))
