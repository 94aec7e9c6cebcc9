"""schoenbat-exp: the experiments from the command line.

Exit codes: 0 all done; 1 something failed; 2 wrong usage or configuration; 3 data that cannot be had here; 75 stopped
with the work saved (130 for a grid). Modules that
take long to import are imported by the commands that need them.
"""

import contextlib
import dataclasses
import enum
import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline.grid.settings import enter_project
from pipeline.lease import STOPPED, watch
from pipeline.names import Kind, described, names
from pipeline.stopping import Stopped
from pipeline.text import counted
from schoenbat.errors import DataUnavailable, OutOfMemory, TrainingFailed, UserError, unknown_name

if TYPE_CHECKING:
    from pipeline.grid.cells import Cell
    from pipeline.grid.params import Params
    from pipeline.launch import Backend, Event, GridState, Job

app = typer.Typer(
    help="Train, evaluate and compare attention mechanisms on Long Range Arena tasks; params.yaml says which.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TaskOption = Annotated[str, typer.Option("--task", help="Name of the task.")]
AttnOption = Annotated[str, typer.Option("--attn", help="Name of the attention mechanism.")]
DotfOption = Annotated[str | None, typer.Option("--dotf", help="Name of the kernel, if the mechanism needs one.")]
FormerOption = Annotated[str, typer.Option("--former", help="maclauformer (with ppSBN) or transformer (without).")]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="Of which params.yaml must be. Default: whichever it is of.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Default: the first seed of the grid.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", envvar="SCHOENBAT_DEVICE", help="cpu, cuda or cuda:N. Default: run.device."),
]

_VERBS = ("train", "evaluate")
_WATCH_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 30.0


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"schoenbat-exp {importlib.metadata.version('schoenbat')}")
        raise typer.Exit


