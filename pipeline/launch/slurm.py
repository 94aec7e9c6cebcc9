"""The backend of a cluster: one Slurm job for each attempt, by sbatch, squeue and scancel.

Each attempt watches a heartbeat of its own: a link, beside the heartbeat of the grid, that leads there. So it stops
with the grid, and by itself when only its link is deleted. The comment of its Slurm job is the path of the link, so one
look at the queue finds every job of this checkout, also of a grid that was killed, without a record of their ids.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.grid.params import RunParams
from pipeline.host.heartbeat import GRACE_SECONDS, HEARTBEAT_VARIABLE, STOPPED
from pipeline.launch._engine import DEVICE_VARIABLE
from pipeline.launch._job import Attempt, Device, Ended, Job
from pipeline.launch.local import LocalBackend
from schoenbat.errors import UserError

_COMMENT = "schoenbat "
_COMMANDS = ("sbatch", "squeue", "scancel")
_WIDTHS = {"JobID": 20, "State": 20, "exit_code": 20, "Comment": 4200}
_COMMAND_SECONDS = 15.0
_LOOK_SECONDS = 2.0
_NOTICE_SECONDS = 30
"""So long before the walltime is over, or up to a minute more, Slurm asks an attempt to stop and save."""
_AWAY_SECONDS = 300.0
"""How long Slurm may refuse a job or give no answer before the attempt counts as lost."""
_CLEAR_SECONDS, _CANCEL_SECONDS = 120.0, 60.0
"""How long jobs that are cancelled may take to end: those of an earlier grid, and one of this grid."""
_WAITING = ("PENDING", "CONFIGURING")
_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
)


@dataclass(frozen=True)
class _SlurmJob:
    """A Slurm job as a look at the queue finds it; `status` is that of wait(2)."""

    id: str
    state: str
    status: int

    def ended(self) -> Ended:
        """Return how the attempt in it ended."""
        if self.state == "COMPLETED":
            return Ended(0)
        if self.state == "FAILED" and self.status != 0:
            code = os.waitstatus_to_exitcode(self.status)
            cut_short = code == STOPPED
            return Ended(code, "asked to stop before its walltime is over" if cut_short else "", resume=cut_short)
        reason, cut_short = f"Slurm job {self.id}: {self.state}", self.state in ("PREEMPTED", "TIMEOUT")
        return Ended(None, reason, resume=cut_short, memory=self.state == "OUT_OF_MEMORY")


@dataclass
class _Attempt:
    """One attempt, from the moment at which it is handed over.

    Attributes:
        began, tried: when it was handed to sbatch for the first and for the last time.
        link: its heartbeat.
        submitted: the time at which sbatch has taken it.
        waits: Slurm has not started it yet.
        stopped: since when its heartbeat has ended.
    """

    job: Job
    attempt: Attempt
    began: float
    tried: float
    link: Path
    submitted: "Future[float]"
    waits: bool = True
    stopped: float | None = None
    ended: Ended | None = None


def plan_slurm(run: RunParams, jobs: int | None) -> tuple[list[Device], int]:
    """Return the cluster as one device, and how many cells run at once on it: as wished, or `max_jobs`.

    Raises:
        UserError: Slurm's commands are missing, or Slurm refuses what a job asks for.
    """
    if absent := [command for command in _COMMANDS if shutil.which(command) is None]:
        raise UserError(
            f"no {', '.join(absent)} here: run --backend slurm where Slurm's commands are, such as on a login node, "
            "or use --backend local"
        )
    try:
        _call("sbatch", "--test-only", *_options(run), "--wrap=true")
    except UserError as error:
        raise UserError(f"run.slurm: {error}") from None
    slots = run.slurm.max_jobs
    return [Device("slurm", slots)], slots if jobs is None else min(jobs, slots)


class SlurmBackend:
    """Workers in Slurm jobs. One thread calls Slurm's commands, so that the engine never waits for an answer.

    The heartbeats of this checkout's grids are in `logs`.
    """

    def __init__(self, run: RunParams, devices: Sequence[Device], logs: Path) -> None:
        self.devices = devices
        self._run, self._logs = run, logs.absolute()
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="slurm")
        self._count = 0
        self._looking: Future[tuple[float, dict[Path, _SlurmJob]]] | None = None
        self._jobs: dict[Path, _SlurmJob] = {}
        self._silence = ""
        self._asked = self._refreshed = time.monotonic()

    def clear(self) -> None:
        """End what earlier grids have left on this machine and in Slurm, and wait until it is gone; or UserError."""
        end = time.monotonic() + _CLEAR_SECONDS
        while left := [job.id for job in _find(self._logs).values() if job.state not in _ENDED]:
            _call("scancel", "--quiet", *left)
            if time.monotonic() > end:
                raise UserError(f"Slurm jobs of an earlier grid do not end: {' '.join(left)}; end them with scancel")
            time.sleep(_LOOK_SECONDS)
        LocalBackend((), self._logs).clear()

    def start(self, job: Job, device: str, attempt: Attempt) -> _Attempt:
        now = time.monotonic()
        return _Attempt(job, attempt, now, now, *self._submit(job, attempt))

    def waits(self, handle: _Attempt) -> bool:
        return handle.waits

    def poll(self, handle: _Attempt) -> Ended | None:
        self._refresh()
        if handle.ended is None:
            handle.ended = self._look_for(handle)
            if handle.ended is not None:
                handle.link.unlink(missing_ok=True)
        return handle.ended

    def kill(self, handle: _Attempt) -> None:
        # The worker stops without it, and the next look at the queue cancels its job.
        handle.link.unlink(missing_ok=True)

    def close(self) -> None:
        self._caller.shutdown(cancel_futures=True)
        if self._count:
            self._look()

    def _submit(self, job: Job, attempt: Attempt) -> tuple[Path, "Future[float]"]:
        """Hand an attempt to sbatch, with a new link: had it been taken before after all, that job would do nothing."""
        self._count += 1
        heartbeat = Path(attempt.environment[HEARTBEAT_VARIABLE])
        link = heartbeat.with_name(f"{heartbeat.name}-{self._count}")
        link.symlink_to(heartbeat.name)
        output = str(attempt.log.absolute()).replace("%", "%%")
        options = [f"--job-name={job.name}", f"--comment={_COMMENT}{link}", f"--output={output}", "--open-mode=append"]
        device = {DEVICE_VARIABLE: "cuda:0"} if self._run.device.startswith("cuda") else {}
        environment = {**os.environ, **attempt.environment, **device, HEARTBEAT_VARIABLE: str(link)}
        command = [sys.executable, "-m", "pipeline.launch.worker", str(attempt.file.absolute())]
        script = [
            "#!/bin/bash",
            f"[ -e {shlex.quote(str(link))} ] || exit {STOPPED}",
            self._run.slurm.worker_init,
            f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}",
        ]

        def submit() -> float:
            _call("sbatch", *_options(self._run), *options, script="\n".join(script), environment=environment)
            return time.monotonic()

        return link, self._caller.submit(submit)

    def _look_for(self, handle: _Attempt) -> Ended | None:
        """Return how an attempt ended, or None; one that is lost has not ended before its heartbeat must have ended it.

        Slurm calls a job on a lost node ended though it may run on, and forgets ended jobs after some minutes.
        """
        now = time.monotonic()
        if handle.stopped is None and not handle.link.exists():
            handle.stopped = now
        stopped = handle.stopped
        if not handle.submitted.done():
            return Ended(-signal.SIGKILL) if stopped is not None and handle.submitted.cancel() else None
        if refusal := handle.submitted.exception():
            if stopped is not None or not isinstance(refusal, UserError) or now - handle.began > _AWAY_SECONDS:
                return Ended(None, f"could not be started: {refusal}")
            if now - handle.tried > _LOOK_SECONDS:
                handle.link.unlink(missing_ok=True)
                handle.link, handle.submitted = self._submit(handle.job, handle.attempt)
                handle.tried = now
            return None
        found, lost = self._jobs.get(handle.link), ""
        if found is not None:
            handle.waits = found.state in _WAITING
            if found.state in _ENDED and found.state != "NODE_FAIL":
                return found.ended()
        if self._silence and (stopped is not None or now - self._asked > _AWAY_SECONDS):
            lost = self._silence
        elif found is None and self._asked > handle.submitted.result():
            lost = "its Slurm job is not in the queue any more"
        elif found is not None and (
            found.state == "NODE_FAIL" or (stopped is not None and now - stopped > _CANCEL_SECONDS)
        ):
            lost = f"Slurm job {found.id}: {found.state}"
        if lost and stopped is None:
            self.kill(handle)
        is_over = lost and stopped is not None and now - stopped > GRACE_SECONDS + _LOOK_SECONDS
        return Ended(None, lost) if is_over else None

    def _refresh(self) -> None:
        """Take what the last look at the queue has found, and have another one taken."""
        if self._looking is None:
            if time.monotonic() - self._refreshed >= _LOOK_SECONDS:
                self._looking = self._caller.submit(self._look)
        elif self._looking.done():
            try:
                (self._asked, self._jobs), self._silence = self._looking.result(), ""
            except UserError as error:
                self._silence = str(error)
            self._looking, self._refreshed = None, time.monotonic()

    def _look(self) -> tuple[float, dict[Path, _SlurmJob]]:
        """Return the jobs of this checkout and when that was, and cancel those that are not wanted any more."""
        asked, jobs = time.monotonic(), _find(self._logs)
        # One that has begun is given the time to save its work, unless it is its own link that has gone.
        unwanted = [
            job.id
            for link, job in jobs.items()
            if job.state not in (*_ENDED, "COMPLETING")
            and not link.exists()
            and (job.state in _WAITING or not link.is_symlink())
        ]
        if unwanted:
            _call("scancel", "--quiet", *unwanted)
        return asked, jobs


def _options(run: RunParams) -> list[str]:
    """Return what every Slurm job asks of sbatch."""
    slurm = run.slurm
    wanted = {"partition": slurm.partition, "account": slurm.account, "cpus-per-task": run.threads}
    if run.device.startswith("cuda") and not any("gpu" in option for option in slurm.options):
        wanted["gpus-per-node"] = 1
    asked = [f"--{name}={value}" for name, value in wanted.items() if value is not None]
    # The engine queues again, once nothing of the attempt runs any more; Slurm itself would not wait for that.
    asked += ["--no-requeue", "--export=ALL", f"--time={slurm.walltime_minutes}", f"--signal=B:TERM@{_NOTICE_SECONDS}"]
    return asked + slurm.options


def _find(logs: Path) -> dict[Path, _SlurmJob]:
    """Return the Slurm jobs of this checkout that are waiting, running or not long ended, by their links."""
    fields = ",".join(f"{name}:{width}" for name, width in _WIDTHS.items())
    found = {}
    for line in _call(
        "squeue", f"--user={os.getuid()}", "--states=all", "--noheader", f"--Format={fields}"
    ).splitlines():
        job, state, status, *comment = line.split(maxsplit=3)
        link = Path("".join(comment).removeprefix(_COMMENT).rstrip())
        if link.parent == logs:
            found[link] = _SlurmJob(job, state, int(status))
    return found


def _call(*command: str, script: str = "", environment: Mapping[str, str] | None = None) -> str:
    """Return what one of Slurm's commands prints; raises UserError in its own words, or if it does not answer."""
    run = partial(subprocess.run, capture_output=True, text=True, errors="replace", timeout=_COMMAND_SECONDS)
    try:
        found = run(command, input=script, env=environment)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} does not answer") from None
    if found.returncode != 0:
        said = [line.strip() for line in found.stderr.splitlines() if line.strip()]
        raise UserError(f"{command[0]}: {said[-1] if said else 'no reason given'}")
    return found.stdout
