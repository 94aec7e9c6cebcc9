"""schoenbat-exp: the experiments from the command line.

Exit codes: 0 all done; 1 something failed; 2 wrong usage or configuration; 3 data that cannot be had here. Modules that
take long to import are imported by the commands that need them.
"""

import contextlib
import enum
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from schoenbat.errors import DataUnavailable, TrainingFailed, UserError

if TYPE_CHECKING:
    from pipeline.cells import Cell
    from pipeline.launch import Event
    from pipeline.params import Params
    from schoenbat.registry import Registry

app = typer.Typer(
    help="Train, evaluate and compare attention mechanisms on Long Range Arena tasks; params.yaml says which.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

TaskOption = Annotated[str, typer.Option("--task", help="Name of the task.")]
AttnOption = Annotated[str, typer.Option("--attn", help="Name of the attention mechanism.")]
DotfOption = Annotated[str | None, typer.Option("--dotf", help="Name of the kernel, if the mechanism needs one.")]
FormerOption = Annotated[str, typer.Option("--former", help="maclauformer (with ppSBN) or transformer (without).")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Default: the first seed of the grid.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N. Default: run.device.")]


class Kind(enum.StrEnum):
    """What `list` can list."""

    TASKS = "tasks"
    ATTN = "attn"
    DOTF = "dotf"
    FORMER = "former"
    PROFILES = "profiles"


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
    restart: Annotated[bool, typer.Option("--restart", help="Discard checkpoints of interrupted runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")] = False,
) -> None:
    """Run what is out of date: all of the grid (--grid), or the cells that the filters leave; then build the report."""
    from pipeline import cells as cells_module

    params = _load_params()
    filters: dict[str, Any] = dict(task=task, attn=attn, dotf=dotf, former=former, seed=seed, id=cell)
    filtered = any(filters.values())
    if not grid and not filtered:
        raise UserError("nothing chosen: pass --grid for all cells of params.yaml, or --task, --attn, --cell, ...")
    chosen = cells_module.select(cells_module.expand(params), **filters)
    cells_module.check_models(params, chosen)
    graph = cells_module.stage_graph(params, chosen)
    if not filtered:
        graph[cells_module.bench_stage(params.profile)] = []
        graph[cells_module.errors_stage(params.profile)] = []
        for trained in cells_module.trained_cells(params):
            graph[cells_module.errors_stage(params.profile, trained)] = [trained.stage("train", params.profile)]
    report = cells_module.report_stage(params.profile)
    changed = _changed_stages()
    due = _due_stages(graph, changed)
    if not due and report not in changed:
        print(f"nothing to do: all {len(chosen)} cells of profile {params.profile} and the report are up to date")
        return
    print(f"profile {params.profile}: {len(chosen)} cells, {len(due)} of {len(graph)} stages to run, then {report}")
    if dry_run:
        for stage in due:
            print(f"  {stage}")
        return
    if restart:
        for selected in chosen:
            (selected.checkpoint_folder(params.profile) / "last.pt").unlink(missing_ok=True)
    raise typer.Exit(_run_due(params, chosen, due, report))


@app.command()
def train(
    task: TaskOption,
    attn: AttnOption,
    former: FormerOption,
    dotf: DotfOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="--no-save writes and logs nothing.")] = True,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the checkpoint of an interrupted run.")] = False,
) -> None:
    """Train one cell; an interrupted run goes on from its checkpoint."""
    params = _load_params()
    from pipeline.cells import make_cell
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
) -> None:
    """Test the best weights of one trained cell."""
    params = _load_params()
    from pipeline.cells import make_cell
    from pipeline.stages import evaluate as stage

    stage.run(params, make_cell(params, task, attn, dotf, former, seed), device_name=device or params.run.device)


@app.command()
def download(task: TaskOption) -> None:
    """Fetch and verify the raw data of one task."""
    params = _load_params()
    from pipeline.stages import download as stage

    stage.run(params, task)


@app.command()
def preprocess(task: TaskOption) -> None:
    """Turn the raw data of one task into the arrays that training reads."""
    params = _load_params()
    from pipeline.stages import preprocess as stage

    stage.run(params, task)


@app.command()
def report() -> None:
    """Build tables and figures from what is finished."""
    params = _load_params()
    from pipeline.stages import report as stage

    stage.run(params)


@app.command()
def bench() -> None:
    """Time all mechanisms side by side in one process."""
    params = _load_params()
    from pipeline.stages import bench as stage

    stage.run(params, Path("runs", params.profile, "bench.csv"))


