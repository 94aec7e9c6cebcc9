"""The backend of this machine: each worker is a child process in a session of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path

import psutil

from pipeline.launch._engine import DEVICE_VARIABLE
from pipeline.launch._job import Attempt, Device, Ended, Job
from pipeline.lease import LEASE_VARIABLE


@dataclass
class _Worker:
    """A worker that was asked for.

    Attributes:
        pid: of the leader of its process group; None until the nursery has told.
        ended: how it ended.
        doomed: it is to be killed as soon as it is there.
    """

    pid: int | None = None
    ended: Ended | None = None
    doomed: bool = False


class LocalBackend:
    """Workers on this machine, forked from one process that has imported what takes long.

    Args:
        devices: where they may run.
        logs: the folder in which this checkout's grids keep their leases.
    """

    def __init__(self, devices: Sequence[Device], logs: Path) -> None:
        self.devices = devices
        self._logs = logs.absolute()
        self._nursery: _Nursery | None = None

    def clear(self) -> None:
        """Kill the processes of earlier grids, which carry the path of their lease in the environment."""
        leftover = [process for process in psutil.process_iter() if self._is_leftover(process)]
        for process in leftover:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(leftover)
        for lease in self._logs.glob("lease-*"):
            lease.unlink(missing_ok=True)

    def start(self, job: Job, device: str, attempt: Attempt) -> _Worker:
        attempt.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **attempt.environment, **_device_environment(device), "PATH": _search_path()}
        if self._nursery is not None and not self._nursery.is_alive():
            self._nursery.hear()
            self._nursery = None
        if self._nursery is None:
            self._nursery = _Nursery(environment, attempt.folder)
        return self._nursery.start(attempt, environment)

    def waits(self, handle: _Worker) -> bool:
        return handle.pid is None and handle.ended is None

    def poll(self, handle: _Worker) -> Ended | None:
        if handle.ended is None and self._nursery is not None:
            self._nursery.hear()
        return handle.ended

    def kill(self, handle: _Worker) -> None:
        handle.doomed = True
        if handle.pid is not None and handle.ended is None:
            _kill_group(handle.pid)

    def close(self) -> None:
        if self._nursery is not None:
            self._nursery.close()

    def _is_leftover(self, process: psutil.Process) -> bool:
        try:
            lease = process.environ().get(LEASE_VARIABLE)
        except (psutil.Error, OSError):
            return False
        return lease is not None and process.pid != os.getpid() and Path(lease).parent == self._logs


class _Nursery:
    """The process that forks workers, and those that have not ended.

    Args:
        environment: with the lease, by which whatever comes from this process can be told.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._connection, theirs = Pipe()
        self._workers: list[_Worker] = []
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.launch.nursery", str(theirs.fileno())],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def start(self, attempt: Attempt, environment: Mapping[str, str]) -> _Worker:
        worker = _Worker()
        self._connection.send((len(self._workers), attempt.arguments, environment, attempt.log))
        self._workers.append(worker)
        return worker

    def hear(self) -> None:
        """Take note of what the nursery has told, and of its end."""
        try:
            while self._connection.poll():
                number, pid, status = self._connection.recv()
                worker = self._workers[number]
                worker.pid = pid
                if status is not None:
                    # A worker that was killed cannot take its stage along.
                    _kill_group(pid)
                    worker.ended = Ended(status)
                elif worker.doomed:
                    _kill_group(pid)
        except (EOFError, ConnectionError):
            status = self._process.wait()
            for worker in self._workers:
                if worker.ended is None:
                    if worker.pid is not None:
                        _kill_group(worker.pid)
                    worker.ended = Ended(None, f"the process that starts workers ended with status {status}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


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
