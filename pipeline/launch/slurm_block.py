"""What runs inside a Slurm job: Parsl's worker pool under the grid's lease, and one attempt at a job in each worker.

`python -m pipeline.launch.slurm_block LEASE MODULE ARGUMENT...` runs a module of Parsl so that it ends when the engine
is gone. By itself it would stay, and with it the Slurm job. It outlives the lease by as long as cells take to save.
"""

import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.launch._engine import DEVICE_VARIABLE
from pipeline.launch._memory import kills_for_memory
from pipeline.lease import EXPIRY_SECONDS, GRACE_SECONDS, OUTCOME_VARIABLE, wait_for_end

BLOCK_END_VARIABLE = "SCHOENBAT_BLOCK_END"
"""When the walltime of the Slurm job is over, in seconds since 1970."""
END_SECONDS = 30.0
"""So long before that, attempts are asked to stop and save."""
_GPUS = "CUDA_VISIBLE_DEVICES"
_LOOK_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


def run_attempt(
    command: Sequence[str], environment: Mapping[str, str], folder: str, log: str, claim: str
) -> tuple[int, bool]:
    """Run the worker of one attempt to its end; no process of it is left afterwards.

    Args:
        command: the worker's argument vector.
        environment: variables to set, besides those of this process.
        folder: the worker's current folder.
        log: the file to which its output is appended.
        claim: a file that whoever makes it first owns: this function, or `SlurmBackend.kill`. It names the Slurm job.

    Returns:
        The exit status, negative for a signal, and whether the attempt was stopped because the Slurm job ends.
    """
    try:
        with Path(claim).open("x", encoding="utf-8") as file:
            file.write(os.environ["SLURM_JOB_ID"])
    except FileExistsError:
        return -signal.SIGKILL, False
    stop_at = float(os.environ[BLOCK_END_VARIABLE]) - END_SECONDS
    with Path(log).open("ab") as output:
        worker = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment, **pinned(os.environ, environment)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_stop_with_parent,
        )
    killed, kills = Path(f"{claim}.kill"), kills_for_memory()
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = worker.wait(_LOOK_SECONDS)
                if code == -signal.SIGKILL and kills_for_memory() > kills:
                    told = {"kind": "memory", "message": "killed by the system, which had run out of memory"}
                    Path(environment[OUTCOME_VARIABLE]).write_text(json.dumps(told), encoding="utf-8")
                    return 1, False
                return code, time.time() > stop_at
            if killed.exists() or time.time() > stop_at + GRACE_SECONDS:
                os.killpg(worker.pid, signal.SIGKILL)
            elif time.time() > stop_at:
                # Again and again, because a process that just starts is not ready for it.
                worker.terminate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)


def pinned(block: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that shows an attempt one of the GPUs of its Slurm job; none if it has no use for a GPU.

    Slurm says which GPUs a job has, so they are not simply numbered from 0; Parsl numbers the workers of a job.
    """
    gpus = [gpu for gpu in block.get(_GPUS, "").split(",") if gpu]
    if DEVICE_VARIABLE not in environment or not gpus:
        return {}
    return {_GPUS: gpus[int(block["PARSL_WORKER_RANK"]) % len(gpus)]}


def main(lease: str, module: str, *arguments: str) -> None:
    """Run a module as if it had been started itself, until the lease has not been renewed for some time."""
    # Ctrl-C in a terminal is for the engine alone.
    os.setpgrp()
    threading.Thread(target=_end_after, args=(Path(lease),), name="lease", daemon=True).start()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_after(lease: Path) -> None:
    wait_for_end(lease, EXPIRY_SECONDS + GRACE_SECONDS, kept=True)
    os.killpg(0, signal.SIGKILL)


def _stop_with_parent() -> None:
    """Where the system can do it, a worker gets SIGTERM when the process that waits for it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main(*sys.argv[1:])
