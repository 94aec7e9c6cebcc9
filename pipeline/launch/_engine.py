"""The engine: starts jobs as their needs, devices and memory allow, tries again what may succeed, and stops in order.

One thread, one loop. All that it knows is also in a file (`GridState`), from which `schoenbat-exp status` tells.
"""

import json
import math
import signal
import time
from bisect import insort
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.host.files import peek
from pipeline.host.heartbeat import GRACE_SECONDS, HEARTBEAT_VARIABLE, OUTCOME_VARIABLE, STOPPED, Heartbeat
from pipeline.launch._job import Attempt, Backend, Ended, Event, Job, Kind, State
from pipeline.launch._placement import Load, place
from pipeline.launch._state import GridState
from schoenbat.files import write_bytes

DEVICE_VARIABLE = "SCHOENBAT_DEVICE"
"""The device of a stage, in place of `run.device`."""

LOOP_SECONDS = 0.1
_TRIED_AGAIN: tuple[Kind, ...] = ("memory", "crash")


@dataclass
class _Task:
    """A job on its way through the grid; `handle` is the backend's, or how it ended if it could not be started."""

    job: Job
    waits_for: set[str]
    failures: int = 0
    alone: bool = False
    load: Load | None = None
    handle: Any = None
    began: float = 0.0
    timed_out: bool = False


@dataclass(frozen=True)
class Options:
    """How a grid is run.

    Attributes:
        logs: the folder for one log and one outcome per job.
        environment: variables for the workers.
        jobs: how many run at once, on all devices together.
        retries: how often a job that crashed or ran out of memory is tried again.
        holds: whether exclusive jobs, which are about to start, have to wait for something else.
    """

    logs: Path
    environment: Mapping[str, str]
    jobs: int = 1
    retries: int = 2
    holds: Callable[[], bool] = lambda: False


def run_jobs(
    jobs: Sequence[Job],
    backend: Backend,
    heartbeat: Heartbeat,
    options: Options,
    state: GridState,
    stops: Callable[[], int] = lambda: 0,
) -> Generator[Event | None, None, None]:
    """Run jobs, as many at once as the backend's devices take; one that fails stops only those that need it.

    Of what can run, the longest is started first. Crashes and lack of memory are tried again, the latter alone on a
    device. What stopped itself without being asked (a walltime, a paused machine) goes back into the queue if it saves.

    Args:
        jobs: in any order; a need that is not among them counts as done.
        backend: starts the workers; it is not closed here.
        heartbeat: what the workers watch; ended when the grid shall stop.
        state: is told everything.
        stops: how often the user has asked to stop: once lets workers save their work, twice ends them.

    Yields:
        Events, and None whenever there is none for a moment, so that the caller can refresh what it shows. When the
        caller stops iterating, everything that runs is ended.
    """
    options.logs.mkdir(parents=True, exist_ok=True)
    engine = _Engine(jobs, backend, heartbeat, options, state)
    try:
        yield from engine.run(stops)
    finally:
        engine.end()


