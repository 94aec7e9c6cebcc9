"""The backend of a cluster: workers in Slurm jobs, which Parsl starts and ends as cells wait or are done.

A Slurm job, a "block", takes several cells one after the other and side by side, so a short cell does not queue by
itself. Whose job it is stands in its comment, the path of the grid's lease: so the jobs of a grid that was killed are
found again, without a record that could have been lost with it.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.grid.params import RunParams
from pipeline.launch._engine import DEVICE_VARIABLE
from pipeline.launch._job import Attempt, Device, Ended, Job
from pipeline.launch.local import LocalBackend
from pipeline.lease import LEASE_VARIABLE
from schoenbat.errors import UserError

_COMMENT = "schoenbat "
_COMMANDS = ("sbatch", "squeue", "scancel")
_COMMAND_SECONDS = 15.0
"""Longer, and cells would take the engine that waits for the answer for dead."""
_AWAY_SECONDS, _AWAY_STOPPING_SECONDS = 300.0, 10.0
"""How long Slurm may fail to answer before an attempt whose job it ran is given up: in general, and at the end."""
_CLEAR_SECONDS = 120.0
_LOOK_SECONDS = 2.0
_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
)
_CUT_SHORT = ("PREEMPTED", "TIMEOUT")


@dataclass
class _Attempt:
    """One attempt, from the moment at which it was handed to Parsl.

    Attributes:
        future: of what `run_attempt` returns.
        claim: the file that says which Slurm job runs it.
        withdrawn: it was killed before it started.
        waiting: there was no claim when it was last looked for, at the time `looked`.
        lost: since when Slurm has been asked in vain what became of it.
        culprit: its Slurm job was cancelled on its account.
    """

    future: Any
    claim: Path
    withdrawn: bool = False
    waiting: bool = True
    looked: float = 0.0
    lost: float = 0.0
    culprit: bool = False


def plan_slurm(run: RunParams, jobs: int | None) -> tuple[list[Device], int]:
    """The cluster as one device, and how many cells run at once on it.

    Args:
        run: settings; those of `run.slurm` say what a Slurm job asks for.
        jobs: as wished; None for as many as the blocks take.

    Raises:
        UserError: Parsl or Slurm's commands are missing, Slurm refuses what a job asks for, or no cell at once.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {jobs}")
    _check_tools()
    try:
        minutes, cores = run.slurm.walltime_minutes, _cores(run)
        _call("sbatch", "--test-only", *_options(run), f"--cpus-per-task={cores}", f"--time={minutes}", "--wrap=true")
    except UserError as error:
        raise UserError(f"run.slurm: {error}") from None
    slots = run.slurm.max_blocks * run.slurm.cells_per_block
    return [Device("slurm", slots)], slots if jobs is None else min(jobs, slots)


