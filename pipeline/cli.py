"""schoenbat-exp: the experiments from the command line. `pipeline.commands` has the commands of the stages."""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer

import schoenbat
from pipeline import commands, completion, model_commands
from pipeline.grid.settings import enter_project
from pipeline.lease import watch
from pipeline.names import Kind, described, names
from schoenbat.errors import UserError, list_choices, unknown_name

app = typer.Typer(
    help="Train, evaluate and compare attention mechanisms on Long Range Arena tasks; params.yaml says which.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_LOOK_SECONDS = 1.0


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"{commands.PROGRAM} {schoenbat.__version__}")
        raise typer.Exit


_GRID_COMMANDS, _SETUP_COMMANDS = "The grid", "Names and settings"
_FILTERS, _HOW = "Which cells", "Where and how"
_BACKENDS = ("local", "slurm")


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line for what nobody has foreseen."""
    *_, (frame, line) = traceback.walk_tb(trace)
    what = next(iter(str(error).splitlines()), "")
    where = f"{frame.f_code.co_filename}:{line}"
    print(f"error: {kind.__name__}: {what} ({where}); {commands.PROGRAM} --debug ... shows all of it", file=sys.stderr)


def _filter(choices: Callable[..., Any], text: str) -> Any:
    return typer.Option(autocompletion=choices, rich_help_panel=_FILTERS, help=text)


@app.callback()
def _begin(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar=commands.DEBUG_VARIABLE, help="Show errors with their tracebacks.")
    ] = False,
) -> None:
    """What comes before each command."""
    if debug:
        os.environ[commands.DEBUG_VARIABLE] = "1"
    else:
        sys.excepthook = _show_error
    enter_project()


@app.command(
    rich_help_panel=_GRID_COMMANDS,
    epilog=commands.examples(
        "run --grid",
        "run --grid --dry-run",
        "run --task lra-text --attn rmfa --attn softmax",
        "run --grid --jobs 2 --devices cuda:0,cuda:1",
    ),
)
def run(
    grid: Annotated[bool, typer.Option("--grid", rich_help_panel=_FILTERS, help="All cells of params.yaml.")] = False,
    task: Annotated[
        list[str] | None, _filter(completion.grid_task, "Only cells of this task; repeat for more, as all below.")
    ] = None,
    attn: Annotated[list[str] | None, _filter(completion.grid_attn, "Only cells with this mechanism.")] = None,
    dotf: Annotated[list[str] | None, _filter(completion.grid_dotf, "Only cells with this kernel.")] = None,
    former: Annotated[list[str] | None, _filter(completion.grid_former, "Only cells with this former.")] = None,
    seed: Annotated[list[int] | None, _filter(completion.grid_seed, "Only cells with this seed.")] = None,
    cell: Annotated[list[str] | None, _filter(completion.cell, "Only the cell of this id.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", rich_help_panel=_HOW, help="Cells at once. Default and limit: cores divided by run.threads."
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            autocompletion=lambda: list(_BACKENDS),
            rich_help_panel=_HOW,
            help="local, this machine; or slurm, a cluster as run.slurm describes it.",
        ),
    ] = "local",
    devices: Annotated[
        str | None,
        typer.Option("--devices", rich_help_panel=_HOW, help="Such as cpu or cuda:0,cuda:1. Default: run.device."),
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
    from pipeline.grid.cells import expand
    from pipeline.launch import grid_run

    if backend not in _BACKENDS:
        raise unknown_name("backend", backend, _BACKENDS)
    params = commands.load()
    filters: dict[str, Any] = dict(task=task, attn=attn, dotf=dotf, former=former, seed=seed, id=cell)
    if not grid and not any(filters.values()):
        raise UserError("nothing chosen: pass --grid for all cells of params.yaml, or --task, --attn, --cell, ...")
    if as_json and not dry_run:
        raise UserError("--json goes with --dry-run")
    wishes = grid_run.Wishes(filters, jobs, devices, restart, force, fail_fast, dry_run, as_json)
    raise typer.Exit(grid_run.run_grid(params, expand(params), wishes, slurm=backend == "slurm"))


app.add_typer(model_commands.app)
app.add_typer(commands.app)


@app.command(rich_help_panel=_GRID_COMMANDS, epilog=commands.examples("status", "status --watch", "status --json"))
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say how far each cell is, also while a grid runs, and why the last attempt at one failed."""
    from pipeline.monitor import view
    from pipeline.monitor.status import take_snapshot

    if watch:
        from pipeline.monitor.live import watch_grid

        watch_grid(as_json)
        return
    snapshot = take_snapshot()
    print(json.dumps(dataclasses.asdict(snapshot), indent=2) if as_json else "\n".join(view.lines(snapshot)))


