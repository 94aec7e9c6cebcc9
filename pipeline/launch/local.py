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
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from pipeline.host.heartbeat import HEARTBEAT_VARIABLE
from pipeline.launch._engine import DEVICE_VARIABLE
from pipeline.launch._job import Attempt, Device, Ended, Job
from pipeline.launch._memory import kills_for_memory
from pipeline.launch.worker import work

_START_SECONDS, _STUCK_SECONDS = 300.0, 3.0
"""So long a start may take: in general, and when it is not wanted any more."""
_SERVER = "multiprocessing.forkserver"


@dataclass
class _Worker:
    """A worker that was asked for.

    Attributes:
        started: when its process, which leads a group, has begun.
        asked: when it was asked for.
        kills: of processes for lack of memory, up to then.
        doomed: since when it is to be killed.
        gone: since when its process is not there any more, though nobody has told how it ended.
    """

    process: BaseProcess
    started: "Future[None]"
    asked: float
    kills: int
    doomed: float | None = None
    gone: float | None = None
    ended: Ended | None = None


class LocalBackend:
    """Workers on this machine, forked from one process that has imported what takes long.

    Args:
        devices: where they may run.
        logs: the folder in which this checkout's grids keep their heartbeats.
    """

    def __init__(self, devices: Sequence[Device], logs: Path) -> None:
        self.devices = devices
        self._logs = logs.absolute()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pipeline.launch.preload"])
        self._starter: ThreadPoolExecutor | None = None
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
        attempt.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **attempt.environment, **_device_environment(device)}
        process = self._context.Process(target=work, args=(attempt.file, environment, attempt.log), daemon=True)
        # A fork server that is stopped or gone must not stop the engine.
        self._starter = self._starter or ThreadPoolExecutor(1, thread_name_prefix="start")
        started = self._starter.submit(self._start, process, attempt.environment.get(HEARTBEAT_VARIABLE, ""))
        return _Worker(process, started, time.monotonic(), kills_for_memory())

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
            limit = _START_SECONDS if handle.doomed is None else _STUCK_SECONDS
            if time.monotonic() - (handle.doomed or handle.asked) > limit:
                _kill_servers()
            return None
        error = handle.started.exception()
        if error is not None:
            return Ended(None, f"could not be started: {error or type(error).__name__}")
        pid = handle.process.pid
        assert pid is not None
        if handle.doomed is not None:
            _kill_group(pid)
            if not _is_running(pid):
                return Ended(-signal.SIGKILL)
        if not self._looking.acquire(blocking=False):
            return None
        try:
            code = handle.process.exitcode
        finally:
            self._looking.release()
        if code is None:
            return self._look_for_itself(handle, pid)
        # A worker that was killed cannot take its stage along; of one whose fork server is gone nothing is known.
        _kill_group(pid)
        if code == 255:
            return Ended(None, "the process that starts workers has ended")
        return Ended(code, memory=code == -signal.SIGKILL and kills_for_memory() > handle.kills)

    def _look_for_itself(self, handle: _Worker, pid: int) -> Ended | None:
        """How a worker has ended of whose end its fork server has not told in time."""
        if _is_running(pid):
            handle.gone = None
            return None
        handle.gone = handle.gone or time.monotonic()
        if time.monotonic() - handle.gone < _STUCK_SECONDS:
            return None
        _kill_servers()
        _kill_group(pid)
        return Ended(None, "the process that starts workers does not answer")

    def kill(self, handle: _Worker) -> None:
        if handle.doomed is None:
            handle.doomed = time.monotonic()

    def close(self) -> None:
        if self._starter is not None:
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
    """Make a GPU the only one that the worker sees; what is visible here decides which one it is."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return {DEVICE_VARIABLE: device}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    physical = visible.split(",")[int(index or 0)] if visible else index or "0"
    return {DEVICE_VARIABLE: "cuda:0", "CUDA_VISIBLE_DEVICES": physical}