class SlurmBackend:
    """Workers in Slurm jobs.

    Args:
        run: settings.
        devices: of `plan_slurm`.
        logs: the folder in which this checkout's grids keep their leases.
    """

    def __init__(self, run: RunParams, devices: Sequence[Device], logs: Path) -> None:
        self.devices = devices
        self._run, self._logs = run, logs.absolute()
        self._folder = self._logs / ".slurm"
        self._lease = Path()
        self._pool: Any = None
        self._count = 0
        self._cancelled: set[str] = set()
        self._states: dict[str, tuple[str, Path]] = {}
        self._silence = ""
        self._looked = float("-inf")

    def clear(self) -> None:
        """End what earlier grids have left on this machine and in Slurm, and wait until it is gone.

        Raises:
            UserError: Slurm does not answer, or a job does not end.
        """
        end = time.monotonic() + _CLEAR_SECONDS
        while left := [job for job, (state, lease) in _jobs(self._logs).items() if state not in _ENDED]:
            _cancel(left)
            if time.monotonic() > end:
                raise UserError(f"Slurm jobs of an earlier grid do not end: {' '.join(left)}; end them with scancel")
            time.sleep(_LOOK_SECONDS)
        LocalBackend((), self._logs).clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, job: Job, device: str, attempt: Attempt) -> _Attempt:
        if self._pool is None:
            from pipeline.launch._parsl import Pool

            self._folder.mkdir(parents=True, exist_ok=True)
            self._lease = Path(attempt.environment[LEASE_VARIABLE])
            options = [*_options(self._run), f'--comment="{_COMMENT}{self._lease}"']
            self._pool = Pool(self._run.slurm, options, _cores(self._run), self._folder, self._lease)
        self._count += 1
        claim = self._folder / f"attempt-{self._count}"
        attempt.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {DEVICE_VARIABLE: "cuda:0"} if self._run.slurm.gpus_per_block else {}
        return _Attempt(self._pool.submit(attempt, environment, claim), claim)

    def waits(self, handle: _Attempt) -> bool:
        # One look a second, because the files can be on a server.
        if handle.waiting and time.monotonic() - handle.looked >= 1.0:
            handle.waiting, handle.looked = not handle.claim.exists(), time.monotonic()
            if handle.waiting and not self._lease.exists():
                # The grid is to stop, and nobody else watches the lease for an attempt that has not started.
                self.kill(handle)
        return handle.waiting

    def poll(self, handle: _Attempt) -> Ended | None:
        if handle.withdrawn:
            return Ended(-signal.SIGKILL)
        self._pool.check()
        if not handle.future.done():
            return None
        error = handle.future.exception()
        if error is not None:
            return self._lost(handle, error)
        code, cut_short = handle.future.result()
        if cut_short and code != 0:
            return Ended(code, "the walltime of its Slurm job was over", resume=True)
        return Ended(code)

    def kill(self, handle: _Attempt) -> None:
        try:
            handle.claim.open("x").close()
        except FileExistsError:
            Path(f"{handle.claim}.kill").touch()
        else:
            handle.withdrawn = True

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            left = [
                job for job, (state, lease) in _jobs(self._logs).items() if lease == self._lease and state not in _ENDED
            ]
            if left:
                _cancel(left)

    def _lost(self, handle: _Attempt, error: BaseException) -> Ended | None:
        """How an attempt ended of which Parsl has lost sight; its Slurm job is ended first, so that nothing is left."""
        if not handle.claim.exists():
            return Ended(None, f"Slurm jobs fail: {_last_line(str(error))} (see {self._folder})")
        job = handle.claim.read_text(encoding="utf-8")
        try:
            state = self._state(job)
            if state not in _ENDED and job not in self._cancelled:
                _cancel([job])
                self._cancelled.add(job)
                handle.culprit = True
        except UserError as silence:
            handle.lost = handle.lost or time.monotonic()
            patience = _AWAY_SECONDS if self._lease.exists() else _AWAY_STOPPING_SECONDS
            return None if time.monotonic() - handle.lost < patience else Ended(None, str(silence))
        if state not in _ENDED:
            return None
        if handle.culprit:
            return Ended(None, f"Slurm job {job}: {_last_line(str(error))}")
        return Ended(None, f"Slurm job {job}: {state}", resume=state in _CUT_SHORT or job in self._cancelled)

    def _state(self, job: str) -> str:
        """The state of a Slurm job; one that it has forgotten has ended. Raises UserError if Slurm does not answer."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            try:
                self._states, self._silence = _jobs(self._logs), ""
            except UserError as error:
                self._silence = str(error)
            self._looked = time.monotonic()
        if self._silence:
            raise UserError(self._silence)
        return self._states.get(job, ("COMPLETED", self._lease))[0]


def _cores(run: RunParams) -> int:
    """Of one block."""
    return run.slurm.cells_per_block * run.threads


def _options(run: RunParams) -> list[str]:
    """Of sbatch, for one block, besides cores and walltime."""
    slurm = run.slurm
    wanted = {"partition": slurm.partition, "account": slurm.account, "gpus-per-node": slurm.gpus_per_block}
    # Parsl replaces a job that ends too early, and would not know of one that Slurm starts again.
    return [*(f"--{name}={value}" for name, value in wanted.items() if value), "--no-requeue", *slurm.options]


def _check_tools() -> None:
    absent = [command for command in _COMMANDS if shutil.which(command) is None]
    if absent:
        raise UserError(
            f"no {', '.join(absent)} here: run --backend slurm where Slurm's commands are, such as on a login node, "
            "or use --backend local"
        )
    if importlib.util.find_spec("parsl") is None:
        raise UserError("--backend slurm needs Parsl: pip install -e 'pipeline[cluster]'")


def _jobs(logs: Path) -> dict[str, tuple[str, Path]]:
    """The Slurm jobs of this checkout that are waiting, running or not long ended: state and lease by id."""
    found = {}
    for line in _call(
        "squeue", f"--user={os.getuid()}", "--states=all", "--noheader", "--format=%A|%T|%k"
    ).splitlines():
        job, state, comment = line.split("|", 2)
        lease = Path(comment.removeprefix(_COMMENT))
        if comment.startswith(_COMMENT) and lease.parent == logs:
            found[job] = state, lease
    return found


def _cancel(jobs: Sequence[str]) -> None:
    _call("scancel", "--quiet", *jobs)


def _call(*command: str) -> str:
    """What one of Slurm's commands prints; raises UserError with what it says if it fails or does not answer."""
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} does not answer") from None
    if found.returncode != 0:
        raise UserError(f"{command[0]}: {_last_line(found.stderr)}")
    return found.stdout


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
