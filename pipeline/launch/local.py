"""The backend of this machine: each worker is a child of the standard library's fork server and leads a group."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from pipeline.host.devices import physical_gpu
from pipeline.host.heartbeat import HEARTBEAT_VARIABLE
from pipeline.launch._engine import DEVICE_VARIABLE
from pipeline.launch._job import Attempt, Device, Ended, Job
from pipeline.launch.worker import work

_START_SECONDS, _STUCK_SECONDS = 300.0, 3.0
"""So long the fork server may take to answer: in general, and when nobody wants the answer any more."""
_SERVER = "multiprocessing.forkserver"


@dataclass
class _Worker:
    """A worker that was asked for.

    Attributes:
        started: done when its process, which leads a group, has begun.
        deadline: of its start.
        kills: of processes for lack of memory, before it started.
        doomed: it is to be killed.
    """

    process: BaseProcess
    started: "Future[None]"
    deadline: float
    kills: int
    doomed: bool = False
    ended: Ended | None = None


class LocalBackend:
    """Workers on this machine, forked from one process that has imported what takes long.

    The heartbeats of this checkout's grids are in `logs`.
    """

    def __init__(self, devices: Sequence[Device], logs: Path) -> None:
        self.devices = devices
        self._logs = logs.absolute()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pipeline.launch.preload"])
        # A fork server that is stopped or gone must not stop the engine.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="start")
        # Starting a process looks at those before, and two looks at once would take each other's answer.
        self._looking = threading.Lock()

    def clear(self) -> None:
        """Kill the processes of earlier grids, which carry the path of their heartbeat in the environment."""
        leftover = [process for process in psutil.process_iter() if self._is_leftover(process)]
        for process in leftover:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(leftover)
        for heartbeat in self._logs.glob("heartbeat-*"):
            heartbeat.unlink(missing_ok=True)

    def start(self, job: Job, device: str, attempt: Attempt) -> _Worker:
        environment = {**os.environ, **attempt.environment, **_device_environment(device)}
        process = self._context.Process(target=work, args=(attempt.file, environment, attempt.log), daemon=True)
        started = self._starter.submit(self._start, process, attempt.environment.get(HEARTBEAT_VARIABLE, ""))
        return _Worker(process, started, time.monotonic() + _START_SECONDS, _kills_for_memory())

    def _start(self, process: BaseProcess, heartbeat: str) -> None:
        # The fork server and whatever comes from it can be told by the heartbeat.
        os.environ[HEARTBEAT_VARIABLE] = heartbeat
        try:
            with self._looking:
                process.start()
        finally:
            del os.environ[HEARTBEAT_VARIABLE]

    def waits(self, handle: _Worker) -> bool:
        return not handle.started.done()

    def poll(self, handle: _Worker) -> Ended | None:
        if handle.ended is None:
            handle.ended = self._look(handle)
        return handle.ended

    def _look(self, handle: _Worker) -> Ended | None:
        if not handle.started.done():
            if time.monotonic() > handle.deadline:
                _kill_servers()
            return None
        error = handle.started.exception()
        if error is not None:
            return Ended(None, f"could not be started: {error or type(error).__name__}")
        pid = handle.process.pid
        assert pid is not None
        if handle.doomed:
            _kill_group(pid)
        if _is_running(pid):
            return None
        # A worker that was killed cannot take its stage along.
        _kill_group(pid)
        if handle.doomed:
            return Ended(-signal.SIGKILL)
        if not wait([handle.process.sentinel], _STUCK_SECONDS):
            _kill_servers()
            return Ended(None, "the process that starts workers does not answer")
        if not self._looking.acquire(blocking=False):
            return None
        try:
            code = handle.process.exitcode
        finally:
            self._looking.release()
        if code == 255:
            return Ended(None, "the process that starts workers has ended")
        return Ended(code, memory=code == -signal.SIGKILL and _kills_for_memory() > handle.kills)

    def kill(self, handle: _Worker) -> None:
        if not handle.doomed:
            handle.doomed = True
            handle.deadline = min(handle.deadline, time.monotonic() + _STUCK_SECONDS)

    def close(self) -> None:
        _kill_servers()
        self._starter.shutdown()

    def _is_leftover(self, process: psutil.Process) -> bool:
        try:
            heartbeat = process.environ().get(HEARTBEAT_VARIABLE)
        except (psutil.Error, OSError):
            return False
        return heartbeat is not None and process.pid != os.getpid() and Path(heartbeat).parent == self._logs


def _kill_servers() -> None:
    """End the fork server of this process, which begins another one when it needs it."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(_SERVER in word for word in child.cmdline()):
                child.kill()
                # Not reaped: multiprocessing does that when it begins another one, and not before all of it has ended.
                while _is_running(child.pid):
                    time.sleep(0.01)


def _kill_group(leader: int) -> None:
    """End a process group, and wait until no member is running: a zombie does nothing any more."""
    while True:
        try:
            os.killpg(leader, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # It has not made its group yet, or there is nothing left of it.
            if _is_running(leader):
                os.kill(leader, signal.SIGKILL)
            return
        if not any(True for _ in _members(leader)):
            return
        time.sleep(0.01)


def _members(group: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and _is_running(process.pid):
                yield process


def _is_running(pid: int) -> bool:
    """Whether any thread of a process is there: the main one can be a zombie before the others have ended."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except psutil.NoSuchProcess:
        return False


def _device_environment(device: str) -> dict[str, str]:
    """Make a GPU the only one that the worker sees."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return {DEVICE_VARIABLE: device}
    return {DEVICE_VARIABLE: "cuda:0", "CUDA_VISIBLE_DEVICES": physical_gpu(int(index or 0))}


def _kills_for_memory() -> int:
    """Return how many processes of this machine Linux has killed for lack of memory; 0 where it cannot be told."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
