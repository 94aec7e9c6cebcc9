"""A whole grid, from what is out of date to what is on record."""

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.commands import PARAMS_VARIABLE
from pipeline.files import remove_unfinished
from pipeline.grid.cells import Cell, check_models, expand, select
from pipeline.grid.code import check_code
from pipeline.grid.graph import Graph, check_folders, read_graph
from pipeline.grid.params import Params
from pipeline.grid.settings import PARAMS_FILE, read_yaml
from pipeline.hashes import Hashes
from pipeline.launch import Backend, Event, GridState, Job, Options, plan, run_jobs, session
from pipeline.launch.local import LocalBackend
from pipeline.launch.slurm import SlurmBackend, plan_slurm
from pipeline.lease import Lease
from pipeline.monitor import status
from pipeline.monitor.live import show_grid
from pipeline.record.freshness import receipt_file, stage_states
from pipeline.record.writer import Recorder, mend_lock
from pipeline.text import counted, share
from schoenbat.errors import UserError
from schoenbat.files import write_bytes

_LOGS = Path("logs")


@dataclass(frozen=True)
class Wishes:
    """What was typed.

    Attributes:
        filters: values by attribute of a cell, as `select` takes them.
    """

    filters: Mapping[str, Any]
    jobs: int | None = None
    devices: str | None = None
    restart: bool = False
    force: bool = False
    fail_fast: bool = False
    dry_run: bool = False
    as_json: bool = False


def run_grid(params: Params, cells: Sequence[Cell], wishes: Wishes, *, slurm: bool) -> int:
    """Run what is out of date of the chosen cells, or of everything; the exit code."""
    chosen = select(cells, **wishes.filters)
    check_models(params, chosen)
    check_code()
    backend, at_once, kind = _backend(params, wishes, slurm)
    alone = (
        contextlib.nullcontext() if wishes.dry_run else session.only_grid(_LOGS, lambda text: print(text, flush=True))
    )
    with session.outliving_readers(), alone:
        settings = read_yaml(PARAMS_FILE)
        graph = read_graph(settings)
        check_folders(graph)
        if not wishes.dry_run:
            backend.clear()
            mend_lock()
        hashes = Hashes()
        wanted = _wanted(graph, chosen, everything=not any(wishes.filters.values()))
        states = stage_states(graph, settings, hashes, wanted)
        of_cells = {name for name in wanted if graph.stages[name].cell is not None}
        due = {name for name in wanted if states[name] == "due" or (wishes.force and name in of_cells)}
        due |= {name for name in wanted if any(other in due for other in graph.gathers[name])}
        made = [name for name in wanted if states[name] == "made" and name not in due]
        cells_in_words, stages = counted(len(chosen), "cell"), counted(len(wanted), "stage")
        title = f"profile {params.profile}: {cells_in_words}, {len(due):,} of {stages} to run"
        if not due and not made:
            _drop_checkpoints(params, graph, wanted)
            asked = share(len(chosen), len(cells), "cell", f"of profile {params.profile}")
            nothing = f"nothing to do: {asked} up to date, and so is the report"
            print(json.dumps({"jobs": [], "to_record": []}) if wishes.as_json else nothing, flush=True)
            if not wishes.dry_run:
                _show_results(params)
            return 0
        jobs = plan.plan_jobs(params, chosen, graph, due, settings, hashes, device=kind)
        if wishes.dry_run:
            _show_plan(sorted(jobs, key=lambda job: (job.exclusive, -job.seconds)), made, title, wishes.as_json)
            return 0
        print(title)
        _drop_checkpoints(params, graph, [name for name in wanted if states[name] == "recorded"])
        for cell in chosen if wishes.restart else ():
            (cell.checkpoint_folder(params.profile) / "last.pt").unlink(missing_ok=True)
        print(f"at most {at_once} at once on {', '.join(device.name for device in backend.devices)}", flush=True)
        recorder = Recorder()
        recorder.add(made)
        return _Run(params, graph, chosen, jobs, wishes, recorder).run(backend, at_once)


def _show_results(params: Params) -> None:
    # What the tables need takes seconds to import, which every command of a grid would wait for.
    from pipeline.reporting._terminal import show_results

    sys.stdout.flush()
    show_results(params, Path())


def _show_plan(jobs: Sequence[Job], made: Sequence[str], title: str, as_json: bool) -> None:
    stages = {job.name: [stage.name for stage in job.stages] for job in jobs}
    if as_json:
        print(json.dumps({"jobs": [{"job": name, "stages": stages[name]} for name in stages], "to_record": made}))
        return
    print(title)
    for names in stages.values():
        print(f"  {' '.join(names)}")
    if made:
        print(f"  and {counted(len(made), 'stage')} computed before to be put on record")


def _wanted(graph: Graph, chosen: Sequence[Cell], *, everything: bool) -> list[str]:
    """The stages in question, in order: of the chosen cells and what they need, and the report."""
    if everything:
        return list(graph.stages)
    ids = {cell.id for cell in chosen}
    of_cells = {name for name, stage in graph.stages.items() if stage.cell in ids}
    found = graph.upstream(of_cells) | {name for name in graph.stages if graph.gathers[name]}
    return [name for name in graph.stages if name in found]


def _drop_checkpoints(params: Params, graph: Graph, recorded: Iterable[str]) -> None:
    """A checkpoint goes when the record of what came of it stands."""
    for name in recorded:
        cell = graph.stages[name].cell
        if cell is not None:
            Path("checkpoints", params.profile, cell, "last.pt").unlink(missing_ok=True)