class _Engine:
    def __init__(
        self, jobs: Sequence[Job], backend: Backend, heartbeat: Heartbeat, options: Options, state: GridState
    ) -> None:
        names = {job.name for job in jobs}
        self._backend, self._heartbeat, self._options, self._state = backend, heartbeat, options, state
        self._loads = [Load(device) for device in backend.devices]
        self._tasks = {job.name: _Task(job, {need for need in job.needs if need in names}) for job in jobs}
        self._dependents: dict[str, list[str]] = {}
        for task in self._tasks.values():
            for need in task.waits_for:
                self._dependents.setdefault(need, []).append(task.job.name)
        self._ready = sorted((task for task in self._tasks.values() if not task.waits_for), key=_longest_first)
        self._running: dict[str, _Task] = {}
        self._stopping = False
        self._kill_at = float("inf")

    def run(self, stops: Callable[[], int]) -> Generator[Event | None, None, None]:
        for name, task in self._tasks.items():
            known = math.isfinite(task.job.seconds)
            self._state.set(name, "queued", expected=max(task.job.seconds, 0.0) if known else 0.0)
            yield Event(name, "queued")
        yield from self._turn(stops)

    def end(self) -> None:
        """Leave nothing running behind."""
        self._stop()
        for _ in self._turn(lambda: 1):
            pass

    def _turn(self, stops: Callable[[], int]) -> Generator[Event | None, None, None]:
        while self._running or (self._ready and not self._stopping):
            self._heartbeat.renew()
            requests = stops()
            if requests:
                self._stop()
            if requests > 1 or time.monotonic() > self._kill_at:
                for task in self._running.values():
                    self._kill(task)
            if not self._stopping:
                yield from self._start_what_fits()
            ended = [(task, how) for task in self._running.values() if (how := self._poll(task)) is not None]
            for task, how in ended:
                yield from self._take_back(task, how)
            self._state.save_now_and_then()
            if not ended:
                yield None
                time.sleep(LOOP_SECONDS)
        for name, task in self._tasks.items():
            if self._state.is_open(name):
                self._state.set(name, "stopped")
                yield Event(name, "stopped", log=self._log(name) if task.began else None)
        self._state.save()

    def _stop(self) -> None:
        """Ask the workers to stop, once."""
        if self._stopping:
            return
        self._stopping = True
        # A worker ends itself before; only one that is stopped or stuck needs this.
        self._kill_at = time.monotonic() + GRACE_SECONDS + 2
        self._heartbeat.end()

    def _start_what_fits(self) -> Generator[Event, None, None]:
        waiting: list[_Task] = []
        for position, task in enumerate(self._ready):
            if not self._has_room():
                waiting += self._ready[position:]
                break
            exclusive, load = task.job.exclusive, None
            if not exclusive or self._is_alone():
                load = place(task.job, self._loads, alone=task.alone or exclusive)
            if load is None:
                waiting.append(task)
            else:
                yield from self._start(task, load)
        self._ready = waiting

    def _has_room(self) -> bool:
        return (
            len(self._running) < self._options.jobs
            and not any(task.job.exclusive for task in self._running.values())
            and not all(load.is_full() for load in self._loads)
        )

    def _is_alone(self) -> bool:
        """Return whether nothing is left but exclusive jobs, none of which runs or is held."""
        others = (name for name, task in self._tasks.items() if not task.job.exclusive)
        return not self._running and not any(map(self._state.is_open, others)) and not self._options.holds()

    def _start(self, task: _Task, load: Load) -> Generator[Event, None, None]:
        job, log = task.job, self._log(task.job.name)
        self._outcome(job.name).unlink(missing_ok=True)
        if not task.began:
            log.unlink(missing_ok=True)
        device = load.device.name
        file = self._options.logs / f"{job.name}.job.json"
        environment = {
            **self._options.environment,
            "PYTHONUNBUFFERED": "1",
            HEARTBEAT_VARIABLE: str(self._heartbeat.path),
            OUTCOME_VARIABLE: str(self._outcome(job.name).absolute()),
        }
        task.began, task.timed_out, task.load = time.monotonic(), False, load
        load.claim(job, task.alone or job.exclusive)
        self._running[job.name] = task
        self._state.set(job.name, "running", device=device, log=str(log), attempt=task.failures + 1)
        try:
            # The next grid writes it anew.
            write_bytes(file, json.dumps([vars(stage) for stage in job.stages]).encode(), durable=False)
            task.handle = self._backend.start(job, device, Attempt(file, environment, log))
        except OSError as error:
            task.handle = Ended(None, f"could not be started: {error}")
        yield Event(job.name, "started", device, log)

    def _kill(self, task: _Task) -> None:
        if not isinstance(task.handle, Ended):
            self._backend.kill(task.handle)

    def _poll(self, task: _Task) -> Ended | None:
        if isinstance(task.handle, Ended):
            return task.handle
        waits = self._backend.waits(task.handle)
        if waits != (self._state.jobs[task.job.name]["state"] == "waiting"):
            self._state.set(task.job.name, "waiting" if waits else "running")
        if waits:
            task.began = time.monotonic()
        limit = task.job.timeout_seconds
        if limit is not None and not task.timed_out and time.monotonic() - task.began > limit:
            task.timed_out = True
            self._kill(task)
        return self._backend.poll(task.handle)

    def _take_back(self, task: _Task, how: Ended) -> Generator[Event, None, None]:
        name, log = task.job.name, self._log(task.job.name)
        assert task.load is not None
        del self._running[name]
        task.load.release(name)
        seconds = time.monotonic() - task.began
        if how.code == 0:
            self._state.set(name, "done", seconds=seconds)
            for dependent in self._dependents.get(name, ()):
                waiter = self._tasks[dependent]
                waiter.waits_for.discard(name)
                if not waiter.waits_for and self._state.is_open(dependent):
                    self._queue(waiter)
            yield Event(name, "done", f"{seconds:.1f} s", log)
            return
        kind, reason, stage = self._why(task, how)
        if kind == "stopped" or self._stopping:
            self._state.set(name, "queued", reason=reason)
            if not self._stopping:
                self._queue(task)
                yield Event(name, "retried", f"{reason}; goes on from its checkpoint", log)
            return
        task.failures += 1
        if kind in _TRIED_AGAIN and task.failures <= self._options.retries:
            task.alone = task.alone or kind == "memory"
            self._state.set(name, "queued", reason=reason)
            self._queue(task)
            yield Event(name, "retried", f"{kind}: {reason}", log)
            return
        # For who asks after the grid has ended.
        self._outcome(name).write_text(json.dumps({"kind": kind, "message": reason, "stage": stage}), encoding="utf-8")
        outcome: State = "unavailable" if kind == "unavailable" else "failed"
        self._state.set(name, outcome, reason=reason, kind=kind, seconds=seconds)
        yield Event(name, outcome, reason, log, stage)
        yield from self._skip_dependents(name, stage)

    def _skip_dependents(self, name: str, cause: str) -> Generator[Event, None, None]:
        for dependent in self._dependents.get(name, ()):
            if self._state.is_open(dependent):
                self._state.set(dependent, "skipped", reason=f"needs {cause}")
                yield Event(dependent, "skipped", f"needs {cause}", cause=cause)
                yield from self._skip_dependents(dependent, cause)

    def _queue(self, task: _Task) -> None:
        insort(self._ready, task, key=_longest_first)

    def _why(self, task: _Task, how: Ended) -> tuple[Kind, str, str]:
        """Why an attempt did not succeed: kind, reason, and the stage in which it happened."""
        told = peek(self._outcome(task.job.name)) or {}
        stage = told.get("stage") or task.job.stages[-1].name
        if task.timed_out:
            assert task.job.timeout_seconds is not None
            return "timeout", f"took more than {task.job.timeout_seconds / 60:g} minutes", stage
        if how.resume or how.code == STOPPED:
            # Without a checkpoint it might be cut short for ever.
            kind: Kind = "stopped" if task.job.saves or self._stopping else "crash"
            return kind, how.reason or "stopped itself", stage
        if how.memory:
            return "memory", "killed by the system, which had run out of memory", stage
        if how.reason or how.code is None:
            return "crash", how.reason or "lost", stage
        if how.code < 0:
            return "crash", f"ended by {signal.Signals(-how.code).name}", stage
        return told.get("kind", "crash"), told.get("message") or _last_line(self._log(task.job.name)), stage

    def _log(self, name: str) -> Path:
        return self._options.logs / f"{name}.log"

    def _outcome(self, name: str) -> Path:
        return self._options.logs / f"{name}.outcome.json"


def _longest_first(task: _Task) -> tuple[bool, float]:
    return task.job.exclusive, -task.job.seconds


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 10_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
