"""The interface between the engine and what starts its processes: a job, one attempt at it, and a backend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

State = Literal["queued", "started", "done", "retried", "failed", "unavailable", "skipped", "stopped"]

Kind = Literal["usage", "unavailable", "failed", "memory", "crash", "timeout", "stopped"]
"""Why an attempt did not succeed. "memory" and "crash" are tried again, "stopped" (somebody asked for it, the work is
saved) goes back into the queue or ends with the grid, and the others would fail in the same way again."""


@dataclass(frozen=True)
class Work:
    """One command of a job.

    Attributes:
        name: the stage of DVC that it belongs to.
        command: a line of shell; a plain `schoenbat-exp ...` is run without starting Python anew.
        environment: variables for this command.
    """

    name: str
    command: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What one worker does: stages, one after the other, in one process.

    Attributes:
        name: unique in a grid, and the name of the log: the id of a cell, or what else is done.
        stages: in the order in which they run.
        needs: names of the jobs before it; one that is not in the grid counts as done.
        seconds: how long it is expected to take; the longest are started first.
        memory_mb: its measured peak on the device; None if it has never been measured.
        exclusive: it measures time, so nothing else runs beside it, and it comes after everything else.
        timeout_seconds: an attempt that takes longer is ended; None for no limit.
        saves: an attempt that is cut short leaves a checkpoint, so that the next one is shorter.
    """

    name: str
    stages: tuple[Work, ...]
    needs: tuple[str, ...] = ()
    seconds: float = 0.0
    memory_mb: float | None = None
    exclusive: bool = False
    timeout_seconds: float | None = None
    saves: bool = False


@dataclass(frozen=True)
class Device:
    """Where jobs run. At most `slots` at once, and no more than fit into its memory.

    Attributes:
        name: "cpu", "cuda:0", or any name that means something to its backend.
        memory_mb: what jobs may use of it; None leaves memory to the backend, which then only has slots.
        unknown_alone: a job whose memory was never measured gets the device for itself.
    """

    name: str
    slots: int
    memory_mb: float | None = None
    unknown_alone: bool = False


@dataclass(frozen=True)
class Attempt:
    """The process that does a job, ready to be started in the current folder, which is the same wherever it runs.

    Attributes:
        file: holds the stages of the job, for the worker.
        environment: variables to set, besides those of the engine's own process.
        log: takes stdout and stderr; append to it.
    """

    file: Path
    environment: Mapping[str, str]
    log: Path


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
        code: the exit status of the worker, negative for a signal; None when it was lost with its machine.
        reason: what the backend knows and the worker's own files cannot say, such as "node n3 is down".
        resume: the attempt was cut short by the scheduler (walltime, preemption): queue it again, at no cost
            if its job saves.
        memory: the system has killed it for lack of memory.
    """

    code: int | None
    reason: str = ""
    resume: bool = False
    memory: bool = False


class Backend(Protocol):
    """Starts workers and says when they have ended. Only the engine's thread calls it, and no call may block long.

    A backend has nothing to do with asking workers to stop: they watch the engine's heartbeat, a file that it touches
    and deletes, and stop by themselves within seconds when it is gone or stale, having saved their work.
    """

    @property
    def devices(self) -> Sequence[Device]: ...

    def clear(self) -> None:
        """End whatever a killed grid of this checkout has left running; called once, before anything else."""

    def start(self, job: Job, device: str, attempt: Attempt) -> Any:
        """Start one attempt on a device and return a handle for it. OSError counts as a crash of the job."""

    def waits(self, handle: Any) -> bool:
        """Whether the attempt is still in a queue of the backend's own; its time starts when it leaves that."""

    def poll(self, handle: Any) -> Ended | None:
        """How the attempt ended, or None while it is queued or running. Once ended, no process of it is left."""

    def kill(self, handle: Any) -> None:
        """End the attempt and all its processes at once; `poll` then says so."""

    def close(self) -> None:
        """Release what the backend holds; every attempt has ended or been killed."""


@dataclass(frozen=True)
class Event:
    """A change of state of one job.

    Attributes:
        job: its name.
        state: "retried" goes back into the queue; "unavailable" is a failure because data cannot be had here;
            "skipped" means that a job before it did not succeed; "stopped" that the grid ended before it did.
        text: the time taken for "done", the device for "started", the reason for the others.
        log: the file with all output of the job; None if it was never started.
        cause: for "failed", "unavailable" and "skipped", what did not succeed in the first place: a DVC stage.
    """

    job: str
    state: State
    text: str = ""
    log: Path | None = None
    cause: str | None = None