def _backend(params: Params, wishes: Wishes, slurm: bool) -> tuple[Backend, int, str]:
    """What starts cells, how many at once, and on which kind of device."""
    if not slurm:
        found, at_once = plan.plan_devices(params, wishes.devices, wishes.jobs)
        return LocalBackend(found, _LOGS), at_once, found[0].name.partition(":")[0]
    if wishes.devices is not None:
        raise UserError("--devices is for --backend local; for Slurm, run.device and run.slurm say what a job has")
    found, at_once = plan_slurm(params.run, wishes.jobs)
    return SlurmBackend(params.run, found, _LOGS), at_once, params.run.device.partition(":")[0]


class _Run:
    """One grid that runs: its jobs, and the record of what they have made."""

    def __init__(
        self,
        params: Params,
        graph: Graph,
        chosen: Sequence[Cell],
        jobs: Sequence[Job],
        wishes: Wishes,
        recorder: Recorder,
    ) -> None:
        self._params, self._graph, self._chosen = params, graph, chosen
        self._jobs, self._wishes, self._recorder = jobs, wishes, recorder
        self._stages = {job.name: [stage.name for stage in job.stages] for job in jobs}
        self._exclusive = {job.name for job in jobs if job.exclusive}
        self._only_exclusive = False
        self._ended: dict[str, Event] = {}

    def run(self, backend: Backend, at_once: int) -> int:
        """Run the jobs, say how it went, and return the exit code."""
        params, folder = self._params, _LOGS / self._params.profile
        Path("runs", params.profile).mkdir(parents=True, exist_ok=True)
        for written in (Path(), _LOGS, folder, Path("checkpoints/made"), Path(".dvc/tmp")):
            remove_unfinished(written)
        fixed = folder / "params.yaml"
        write_bytes(fixed, PARAMS_FILE.read_bytes())
        tracked = tracking.start_grid(params.profile)
        environment = {**tracked, PARAMS_VARIABLE: str(fixed.absolute())}
        lease = Lease(_LOGS)
        state = GridState(folder / status.STATE_FILE, lease.path)
        for job in self._jobs:
            state.expect(job.name, expected=max(job.seconds, 0.0) if math.isfinite(job.seconds) else 0.0)
        cells = [cell.id for cell in self._chosen]
        options = Options(folder, environment, at_once, params.run.retries, self._wishes.fail_fast, self._holds)
        try:
            with session.StopSignals() as stops:
                try:
                    with (
                        show_grid(params.profile, cells, state) as show,
                        contextlib.closing(run_jobs(self._jobs, backend, lease, options, state, stops)) as events,
                    ):
                        for event in events:
                            show(event)
                            self._note(event)
                    # Before the record of it, for which DVC may take a minute.
                    self._show_report()
                finally:
                    lease.end()
                    self._recorded(self._recorder.finish(patient=stops() < 2))
        finally:
            lease.end()
            self._close(backend)
        code = self._summarise()
        tracking.end_grid(tracked, "KILLED" if stops() else "FAILED" if code == 1 else "FINISHED")
        if stops():
            again = "without --restart and --force" if self._wishes.restart or self._wishes.force else "the same"
            print(f"interrupted; run {again} again to go on: what is finished is kept, cells go on from checkpoints")
            return 130
        return code

    def _note(self, event: Event | None) -> None:
        if event is not None and event.state in ("done", "failed", "unavailable", "stopped", "retried"):
            # Also a job that failed may have done some of its stages.
            self._recorder.add(stage for stage in self._stages[event.job] if receipt_file(stage).exists())
        if event is not None and event.state in ("failed", "unavailable", "skipped", "stopped"):
            self._ended[event.job] = event
        self._only_exclusive |= event is not None and event.state == "started" and event.job in self._exclusive
        if not self._only_exclusive:
            self._recorded(self._recorder.poll())

    def _holds(self) -> bool:
        """DVC takes a core from what measures time, and touches files that are gathered: not beside it."""
        return not self._only_exclusive and not self._recorder.is_idle()

    def _recorded(self, names: Sequence[str]) -> None:
        _drop_checkpoints(self._params, self._graph, names)

    def _show_report(self) -> None:
        reports = [job.name for job in self._jobs if any(self._graph.gathers[stage.name] for stage in job.stages)]
        if reports and not any(name in self._ended for name in reports):
            print()
            _show_results(self._params)

    def _close(self, backend: Backend) -> None:
        try:
            backend.close()
        except UserError as error:
            print(f"warning: {error}")

    def _summarise(self) -> int:
        profile, ended = self._params.profile, self._ended
        causes = {str(event.cause): event for event in ended.values() if event.state in ("failed", "unavailable")}
        for stage, event in causes.items():
            print(f"{event.state}: {stage}: {event.text} (log: {event.log})")
        skipped = Counter(
            str(end.cause) for cell in self._chosen if (end := ended.get(cell.id)) and end.state == "skipped"
        )
        for stage, number in skipped.items():
            print(f"not run, because {stage} {causes[stage].state}: {counted(number, 'cell')}")
        waiting = sum(event.state == "stopped" and event.log is None for event in ended.values())
        if waiting:
            print(f"not started: {counted(waiting, 'job')}")
        for stage, why in self._recorder.failed.items():
            print(f"not on record: {stage}: {why}; the next run sees to it")
        if not ended and not self._recorder.failed:
            print(f"{share(len(self._chosen), len(expand(self._params)), 'cell', f'of profile {profile}')} done")
        if any(event.state != "unavailable" for event in causes.values()) or self._recorder.failed:
            return 1
        return 3 if causes else 0