class Where(enum.StrEnum):
    """Where `run` starts cells."""

    LOCAL = "local"
    SLURM = "slurm"


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What comes before a command."""


@app.command()
def run(
    grid: Annotated[bool, typer.Option("--grid", help="All cells of params.yaml.")] = False,
    task: Annotated[
        list[str] | None, typer.Option(help="Only cells of this task; repeat for more, as all below.")
    ] = None,
    attn: Annotated[list[str] | None, typer.Option(help="Only cells with this mechanism.")] = None,
    dotf: Annotated[list[str] | None, typer.Option(help="Only cells with this kernel.")] = None,
    former: Annotated[list[str] | None, typer.Option(help="Only cells with this former.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only cells with this seed.")] = None,
    cell: Annotated[list[str] | None, typer.Option(help="Only the cell of this id.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", help="Cells at once. Default and limit: cores divided by run.threads.")
    ] = None,
    where: Annotated[
        Where, typer.Option("--backend", help="This machine, or a cluster as run.slurm describes it.")
    ] = Where.LOCAL,
    devices: Annotated[
        str | None, typer.Option("--devices", help="Such as cpu or cuda:0,cuda:1. Default: run.device.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard checkpoints of interrupted runs.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run the chosen cells even if they are up to date.")] = False,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast/--keep-going", help="Whether the first failure stops the grid.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: for programs.")] = False,
) -> None:
    """Run what is out of date: all of the grid (--grid), or the cells that the filters leave; then build the report.

    Ctrl-C once lets running cells save their work, twice ends them; the same command goes on from there.
    """
    from pipeline.grid import cells as cells_module
    from pipeline.launch import plan, session

    params = _load_params()
    filters: dict[str, Any] = dict(task=task, attn=attn, dotf=dotf, former=former, seed=seed, id=cell)
    filtered = any(filters.values())
    if not grid and not filtered:
        raise UserError("nothing chosen: pass --grid for all cells of params.yaml, or --task, --attn, --cell, ...")
    if as_json and not dry_run:
        raise UserError("--json goes with --dry-run")
    chosen = cells_module.select(cells_module.expand(params), **filters)
    cells = counted(len(chosen), "cell")
    backend, at_once, kind = _backend(params, where, devices, jobs)
    graph = cells_module.stage_graph(params, chosen)
    if not filtered:
        graph[cells_module.bench_stage(params.profile)] = []
        graph[cells_module.errors_stage(params.profile)] = []
        for trained in cells_module.trained_cells(params):
            graph[cells_module.errors_stage(params.profile, trained)] = [trained.stage("train", params.profile)]
    report = cells_module.report_stage(params.profile)
    with session.only_grid(Path("logs"), lambda text: print(text, flush=True)):
        if not dry_run:
            backend.clear()
        changed = plan.changed_stages([*graph, report])
        if force:
            changed |= {chosen_cell.stage(verb, params.profile) for chosen_cell in chosen for verb in _VERBS}
        due = plan.due_stages(graph, changed)
        if not due and report not in changed:
            if as_json:
                print("[]")
            else:
                print(f"nothing to do: all {cells} of profile {params.profile} and the report are up to date")
            return
        to_do = plan.plan_jobs(params, chosen, due, device=kind, force=force)
        if as_json:
            jobs_to_do = [*to_do, plan.report_job(report)]
            print(json.dumps([{"job": job.name, "stages": job.stages, "needs": job.needs} for job in jobs_to_do]))
            return
        print(f"profile {params.profile}: {cells}, {len(due)} of {counted(len(graph), 'stage')} to run, then {report}")
        if dry_run:
            for job in to_do:
                print(f"  {' '.join(job.stages)}")
            return
        print(f"at most {at_once} at once on {', '.join(device.name for device in backend.devices)}", flush=True)
        if restart:
            for selected in chosen:
                (selected.checkpoint_folder(params.profile) / "last.pt").unlink(missing_ok=True)
        to_do.append(plan.report_job(report))
        raise typer.Exit(_run_jobs(params, chosen, to_do, backend, at_once, fail_fast))


@app.command()
def train(
    task: TaskOption,
    attn: AttnOption,
    former: FormerOption,
    dotf: DotfOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    profile: ProfileOption = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="--no-save writes and logs nothing.")] = True,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the checkpoint of an interrupted run.")] = False,
) -> None:
    """Train one cell; an interrupted run goes on from its checkpoint."""
    params = _load_params(profile)
    from pipeline.grid.cells import make_cell
    from pipeline.stages import train as stage

    cell = make_cell(params, task, attn, dotf, former, seed)
    stage.run(params, cell, device_name=device or params.run.device, save=save, restart=restart)


@app.command("eval")
def evaluate(
    task: TaskOption,
    attn: AttnOption,
    former: FormerOption,
    dotf: DotfOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    profile: ProfileOption = None,
) -> None:
    """Test the best weights of one trained cell."""
    params = _load_params(profile)
    from pipeline.grid.cells import make_cell
    from pipeline.stages import evaluate as stage

    stage.run(params, make_cell(params, task, attn, dotf, former, seed), device_name=device or params.run.device)


@app.command()
def download(task: TaskOption) -> None:
    """Fetch and verify the raw data of one task."""
    params = _load_params()
    from pipeline.stages import download as stage

    stage.run(params, task)


@app.command()
def preprocess(task: TaskOption, profile: ProfileOption = None) -> None:
    """Turn the raw data of one task into the arrays that training reads."""
    params = _load_params(profile)
    from pipeline.stages import preprocess as stage

    stage.run(params, task)


@app.command()
def report(profile: ProfileOption = None) -> None:
    """Build tables and figures from what is finished."""
    params = _load_params(profile)
    from pipeline.stages import report as stage

    stage.run(params)


@app.command()
def bench(profile: ProfileOption = None) -> None:
    """Time all mechanisms side by side in one process."""
    params = _load_params(profile)
    from pipeline.stages import bench as stage

    stage.run(params, Path("runs", params.profile, "bench.csv"))


@app.command()
def errors(
    cell: Annotated[
        str | None, typer.Option(help="On the vectors of this trained cell. Default: made-up ones.")
    ] = None,
    profile: ProfileOption = None,
) -> None:
    """Measure how far each estimate of a kernel is from it, at equal numbers of features."""
    params = _load_params(profile)
    from pipeline.grid.cells import expand, select
    from pipeline.stages import errors as stage

    folder = Path("runs", params.profile)
    if cell is None:
        stage.run(params, folder / "errors.csv")
    else:
        (chosen,) = select(expand(params), id=[cell])
        stage.run_trained(params, chosen, folder / "errors" / f"{cell}.csv")


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say how far each cell is, also while a grid runs, and why the last attempt at one failed."""
    from pipeline.monitor import view
    from pipeline.monitor.status import take_snapshot

    if watch:
        _watch()
        return
    snapshot = take_snapshot()
    print(json.dumps(dataclasses.asdict(snapshot), indent=2) if as_json else "\n".join(view.lines(snapshot)))


@app.command()
def logs(
    cell: Annotated[str, typer.Argument(help="The id of a cell, or the name of another job, as `status` shows it.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what is added, until Ctrl-C.")] = False,
) -> None:
    """Show the output of a cell's last run."""
    from pipeline.monitor.status import read_grid

    folder = Path("logs", read_grid()[0])
    path = folder / f"{cell}.log"
    if not path.is_file():
        known = ", ".join(sorted(log.stem for log in folder.glob("*.log"))) or "none"
        raise UserError(f"no log of {cell!r} in {folder}; there are: {known}")
    with path.open(encoding="utf-8", errors="replace") as file, contextlib.suppress(KeyboardInterrupt):
        shutil.copyfileobj(file, sys.stdout)
        while follow:
            sys.stdout.flush()
            time.sleep(_WATCH_SECONDS)
            shutil.copyfileobj(file, sys.stdout)