@app.command(rich_help_panel=_GRID_COMMANDS, epilog=commands.examples("results", "results --json"))
def results(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show what the finished cells have reached, also while a grid runs."""
    from pipeline.reporting._terminal import results_for_programs, show_results

    params = commands.load()
    if as_json:
        print(json.dumps(results_for_programs(params, Path()), indent=2))
    else:
        show_results(params, Path())


@app.command(rich_help_panel=_GRID_COMMANDS, epilog=commands.examples("logs lra-text-rmfa-exp-maclauformer-42 -f"))
def logs(
    cell: Annotated[
        str,
        typer.Argument(
            autocompletion=completion.log, help="The id of a cell, or the name of another job, as `status` shows it."
        ),
    ],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what is added, until Ctrl-C.")] = False,
) -> None:
    """Show the output of a cell's last run."""
    from pipeline.monitor.status import read_grid

    folder = Path("logs", read_grid()[0])
    path = folder / f"{cell}.log"
    if not path.is_file():
        known = list_choices(cell, sorted(log.stem for log in folder.glob("*.log")))
        raise UserError(f"no log of {cell!r} in {folder}; there are: {known}")
    with path.open(encoding="utf-8", errors="replace") as file, contextlib.suppress(KeyboardInterrupt):
        shutil.copyfileobj(file, sys.stdout)
        while follow:
            sys.stdout.flush()
            time.sleep(_LOOK_SECONDS)
            shutil.copyfileobj(file, sys.stdout)


@app.command(
    "list", rich_help_panel=_SETUP_COMMANDS, epilog=commands.examples("list", "list attn", "list profiles --json")
)
def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(autocompletion=lambda: list(Kind), help=f"One of {', '.join(Kind)}. Default: all kinds."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the names that can be used, what they stand for, and what comes from other distributions."""
    from pipeline.grid.checked import ensure_checked
    from pipeline.grid.settings import PARAMS_FILE, PROJECT_FILE

    if kind is not None and kind not in list(Kind):
        raise unknown_name("kind", kind, Kind)
    found = {each: names(each) for each in Kind if kind in (None, each)}
    if as_json:
        print(json.dumps({each: [dataclasses.asdict(name) for name in listed] for each, listed in found.items()}))
    else:
        for each, listed in found.items():
            print(*([f"{each}:"] if kind is None else []), *described(listed), sep="\n")
    if PARAMS_FILE.exists() or PROJECT_FILE.exists():
        ensure_checked()


@app.command(rich_help_panel=_SETUP_COMMANDS, epilog=commands.examples("use cpu"))
def use(
    profile: Annotated[str, typer.Argument(autocompletion=completion.profile, help="Name of a file in profiles/.")],
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


@app.command(rich_help_panel=_SETUP_COMMANDS, epilog=commands.examples("doctor", "doctor --json", "doctor --gpu"))
def doctor(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Run the tests for a GPU, at most ten minutes, and write docs/gpu.md.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say whether all that a grid needs is here, and how to mend what is not; exit code 1 if something is wrong."""
    from pipeline.doctor import Finding, checks, gpu_tests

    found: list[Finding] = []
    for finding in gpu_tests.examine() if gpu else checks.examine():
        found.append(finding)
        if not as_json:
            print(finding.line(width=8), flush=True)
    wrong = any(finding.state == "wrong" for finding in found)
    if as_json:
        print(json.dumps({"ok": not wrong, "findings": [dataclasses.asdict(finding) for finding in found]}, indent=2))
    raise typer.Exit(int(wrong))


def main(arguments: list[str] | None = None) -> NoReturn:
    """The entry point."""
    watch()
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(commands.exit_code(app, given or ["--help"]))


if __name__ == "__main__":
    main()
