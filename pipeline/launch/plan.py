"""What there is to do, as jobs: stages that are due, what they will probably take, and the devices they may have."""

import contextlib
import functools
import os
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import psutil

from pipeline.grid.axes import Cell, data_stage_names, replace_stage_name, stage_names
from pipeline.grid.cells import expand
from pipeline.grid.freshness import CODE_VARIABLE, PAPERS, REVIEWS, Freshness
from pipeline.grid.params import Params, cell_training
from pipeline.grid.results import CellResults, Resources
from pipeline.grid.settings import PARAMS_FILE, PARAMS_VARIABLE
from pipeline.host.devices import ask_driver, get_device, physical_gpu
from pipeline.launch._job import Device, Job, Work
from pipeline.launch._placement import number_of_jobs
from schoenbat.attention import ATTENTIONS
from schoenbat.errors import UserError

_USABLE_SHARE = 0.9
"""Of a device's free memory."""
_TOKENS_PER_SECOND, _PAIRS_PER_SECOND = 2e4, 2e7
"""Guesses for cells of which no like has run: they decide nothing but the order."""


def plan_jobs(
    params: Params,
    due: Sequence[Cell],
    freshness: Freshness,
    others: Sequence[str],
    *,
    force: bool,
    device: str,
    replacing: Sequence[str] = (),
) -> list[Job]:
    """Return the jobs that bring cells up to date: one per task for its data, one per cell, one for anything else.

    What is neither data nor a cell measures the machine or gathers results, so it gets the machine and comes last,
    whatever became of the cells. DVC runs it, if it is out of date by then.

    Args:
        freshness: of the start of the grid, which is fixed for it.
        others: stages of DVC that belong to no cell, in the order in which they can run.
        force: train and test again what is up to date.
        replacing: due cells of `trained.cells`.
        device: the kind of device they run on, "cpu" or "cuda": memory is known for the kind it was measured on.
    """
    profile, minutes = params.profile, params.run.timeout_minutes
    jobs = []
    for task in dict.fromkeys([*(cell.task for cell in due), *((REVIEWS, PAPERS) if replacing else ())]):
        if not freshness.has_arrays(task):
            stages = dict(zip(data_stage_names(profile, task), ("download", "preprocess"), strict=True))
            work = _work(stages, ["--profile", profile, "--task", task])
            jobs.append(Job(f"data-{task}", work, seconds=float("inf")))
    known = _Measured(params, expand(params), device)
    for cell in due:
        # Its commands leave out by themselves what is up to date.
        options = ["--profile", profile, *cell.arguments(), *(["--force"] if force else [])]
        stages = dict(zip(stage_names(profile, cell), ("train", "eval"), strict=True))
        work = _work(stages, options, {CODE_VARIABLE: freshness.code(cell.attn, cell.dotf)})
        seconds, memory = known.expected(cell)
        data = (f"data-{cell.task}",)
        jobs.append(Job(cell.id, work, needs=data, seconds=seconds, memory_mb=memory, saves=True))
    for name in replacing:
        options = ["--profile", profile, "--cell", name, *(["--force"] if force else [])]
        work = _work({replace_stage_name(profile, name): "replace"}, options)
        jobs.append(Job(name, work, needs=(f"data-{REVIEWS}", f"data-{PAPERS}")))
    for position, name in enumerate(others):
        # DVC reads params.yaml itself, so the command has to read the same.
        command = f"dvc repro --single-item {shlex.quote(name)}"
        work = (Work(name, command, {PARAMS_VARIABLE: str(PARAMS_FILE)}),)
        needs = tuple(cell.id for cell in due if name == f"errors@{profile}-{cell.group}")
        jobs.append(Job(name, work, needs=needs, seconds=-float(position), exclusive=True))
    return [replace(job, timeout_seconds=None if minutes is None else minutes * 60) for job in jobs]


def _work(
    stages: Mapping[str, str], options: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[Work, ...]:
    """Return the work of stages that are commands of this project, with the same options."""
    return tuple(
        Work(stage, shlex.join(["schoenbat-exp", command, *options]), environment or {})
        for stage, command in stages.items()
    )


def plan_devices(params: Params, names: str | None, jobs: int | None) -> tuple[list[Device], int]:
    """Return the devices of a grid, and how many jobs run at once on all of them; raises UserError.

    Args:
        names: as typed, such as "cuda:0,cuda:1"; None for `run.device`.
        jobs: as wished; the cores of this machine divided by `run.threads` are the limit.
    """
    chosen = (names or params.run.device).split(",")
    found = list(dict.fromkeys(str(get_device(name.strip())) for name in chosen))
    most = number_of_jobs(number_of_cores(), params.run.threads, jobs)
    return [_device(name, most) for name in found], most


def number_of_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(name: str, jobs: int) -> Device:
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return Device(name, jobs, psutil.virtual_memory().available / 2**20 * _USABLE_SHARE)
    free = ask_driver("memory.free", f"--id={physical_gpu(int(index or 0))}")
    if not free.isdecimal():
        # What cannot be measured cannot be shared.
        return Device(name, 1, unknown_alone=True)
    return Device(name, jobs, int(free) * _USABLE_SHARE, unknown_alone=True)


class _Measured:
    """What earlier runs of the cells took."""

    def __init__(self, params: Params, cells: Sequence[Cell], device: str) -> None:
        self._params, self._device = params, device
        self._guess = functools.cache(self._guess_seconds)
        self._taken: dict[str, dict[int, Resources]] = {}
        for cell in cells:
            # A damaged file is none: it decides nothing but the order.
            with contextlib.suppress(UserError):
                if taken := CellResults(params.profile, cell.id).resources():
                    self._taken.setdefault(cell.group, {})[cell.seed] = taken

    def expected(self, cell: Cell) -> tuple[float, float | None]:
        """Seconds, and MB or None: from the cell's own last run, else from its like with another seed, else a guess."""
        alike = self._taken.get(cell.group)
        if not alike:
            return self._guess(replace(cell, seed=0)), None
        found = [alike[cell.seed]] if cell.seed in alike else alike.values()
        memory = [taken.peak_memory_mb for taken in found if taken.device.startswith(self._device)]
        seconds = statistics.fmean(1 / taken.steps_per_second for taken in found)
        return seconds * cell_training(self._params, cell).steps, max(memory, default=None)

    def _guess_seconds(self, cell: Cell) -> float:
        task, training = self._params.task[cell.task], cell_training(self._params, cell)
        length = task.data.max_length
        tokens = training.steps * training.batch_size * length
        pairs = tokens * length if ATTENTIONS.get(cell.attn).cost == "quadratic" else 0
        return task.model.num_layers * (tokens / _TOKENS_PER_SECOND + pairs / _PAIRS_PER_SECOND)
