"""What there is to do, as jobs: stages that are due, what they will probably take, and the devices they may have."""

import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from pipeline.devices import get_device
from pipeline.files import read_json
from pipeline.grid.cells import Cell, download_stage, preprocess_stage
from pipeline.grid.params import Params
from pipeline.launch._job import Device, Job
from pipeline.launch._placement import number_of_jobs
from pipeline.record.dvc_lock import read_blocks
from schoenbat.errors import UserError

_USABLE_SHARE = 0.9
"""Of a device's free memory."""
_TOKENS_PER_SECOND, _PAIRS_PER_SECOND = 2e4, 2e7
"""Guesses for cells of which no like has run: they decide nothing but the order."""


@dataclass(frozen=True)
class Resources:
    """What one like it took.

    Attributes:
        seconds_per_step: of training.
        memory_mb: the peak, on the kind of device that it ran on.
        device: "cpu" or "cuda".
    """

    seconds_per_step: float
    memory_mb: float
    device: str


def changed_stages(stages: Sequence[str]) -> set[str]:
    """Those of `stages` that have to run: DVC is asked once, and not at all if it has never seen any of them."""
    recorded = read_blocks()
    known = {stage for stage in stages if stage in recorded}
    if not known:
        return set(stages)
    from pipeline.record.dvc_project import changed_stages, drop_stale_rwlock

    drop_stale_rwlock()
    return (set(stages) - known) | (known & changed_stages())


def due_stages(graph: Mapping[str, Sequence[str]], changed: set[str]) -> dict[str, list[str]]:
    """The part of `graph` that is changed or comes after something changed."""
    due: dict[str, list[str]] = {}
    for stage, needs in graph.items():
        if stage in changed or any(need in due for need in needs):
            due[stage] = list(needs)
    return due


def data_job(task: str) -> str:
    """The name of the job that gets and prepares the data of a task."""
    return f"data-{task}"


def plan_jobs(
    params: Params, cells: Sequence[Cell], due: Mapping[str, Sequence[str]], *, device: str, force: bool = False
) -> list[Job]:
    """The jobs that do the stages of `due`: one per task for its data, one per cell, one for anything else.

    Args:
        device: the kind of device they run on, "cpu" or "cuda": memory is known for the kind it was measured on.
        force: do the cells' stages even if DVC finds nothing to do.
    """
    profile, threads = params.profile, params.run.threads
    minutes = params.run.timeout_minutes
    timeout = None if minutes is None else minutes * 60
    jobs: list[Job] = []
    planned: set[str] = set()

    def due_of(*stages: str) -> tuple[str, ...]:
        planned.update(stages)
        return tuple(stage for stage in stages if stage in due)

    for task in dict.fromkeys(cell.task for cell in cells):
        stages = due_of(download_stage(task), preprocess_stage(profile, task))
        if stages:
            jobs.append(Job(data_job(task), stages, threads=threads, seconds=float("inf")))
    known = _Measured(params, cells, device)
    for cell in cells:
        stages = due_of(cell.stage("train", profile), cell.stage("evaluate", profile))
        if stages:
            seconds, memory = known.expected(cell)
            jobs.append(
                Job(
                    cell.id,
                    stages,
                    needs=(data_job(cell.task),),
                    seconds=seconds,
                    memory_mb=memory,
                    threads=threads,
                    timeout_seconds=timeout,
                    force=force,
                    saves=True,
                )
            )
    # What is neither data nor a cell measures the machine, so it gets the machine.
    job_of = {stage: job.name for job in jobs for stage in job.stages}
    for stage, before in due.items():
        if stage not in planned:
            needs = tuple(job_of[other] for other in before if other in job_of)
            jobs.append(Job(stage, (stage,), needs=needs, threads=threads, exclusive=True))
    return jobs


def report_job(stage: str) -> Job:
    """The job that builds the report: after everything else, whatever became of it."""
    return Job(stage, (stage,), exclusive=True, seconds=-1.0)


def plan_devices(params: Params, names: str | None, jobs: int | None) -> tuple[list[Device], int]:
    """The devices of a grid, and how many jobs run at once on all of them.

    Args:
        names: as typed, such as "cuda:0,cuda:1"; None for `run.device`.
        jobs: as wished; the cores of this machine divided by `run.threads` are the limit.

    Raises:
        UserError: a device that is not there, or no job at all.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {jobs}")
    chosen = list(dict.fromkeys(name.strip() for name in (names or params.run.device).split(",")))
    found = list(dict.fromkeys(str(get_device(name)) for name in chosen))
    most = number_of_jobs(_num_cores(), params.run.threads, jobs)
    return [_device(name, most) for name in found], most


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(name: str, jobs: int) -> Device:
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return Device(name, jobs, psutil.virtual_memory().available / 2**20 * _USABLE_SHARE)
    free = _free_gpu_memory_mb(int(index or 0))
    # What cannot be measured cannot be shared.
    return Device(name, jobs if free else 1, free and free * _USABLE_SHARE, unknown_alone=True)


def _free_gpu_memory_mb(index: int) -> float | None:
    """Asked of the driver's tool: asking torch would take memory of the device into this process for good."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    physical = visible.split(",")[index] if visible else str(index)
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", f"--id={physical}"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


class _Measured:
    """What earlier runs of the cells took."""

    def __init__(self, params: Params, cells: Sequence[Cell], device: str) -> None:
        self._params, self._device = params, device
        self._of_cell = {cell: taken for cell in cells if (taken := _taken(cell, params.profile)) is not None}
        self._of_kind: dict[tuple[str, ...], list[Resources]] = {}
        for cell, taken in self._of_cell.items():
            self._of_kind.setdefault(_kind(cell), []).append(taken)
        self._quadratic: set[str] | None = None

    def expected(self, cell: Cell) -> tuple[float, float | None]:
        """Seconds, and MB or None: from the cell's own last run, else from its like with another seed, else a guess."""
        training = self._params.task[cell.task].training
        alike = [self._of_cell[cell]] if cell in self._of_cell else self._of_kind.get(_kind(cell), [])
        if not alike:
            return self._guess(cell), None
        memory = [taken.memory_mb for taken in alike if taken.device == self._device]
        seconds = statistics.fmean(taken.seconds_per_step for taken in alike) * training.steps
        return seconds, max(memory, default=None)

    def _guess(self, cell: Cell) -> float:
        if self._quadratic is None:
            from pipeline.stages.bench import quadratic_mechanisms

            self._quadratic = quadratic_mechanisms(self._params)
        task = self._params.task[cell.task]
        length = task.data.max_length
        tokens = task.training.steps * task.training.batch_size * length
        pairs = tokens * length if cell.attn in self._quadratic else 0
        return task.model.num_layers * (tokens / _TOKENS_PER_SECOND + pairs / _PAIRS_PER_SECOND)


def _kind(cell: Cell) -> tuple[str, ...]:
    return cell.task, cell.attn, cell.dotf or "", cell.former


def _taken(cell: Cell, profile: str) -> Resources | None:
    folder = cell.run_folder(profile)
    try:
        resources: dict[str, Any] = read_json(folder / "resources.json")
    except FileNotFoundError:
        return None
    return Resources(
        seconds_per_step=1 / resources["steps_per_second"],
        memory_mb=resources["peak_memory_mb"],
        device=resources["device"].partition(":")[0].partition(" ")[0],
    )
