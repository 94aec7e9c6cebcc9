"""The backend of this machine: each worker is a child process in a session of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from pipeline.launch._engine import DEVICE_VARIABLE
from pipeline.launch._job import Attempt, Device, Ended, Job
from pipeline.lease import LEASE_VARIABLE


class LocalBackend:
    """Workers on this machine.

    Args:
        devices: where they may run.
        logs: the folder in which this checkout's grids keep their leases.
    """

    def __init__(self, devices: Sequence[Device], logs: Path) -> None:
        self.devices = devices
        self._logs = logs.absolute()

    def clear(self) -> None:
        """Kill the processes of earlier grids, which carry the path of their lease in the environment."""
        leftover = [process for process in psutil.process_iter() if self._is_leftover(process)]
        for process in leftover:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(leftover)
        for lease in self._logs.glob("lease-*"):
            lease.unlink(missing_ok=True)

    def start(self, job: Job, device: str, attempt: Attempt) -> "subprocess.Popen[bytes]":
        attempt.log.parent.mkdir(parents=True, exist_ok=True)
        with attempt.log.open("ab") as log:
            return subprocess.Popen(
                attempt.command,
                cwd=attempt.folder,
                env={**os.environ, **attempt.environment, **_device_environment(device), "PATH": _search_path()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def waits(self, handle: "subprocess.Popen[bytes]") -> bool:
        return False

    def poll(self, handle: "subprocess.Popen[bytes]") -> Ended | None:
        code = handle.poll()
        if code is None:
            return None
        # A worker that was killed cannot take its stage along.
        _kill_group(handle.pid)
        return Ended(code)

    def kill(self, handle: "subprocess.Popen[bytes]") -> None:
        if handle.poll() is None:
            _kill_group(handle.pid)

    def close(self) -> None:
        """Nothing is held."""

    def _is_leftover(self, process: psutil.Process) -> bool:
        try:
            lease = process.environ().get(LEASE_VARIABLE)
        except (psutil.Error, OSError):
            return False
        return lease is not None and process.pid != os.getpid() and Path(lease).parent == self._logs


def _kill_group(leader: int) -> None:
    """End a process group, and wait until no member is running: a zombie does nothing any more."""
    while True:
        try:
            os.killpg(leader, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
        if not _members(leader):
            return
        time.sleep(0.01)


def _members(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _device_environment(device: str) -> dict[str, str]:
    """A GPU becomes the only one that the worker sees; what is visible here decides which one it is."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return {DEVICE_VARIABLE: device}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    physical = visible.split(",")[int(index or 0)] if visible else index or "0"
    return {DEVICE_VARIABLE: "cuda:0", "CUDA_VISIBLE_DEVICES": physical}


def _search_path() -> str:
    """PATH with the folder of this interpreter first: the commands in dvc.yaml are found there."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