@app.command("list")
def list_names(
    kind: Annotated[Kind | None, typer.Argument(help="Default: all kinds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the names that can be used, what they stand for, and what comes from other distributions."""
    from pipeline.grid.checked import ensure_checked
    from pipeline.grid.settings import PARAMS_FILE, PROJECT_FILE

    found = {each: names(each) for each in ([kind] if kind else Kind)}
    if as_json:
        print(json.dumps({each: [dataclasses.asdict(name) for name in listed] for each, listed in found.items()}))
    else:
        for each, listed in found.items():
            print(*([f"{each}:"] if kind is None else []), *described(listed), sep="\n")
    if PARAMS_FILE.exists() or PROJECT_FILE.exists():
        ensure_checked()


@app.command()
def use(
    profile: Annotated[str, typer.Argument(help="Name of a file in profiles/.")],
    force: Annotated[bool, typer.Option("--force", help="Even if params.yaml is not a copy of any profile.")] = False,
) -> None:
    """Put profiles/PROFILE.yaml into params.yaml."""
    from pipeline.grid.checked import load_checked
    from pipeline.grid.settings import PARAMS_FILE
    from schoenbat.files import write_bytes

    known = [each.name for each in names(Kind.PROFILES)]
    if profile not in known:
        raise unknown_name("profile", profile, known)
    source = Path("profiles", f"{profile}.yaml")
    params = load_checked(source)
    if params.profile != profile:
        raise UserError(f"{source} calls itself profile {params.profile!r}; the name of the file must be the same")
    if PARAMS_FILE.exists() and not force:
        current = PARAMS_FILE.read_bytes()
        if all(Path("profiles", f"{name}.yaml").read_bytes() != current for name in known):
            raise UserError(
                "params.yaml differs from every profile; keep it as profiles/NAME.yaml first, or pass --force"
            )
    write_bytes(PARAMS_FILE, source.read_bytes())
    print(f"params.yaml is now profile {profile}{': ' + params.note if params.note else ''}")


def main(arguments: list[str] | None = None) -> NoReturn:
    """The entry point: what a user can get wrong, and what can go wrong, ends in one line and an exit code."""
    watch()
    try:
        enter_project()
        app(arguments)
    except DataUnavailable as error:
        _fail("unavailable", str(error), 3)
    except UserError as error:
        _fail("usage", str(error), 2)
    except OutOfMemory as error:
        _fail("memory", str(error), 1)
    except TrainingFailed as error:
        _fail("failed", str(error), 1)
    except Stopped as error:
        _fail("stopped", str(error), STOPPED)
    except OSError as error:
        _fail("crash", f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    raise AssertionError("typer exits by itself")


def _fail(kind: str, message: str, code: int) -> NoReturn:
    """Show the error, and hand it to the grid that started this command, if one did."""
    from pipeline.launch import OUTCOME_VARIABLE

    print(f"error: {message}", file=sys.stderr)
    outcome = os.environ.get(OUTCOME_VARIABLE)
    if outcome:
        Path(outcome).write_text(json.dumps({"kind": kind, "message": message}), encoding="utf-8")
    sys.exit(code)


def _load_params(profile: str | None = None) -> "Params":
    from pipeline.grid.checked import load_checked
    from pipeline.grid.components import link_components

    params = load_checked()
    if profile is not None and profile != params.profile:
        raise UserError(f"params.yaml is of profile {params.profile!r}, not {profile!r}")
    link_components()
    return params


def _backend(params: "Params", where: Where, devices: str | None, jobs: int | None) -> tuple["Backend", int, str]:
    """What starts cells, how many at once, and on which kind of device."""
    from pipeline.launch import plan
    from pipeline.launch.local import LocalBackend
    from pipeline.launch.slurm import SlurmBackend, plan_slurm

    if where is Where.LOCAL:
        found, at_once = plan.plan_devices(params, devices, jobs)
        return LocalBackend(found, Path("logs")), at_once, found[0].name.partition(":")[0]
    if devices is not None:
        raise UserError("--devices is for --backend local; for Slurm, run.slurm.gpus_per_block says what a block has")
    found, at_once = plan_slurm(params.run, jobs)
    kind = "cuda" if params.run.slurm.gpus_per_block else params.run.device.partition(":")[0]
    return SlurmBackend(params.run, found, Path("logs")), at_once, kind


def _run_jobs(
    params: "Params", chosen: list["Cell"], jobs: list["Job"], backend: "Backend", at_once: int, fail_fast: bool
) -> int:
    """Run the jobs, say how it went, and return the exit code."""
    from pipeline import tracking
    from pipeline.files import remove_unfinished
    from pipeline.launch import GridState, Options, run_jobs, session
    from pipeline.lease import Lease
    from pipeline.monitor import status

    folder = Path("logs", params.profile)
    Path("runs", params.profile).mkdir(parents=True, exist_ok=True)
    environment = tracking.start_grid(params.profile)
    lease = Lease(Path("logs"))
    state = GridState(folder / status.STATE_FILE, lease.path)
    for job in jobs:
        state.expect(job.name, expected=max(job.seconds, 0.0) if math.isfinite(job.seconds) else 0.0)
    ended: dict[str, Event] = {}
    try:
        with session.StopSignals() as stops, _show_grid(params.profile, chosen, state) as show:
            for written in (Path(), folder):
                remove_unfinished(written)
            options = Options(folder, environment, at_once, params.run.retries, fail_fast)
            with contextlib.closing(run_jobs(jobs, backend, lease, options, state, stops)) as events:
                for event in events:
                    show(event)
                    if event is not None and event.state in ("failed", "unavailable", "skipped", "stopped"):
                        ended[event.job] = event
    finally:
        lease.end()
        backend.close()
    table = Path("reports", params.profile, "tables", "accuracy.md")
    report = jobs[-1].name
    if report not in ended and table.is_file():
        print(f"\n{table.read_text(encoding='utf-8').rstrip()}\n\nreport: reports/{params.profile}/index.md")
    code = _summarise(params, chosen, ended)
    if stops():
        print("interrupted; run the same again to go on: finished stages are kept, cells go on from their checkpoints")
        return 130
    return code


@contextlib.contextmanager
def _show_grid(profile: str, cells: list["Cell"], state: "GridState") -> Iterator[Callable[["Event | None"], None]]:
    """To be called with every event of a grid: it redraws a table on a terminal, and prints lines elsewhere."""
    from rich.console import Console
    from rich.live import Live

    from pipeline.monitor import status, view

    def snapshot() -> status.Snapshot:
        names = [cell.id for cell in cells if cell.id in state.jobs()]
        rows = [status.job_row(profile, name, state.jobs()[name]) for name in names]
        return status.assemble(profile, True, rows, state.jobs())

    console = Console()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            drawn = 0.0

            def redraw(event: "Event | None") -> None:
                nonlocal drawn
                if event is not None and event.state in ("failed", "unavailable", "retried"):
                    live.console.print(_line(event), markup=False, highlight=False)
                if time.monotonic() - drawn >= _WATCH_SECONDS:
                    live.update(view.table(snapshot(), console.height), refresh=True)
                    drawn = time.monotonic()

            yield redraw
            live.update(view.table(snapshot(), console.height), refresh=True)
        return
    said = time.monotonic()

    def say(event: "Event | None") -> None:
        nonlocal said
        if event is not None and event.state != "queued":
            print(_line(event), flush=True)
        if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
            now = snapshot()
            print("\n".join([*view.progress_lines(now.cells), view.summary(now)]), flush=True)
            said = time.monotonic()

    yield say


def _watch() -> None:
    """Draw the status once a second, or print its summary now and then where there is no terminal."""
    from rich.console import Console
    from rich.live import Live

    from pipeline.monitor import view
    from pipeline.monitor.status import take_snapshot

    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        if not console.is_terminal:
            while True:
                print(view.summary(take_snapshot()), flush=True)
                time.sleep(_SECONDS_BETWEEN_LINES)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(view.table(take_snapshot(), console.height), refresh=True)
                time.sleep(_WATCH_SECONDS)


def _line(event: "Event") -> str:
    return f"{event.job}: {event.state}{' (' + event.text + ')' if event.text else ''}"


def _summarise(params: "Params", chosen: list["Cell"], ended: dict[str, "Event"]) -> int:
    causes = {str(event.cause): event for event in ended.values() if event.state in ("failed", "unavailable")}
    for stage, event in causes.items():
        print(f"{event.state}: {stage}: {event.text} (log: {event.log})")
    for cell in chosen:
        broken = ended.get(cell.id)
        if broken is not None and broken.state == "skipped":
            print(f"not run: {cell.id}, because {broken.cause} {causes[str(broken.cause)].state}")
    if not ended:
        print(f"all {counted(len(chosen), 'cell')} of profile {params.profile} are done")
    if any(event.state != "unavailable" for event in causes.values()):
        return 1
    return 3 if causes else 0


if __name__ == "__main__":
    main()