@app.command()
def errors(
    cell: Annotated[
        str | None, typer.Option(help="On the vectors of this trained cell. Default: made-up ones.")
    ] = None,
) -> None:
    """Measure how far each estimate of a kernel is from it, at equal numbers of features."""
    params = _load_params()
    from pipeline.cells import expand, select
    from pipeline.stages import errors as stage

    folder = Path("runs", params.profile)
    if cell is None:
        stage.run(params, folder / "errors.csv")
    else:
        (chosen,) = select(expand(params), id=[cell])
        stage.run_trained(params, chosen, folder / "errors" / f"{cell}.csv")


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Say which cells are done, which are to be run, and why the last attempt at one failed."""
    from pipeline.cells import expand

    params = _load_params()
    changed = _changed_stages()
    rows = [_cell_status(params, cell, changed) for cell in expand(params)]
    if as_json:
        print(json.dumps({"profile": params.profile, "cells": rows, "changed_stages": sorted(changed)}, indent=2))
        return
    width = max((len(row["cell"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['cell']:{width}}  {row['state']}{': ' + row['reason'] if row['reason'] else ''}")
    done = sum(row["state"] == "done" for row in rows)
    print(f"profile {params.profile}: {done} of {len(rows)} cells done")


@app.command("list")
def list_names(kind: Annotated[Kind | None, typer.Argument(help="Default: all kinds.")] = None) -> None:
    """List the names that can be used, and where those come from that are not part of this project."""
    if kind is not None:
        origins = _origins(kind)
        print("\n".join(f"{name}  {origins[name]}" if name in origins else name for name in _names(kind)))
        return
    for each in Kind:
        print(f"{each}: {' '.join(_names(each))}")
        for name, origin in _origins(each).items():
            print(f"  {name}: {origin}")


@app.command()
def use(
    profile: Annotated[str, typer.Argument(help="Name of a file in profiles/.")],
    force: Annotated[bool, typer.Option("--force", help="Even if params.yaml is not a copy of any profile.")] = False,
) -> None:
    """Put profiles/PROFILE.yaml into params.yaml."""
    from pipeline.params import PARAMS_FILE, load_params
    from schoenbat.files import write_bytes

    names = _names(Kind.PROFILES)
    if profile not in names:
        raise UserError(f"unknown profile {profile!r}; choose one of: {', '.join(names)}")
    source = Path("profiles", f"{profile}.yaml")
    params = load_params(source)
    if params.profile != profile:
        raise UserError(f"{source} calls itself profile {params.profile!r}; the name of the file must be the same")
    if PARAMS_FILE.exists() and not force:
        current = PARAMS_FILE.read_bytes()
        if all(Path("profiles", f"{name}.yaml").read_bytes() != current for name in names):
            raise UserError(
                "params.yaml differs from every profile; keep it as profiles/NAME.yaml first, or pass --force"
            )
    write_bytes(PARAMS_FILE, source.read_bytes())
    print(f"params.yaml is now profile {profile}{': ' + params.note if params.note else ''}")


def main(arguments: list[str] | None = None) -> NoReturn:
    """The entry point: what a user can get wrong, and what can go wrong, ends in one line and an exit code."""
    try:
        app(arguments)
    except DataUnavailable as error:
        _fail("unavailable", str(error), 3)
    except UserError as error:
        _fail("usage", str(error), 2)
    except TrainingFailed as error:
        _fail("failed", str(error), 1)
    except OSError as error:
        _fail("failed", f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    raise AssertionError("typer exits by itself")


def _fail(kind: str, message: str, code: int) -> NoReturn:
    """Show the error, and hand it to the grid that started this command, if one did."""
    from pipeline.launch import OUTCOME_VARIABLE

    print(f"error: {message}", file=sys.stderr)
    outcome = os.environ.get(OUTCOME_VARIABLE)
    if outcome:
        Path(outcome).write_text(json.dumps({"kind": kind, "message": message}), encoding="utf-8")
    sys.exit(code)


def _load_params() -> "Params":
    from pipeline.components import link_components
    from pipeline.params import load_params

    params = load_params()
    link_components()
    return params


def _names(kind: Kind) -> list[str]:
    if kind is Kind.PROFILES:
        return sorted(path.stem for path in Path("profiles").glob("*.yaml"))
    if kind is Kind.FORMER:
        from schoenbat.nn.multihead import FORMERS

        return list(FORMERS)
    return _registry(kind).names()


def _origins(kind: Kind) -> dict[str, str]:
    """Where the components of other distributions come from, by name."""
    if kind in (Kind.PROFILES, Kind.FORMER):
        return {}
    from schoenbat.registry import describe_entry

    return {name: describe_entry(entry) for name, entry in _registry(kind).external().items()}


def _registry(kind: Kind) -> "Registry[Any]":
    from schoenbat.attention import ATTENTIONS
    from schoenbat.kernels import KERNELS
    from schoenbat.tasks import TASKS

    registries: dict[Kind, Registry[Any]] = {Kind.TASKS: TASKS, Kind.ATTN: ATTENTIONS, Kind.DOTF: KERNELS}
    return registries[kind]


def _changed_stages() -> set[str]:
    """The stages that DVC finds changed, by one `dvc status`."""
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "--wait-for-lock", "status", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        if "is busy" in result.stderr:
            raise UserError(
                "a stage of this checkout is running, so DVC cannot say what is out of date; wait for its end"
            )
        raise UserError(f"dvc status failed: {lines[0] if lines else 'no output'}")
    return set(json.loads(result.stdout))


def _due_stages(graph: dict[str, list[str]], changed: set[str]) -> dict[str, list[str]]:
    """The part of `graph` that is changed or comes after something changed."""
    due: dict[str, list[str]] = {}
    for stage, needs in graph.items():
        if stage in changed or any(need in due for need in needs):
            due[stage] = needs
    return due


def _run_due(params: "Params", chosen: list["Cell"], due: dict[str, list[str]], report: str) -> int:
    """Run the stages and the report, say how it went, and return the exit code."""
    from pipeline import tracking
    from pipeline.launch import run_cells

    logs = Path("logs", params.profile)
    environment = tracking.start_grid(params.profile) if due else {}
    Path("runs", params.profile).mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ended: dict[str, Event] = {}
    report_alone: dict[str, list[str]] = {report: []}
    try:
        for part in (due, report_alone):
            with contextlib.closing(run_cells(part, logs, environment)) as events:
                for event in events:
                    _show(event)
                    if event.state in ("failed", "unavailable", "skipped"):
                        ended[event.stage] = event
    except KeyboardInterrupt:
        print("interrupted; run the same again to go on: finished stages are kept, cells go on from their checkpoints")
        return 130
    table = Path("reports", params.profile, "tables", "accuracy.md")
    if report not in ended and table.is_file():
        print(f"\n{table.read_text(encoding='utf-8').rstrip()}\n\nreport: reports/{params.profile}/index.md")
    return _summarise(params, chosen, ended)


def _show(event: "Event") -> None:
    """One line for an event, cut to the width of the terminal if it is only progress."""
    if event.state == "progress":
        text = f"    {event.text}"
        print(text[: shutil.get_terminal_size().columns - 1] if sys.stdout.isatty() else text, flush=True)
    elif event.state != "queued":
        print(f"{event.stage}: {event.state}{' (' + event.text + ')' if event.text else ''}", flush=True)


def _summarise(params: "Params", chosen: list["Cell"], ended: dict[str, "Event"]) -> int:
    causes = {stage: event for stage, event in ended.items() if event.state != "skipped"}
    for stage, event in causes.items():
        print(f"{event.state}: {stage}: {event.text} (log: {event.log})")
    for cell in chosen:
        broken = ended.get(cell.stage("train", params.profile)) or ended.get(cell.stage("evaluate", params.profile))
        if broken is not None and broken.state == "skipped":
            print(f"not run: {cell.id}, because {broken.cause} {causes[str(broken.cause)].state}")
    if not causes:
        print(f"all {len(chosen)} cells of profile {params.profile} are done")
    if any(event.state == "failed" for event in causes.values()):
        return 1
    return 3 if causes else 0


def _cell_status(params: "Params", cell: "Cell", changed: set[str]) -> dict[str, Any]:
    """Whether the cell is done, and if not, what is known about it."""
    from pipeline.cells import stage_graph

    stages = [stage for stage in stage_graph(params, [cell]) if stage in changed]
    if not stages:
        return {"cell": cell.id, "state": "done", "reason": ""}
    for stage in stages:
        outcome = Path("logs", params.profile, f"{stage}.outcome.json")
        if outcome.is_file():
            reason = json.loads(outcome.read_text(encoding="utf-8"))
            state = "unavailable" if reason["kind"] == "unavailable" else "failed"
            return {"cell": cell.id, "state": state, "reason": reason["message"]}
    if (cell.checkpoint_folder(params.profile) / "last.pt").is_file():
        return {"cell": cell.id, "state": "interrupted", "reason": "goes on from its checkpoint"}
    return {"cell": cell.id, "state": "to run", "reason": ""}


if __name__ == "__main__":
    main()
