"""A whole grid, from what is out of date to what is on record."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.grid.axes import Cell, data_stage_names, stage_names
from pipeline.grid.cells import expand, select
from pipeline.grid.checked import check_code
from pipeline.grid.freshness import PAPERS, REVIEWS, Freshness, check_folders
from pipeline.grid.numerics import write_numerics
from pipeline.grid.params import Params
from pipeline.grid.results import CellResults
from pipeline.grid.settings import PARAMS_FILE, PARAMS_VARIABLE, read_yaml
from pipeline.host.files import remove_unfinished
from pipeline.host.heartbeat import Heartbeat
from pipeline.host.text import counted, share
from pipeline.launch import Event, GridState, Job, Options, plan, run_jobs, session
from pipeline.launch._job import Backend
from pipeline.launch.local import LocalBackend
from pipeline.launch.slurm import SlurmBackend, plan_slurm
from pipeline.mlflow import tracking
from pipeline.monitor import status
from pipeline.monitor.live import show_grid
from pipeline.record.writer import Recorder, changed_stages, exchange_record, mend_lock
from schoenbat.errors import UserError
from schoenbat.files import write_bytes

_LOGS = Path("logs")
_FAILURES = ("failed", "unavailable")
_say = partial(print, flush=True)


@dataclass(frozen=True)
class RunOptions:
    """The command-line options of `run`; `filters` are as `select` takes them."""

    filters: Mapping[str, Any]
    slurm: bool = False
    jobs: int | None = None
    devices: str | None = None
    force: bool = False
    dry_run: bool = False
    as_json: bool = False


def run_grid(params: Params, typed: RunOptions) -> int:
    """Bring the chosen cells up to date, or everything, and put it on record; return the exit code."""
    cells, everything = expand(params), not any(typed.filters.values())
    named = typed.filters.get("id") or ()
    replacing = [name for name in params.trained.cells if everything or name in named]
    filters = {**typed.filters, "id": [name for name in named if name not in replacing]}
    chosen = select(cells, **filters) if everything or any(filters.values()) else []
    check_code()
    backend, at_once, kind = _backend(params, typed)
    alone = contextlib.nullcontext() if typed.dry_run else session.only_grid(_LOGS, _say)
    with alone:
        check_folders()
        if not typed.dry_run:
            backend.clear()
            _prepare_record(params)
        freshness = Freshness(read_yaml(PARAMS_FILE))
        # DVC writes even to tell, so a plan in a checkout that may only be read goes by cells alone.
        changed = {} if typed.dry_run and not os.access(".dvc", os.W_OK) else changed_stages()
        due = [cell for cell in chosen if typed.force or not freshness.is_finished(cell)]
        replaced = [name for name in replacing if typed.force or not freshness.is_replaced(name)]
        others = _other_stages(params, due, changed, everything=everything, replaced=bool(replaced))
        jobs = plan.plan_jobs(params, due, freshness, others, force=typed.force, device=kind, replacing=replaced)
        unrecorded = _unrecorded(cells, freshness, changed)
        ids = [*(cell.id for cell in chosen), *replacing]
        title = f"profile {params.profile}: {len(due) + len(replaced):,} of {counted(len(ids), 'cell')} to run"
        if typed.dry_run:
            _show_plan(sorted(jobs, key=lambda job: (job.exclusive, -job.seconds)), unrecorded, title, typed.as_json)
            return 0
        recorder = Recorder()
        recorder.add(unrecorded)
        if not jobs:
            recorder.finish(patient=True)
            asked = share(len(ids), _number(params), "cell", f"of profile {params.profile}")
            print(f"nothing to do: {asked} up to date, and so is the report; see: schoenbat-exp results")
            if tracking.is_due(params.profile):
                with session.counted_stops() as stops:
                    _log_rest(tracking.Tracker(params.profile, ids), "FINISHED", stops)
            return _show_unrecorded(recorder)
        print(title)
        _say(f"at most {at_once} at once on {', '.join(device.name for device in backend.devices)}")
        return _Run(params, ids, jobs, typed, freshness, recorder).run(backend, at_once)


def _number(params: Params) -> int:
    return len(expand(params)) + len(params.trained.cells)


@contextlib.contextmanager
def recording(params: Params) -> Iterator[None]:
    """Put on record what is complete after the block, in which no grid runs in this checkout."""
    with session.only_grid(_LOGS, _say):
        _prepare_record(params)
        yield
        recorder = Recorder()
        recorder.add(_unrecorded(expand(params), Freshness(read_yaml(PARAMS_FILE)), changed_stages()))
        recorder.finish(patient=True)
        for stage, why in recorder.failed.items():
            raise UserError(f"not on record: {stage}: {why}")


def _prepare_record(params: Params) -> None:
    mend_lock()
    # A clone has the record of a published profile, and none in place.
    exchange_record(params.profile, params.profile)
    write_numerics(params.grid.components())


def _unrecorded(cells: Collection[Cell], freshness: Freshness, changed: Mapping[str, bool]) -> list[str]:
    """Return the stages that are complete and not on record as they are."""
    return [name for name in _complete_stages(cells, freshness) if changed.get(name)]


def _other_stages(
    params: Params, due: Sequence[Cell], changed: Mapping[str, bool], *, everything: bool, replaced: bool = False
) -> list[str]:
    """Return the stages that belong to no cell and are out of date now, or will be when the due cells are done."""
    suffix, folder = f"@{params.profile}", Path("runs", params.profile)
    first = {cell.group: cell for cell in reversed(expand(params))}
    groups = {cell.group for cell in due}
    outs = {f"bench{suffix}": folder / "bench-checks.csv"}
    for group in params.errors.trained:
        # A clone has the errors without the weights that they are of.
        if group in groups or CellResults(params.profile, first[group].id).best.is_file():
            outs[f"errors{suffix}-{group}"] = folder / "errors" / f"{group}.csv"
    again = {f"errors{suffix}-{group}" for group in groups}
    due_now = [name for name, out in outs.items() if name in again or changed.get(name) or not out.exists()]
    found = due_now if everything else []
    report, page = f"report{suffix}", Path("reports", params.profile, "index.html")
    return [*found, report] if due or replaced or found or changed.get(report) or not page.exists() else []


def _complete_stages(cells: Collection[Cell], freshness: Freshness) -> list[str]:
    """Return the stages of data and of groups of cells whose outputs are complete and up to date."""
    stages = {"numerics": True, **freshness.cell_stages(cells)}
    for task in dict.fromkeys([*(cell.task for cell in cells), *((REVIEWS, PAPERS) if freshness.replacing else ())]):
        stages |= dict.fromkeys(data_stage_names(freshness.profile, task), freshness.has_arrays(task))
    return [name for name, complete in stages.items() if complete]


def _show_plan(jobs: Sequence[Job], unrecorded: Sequence[str], title: str, as_json: bool) -> None:
    stages = {job.name: [stage.name for stage in job.stages] for job in jobs}
    if as_json:
        planned = [{"job": name, "stages": stages[name]} for name in stages]
        print(json.dumps({"jobs": planned, "to_record": unrecorded}))
        return
    print(title)
    for name, names in stages.items():
        print("  " + " ".join(names if names == [name] else [f"{name}:", *names]))
    if unrecorded:
        print(f"  and {counted(len(unrecorded), 'stage')} computed before to be put on record")


def _show_unrecorded(recorder: Recorder) -> int:
    """Say what could not be put on record; return the exit code."""
    for stage, why in recorder.failed.items():
        print(f"not on record: {stage}: {why}")
    return int(bool(recorder.failed))


def _backend(params: Params, typed: RunOptions) -> tuple[Backend, int, str]:
    """Return what starts cells, how many at once, and on which kind of device."""
    if not typed.slurm:
        found, at_once = plan.plan_devices(params, typed.devices, typed.jobs)
        return LocalBackend(found, _LOGS), at_once, found[0].name.partition(":")[0]
    if typed.devices is not None:
        raise UserError("--devices is for --backend local; for Slurm, run.device and run.slurm say what a job has")
    found, at_once = plan_slurm(params.run, typed.jobs)
    return SlurmBackend(params.run, found, _LOGS), at_once, params.run.device.partition(":")[0]


def _log_rest(tracker: tracking.Tracker, status: str, stops: Callable[[], int]) -> None:
    if problem := tracker.finish(status, stops):
        print(f"warning: {problem}")


@dataclass
class _Run:
    """One grid that runs: its jobs, and the record of what they have made."""

    params: Params
    chosen: Sequence[str]
    jobs: Sequence[Job]
    typed: RunOptions
    freshness: Freshness
    recorder: Recorder
    ended: dict[str, Event] = field(default_factory=dict)
    measures: bool = False

    def __post_init__(self) -> None:
        self._by_name = {job.name: job for job in self.jobs}
        done = [cell for cell in self.chosen if cell not in self._by_name]
        self._tracker = tracking.Tracker(self.params.profile, done)
        self._cells = {cell.id: cell for cell in expand(self.params)}

    def run(self, backend: Backend, at_once: int) -> int:
        """Run the jobs, say how it went, and return the exit code."""
        params, folder = self.params, _LOGS / self.params.profile
        Path("runs", params.profile).mkdir(parents=True, exist_ok=True)
        for written in (Path(), _LOGS, folder, Path(".dvc/tmp")):
            remove_unfinished(written)
        fixed = folder / "params.yaml"
        write_bytes(fixed, PARAMS_FILE.read_bytes())
        heartbeat = Heartbeat(_LOGS)
        state = GridState(folder / status.STATE_FILE, heartbeat.path)
        environment = {PARAMS_VARIABLE: str(fixed.absolute())}
        options = Options(folder, environment, at_once, params.run.retries, self._holds)
        with session.counted_stops() as stops:
            try:
                with (
                    show_grid(params.profile, self.chosen, state) as show,
                    contextlib.closing(run_jobs(self.jobs, backend, heartbeat, options, state, stops)) as events,
                ):
                    for event in events:
                        show(event)
                        self._note(event)
                # Before the record of it, for which DVC may take a minute.
                self._show_report()
            finally:
                heartbeat.end()
                self._close(backend)
                self.recorder.finish(patient=stops() < 2)
            code = self._summarise()
            _log_rest(self._tracker, "KILLED" if stops() else "FAILED" if code == 1 else "FINISHED", stops)
            if stops():
                again = "without --force" if self.typed.force else "the same"
                print(
                    f"interrupted; run {again} again to go on: what is finished is kept, cells go on from checkpoints"
                )
            return 130 if stops() else code

    def _note(self, event: Event | None) -> None:
        if event is not None:
            if event.state in (*_FAILURES, "done", "stopped", "retried"):
                # Also a job that failed may have done some of its stages.
                self.recorder.add(self._complete_stages_of(event.job))
            if event.state in (*_FAILURES, "skipped", "stopped"):
                self.ended[event.job] = event
            if event.state == "done" and event.job in self.chosen:
                self._tracker.add(event.job)
            self.measures |= event.state == "started" and self._by_name[event.job].exclusive
        if not self.measures:
            self.recorder.poll()

    def _complete_stages_of(self, job: str) -> list[str]:
        """Return the stages that a job has completed; those of a cell only with the last of its seeds.

        They are judged by the code and the settings of the start: if these have changed, the recorder says so.
        """
        own, profile = {stage.name for stage in self._by_name[job].stages}, self.params.profile
        names = {
            cell: data_stage_names(profile, cell.task) + stage_names(profile, cell) for cell in self._cells.values()
        }
        cells = [cell for cell, stages in names.items() if not own.isdisjoint(stages)]
        return [name for name in _complete_stages(cells, self.freshness.look_again()) if name in own]

    def _holds(self) -> bool:
        """DVC takes a core from what measures time, and touches files that are gathered: not beside it."""
        return not (self.measures or (self.recorder.is_idle() and self._tracker.is_idle()))

    def _show_report(self) -> None:
        report = f"report@{self.params.profile}"
        if report in self._by_name and report not in self.ended:
            # What the tables need takes seconds to import, which every command of a grid would wait for.
            from pipeline.reporting._terminal import show_results

            print(flush=True)
            show_results(self.params, Path())

    def _close(self, backend: Backend) -> None:
        try:
            backend.close()
        except UserError as error:
            print(f"warning: {error}")

    def _summarise(self) -> int:
        profile, ended = self.params.profile, self.ended
        causes = {str(event.cause): event for event in ended.values() if event.state in _FAILURES}
        for stage, event in causes.items():
            print(f"{event.state}: {stage}: {event.text} (log: {event.log})")
        ends = [ended[cell] for cell in self.chosen if cell in ended]
        for stage, number in Counter(str(end.cause) for end in ends if end.state == "skipped").items():
            print(f"not run, because {stage} {causes[stage].state}: {counted(number, 'cell')}")
        waiting = sum(event.state == "stopped" and event.log is None for event in ended.values())
        if waiting:
            print(f"not started: {counted(waiting, 'job')}")
        unrecorded = _show_unrecorded(self.recorder)
        if not ended and not unrecorded:
            print(f"{share(len(self.chosen), _number(self.params), 'cell', f'of profile {profile}')} done")
        if any(event.state != "unavailable" for event in causes.values()) or unrecorded:
            return 1
        return 3 if causes else 0
