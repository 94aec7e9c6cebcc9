"""schoenbat-exp: the experiments from the command line. `pipeline.stages.commands` has the commands of the stages."""

import dataclasses
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import schoenbat
from pipeline.cli.names import KINDS, described, names
from pipeline.grid import completion
from pipeline.grid.settings import enter_project
from pipeline.host.heartbeat import watch
from pipeline.stages import commands
from pipeline.stages.commands import Json, argument, option
from schoenbat.errors import UserError, list_choices, unknown_name

app = commands.make_app(
    help="Train, evaluate and compare attention mechanisms on Long Range Arena tasks; params.yaml says which."
)
_grid = partial(commands.command, app, "The grid")
_setup = partial(commands.command, app, "Names and settings")
_trained = partial(commands.command, app, "What has been trained")
_filter, _how = partial(option, panel="Which cells"), partial(option, panel="Where and how")
_BACKENDS = ("local", "slurm")

Strings = list[str] | None
OfProfile = Annotated[str | None, option("Default: that of params.yaml.", names=completion.profile)]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"{commands.PROGRAM} {schoenbat.__version__}")
        raise typer.Exit


@app.callback()
def _begin(
    version: Annotated[bool, option("Show the version.", "--version", callback=_show_version, is_eager=True)] = False,
    debug: Annotated[bool, option("Show tracebacks of errors.", "--debug", envvar=commands.DEBUG_VARIABLE)] = False,
) -> None:
    """Go to the root of the project before any command."""
    if debug:
        os.environ[commands.DEBUG_VARIABLE] = "1"
    enter_project()


@_grid(
    "run --grid",
    "run --grid --dry-run",
    "run --task lra-text --attn rmfa --attn softmax",
    "run --grid --jobs 2 --devices cuda:0,cuda:1",
)
def run(
    grid: Annotated[bool, _filter("All cells of params.yaml.", "--grid")] = False,
    task: Annotated[Strings, _filter("Only cells of this task; repeat for more.", names=completion.grid_task)] = None,
    attn: Annotated[Strings, _filter("Only cells with this mechanism.", names=completion.grid_attn)] = None,
    dotf: Annotated[Strings, _filter("Only cells with this kernel.", names=completion.grid_dotf)] = None,
    former: Annotated[Strings, _filter("Only cells with this former.", names=completion.grid_former)] = None,
    seed: Annotated[list[int] | None, _filter("Only cells with this seed.", names=completion.grid_seed)] = None,
    cell: Annotated[Strings, _filter("Only the cell of this id.", names=completion.cell)] = None,
    jobs: Annotated[int | None, _how("Cells at once. Default and limit: cores divided by run.threads.", min=1)] = None,
    backend: Annotated[
        str, _how("local, this machine; or slurm, a cluster as run.slurm describes it.", names=lambda: list(_BACKENDS))
    ] = "local",
    devices: Annotated[str | None, _how("Such as cpu or cuda:0,cuda:1. Default: run.device.")] = None,
    force: Annotated[bool, option("Run the chosen cells even if they are up to date.", "--force")] = False,
    dry_run: Annotated[bool, option("Say what would run, and stop.", "--dry-run")] = False,
    as_json: Annotated[bool, option("With --dry-run: for programs.", "--json")] = False,
) -> None:
    """Run what is out of date: all of the grid (--grid), or the cells that the filters leave; then build the report.

    Ctrl-C once lets running cells save their work, twice ends them; the same command goes on from there.
    """
    from pipeline.launch.grid_run import RunOptions, run_grid

    if backend not in _BACKENDS:
        raise unknown_name("backend", backend, _BACKENDS)
    params = commands.load()
    filters: dict[str, Any] = dict(task=task, attn=attn, dotf=dotf, former=former, seed=seed, id=cell)
    if not grid and not any(filters.values()):
        raise UserError("nothing chosen: pass --grid for all cells of params.yaml, or --task, --attn, --cell, ...")
    if as_json and not dry_run:
        raise UserError("--json goes with --dry-run")
    typed = RunOptions(filters, backend == "slurm", jobs, devices, force, dry_run, as_json)
    raise typer.Exit(run_grid(params, typed))


@_grid("status", "status --watch", "status --json")
def status(
    watch: Annotated[bool, option("Show it again and again, until Ctrl-C.", "--watch")] = False,
    as_json: Json = False,
) -> None:
    """Say how far each cell is, also while a grid runs, and why the last attempt at one failed."""
    from pipeline.monitor import view
    from pipeline.monitor.status import take_snapshot

    if watch:
        from pipeline.monitor.live import watch_grid

        watch_grid(as_json)
        return
    snapshot, width = take_snapshot(), shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(json.dumps(dataclasses.asdict(snapshot), indent=2) if as_json else "\n".join(view.lines(snapshot, width)))


@_grid("carry v1.2", "carry HEAD~3 --tolerance 1e-6")
def carry(
    revision: Annotated[str, argument("The git revision whose code has made the results.")],
    tolerance: Annotated[float, option("Largest relative difference of the numbers. Default: the same bits.")] = 0.0,
) -> None:
    """Carry results over from a revision whose code computes the same, as golden records of both show."""
    from pipeline.launch.grid_run import recording
    from pipeline.record.carry import carry_over

    params = commands.load()
    with recording(params):
        carry_over(params, revision, tolerance=tolerance)


@_grid("import ../other-checkout", name="import")
def import_results(
    folder: Annotated[Path, argument("The root folder of another checkout of this project.")],
) -> None:
    """Take over cells that were finished in another checkout and are what this one would compute."""
    from pipeline.launch.grid_run import recording
    from pipeline.record.carry import take_over

    params = commands.load()
    with recording(params):
        take_over(params, folder)


@_grid("results", "results --json")
def results(as_json: Json = False) -> None:
    """Show what the finished cells have reached, also while a grid runs."""
    from pipeline.reporting._terminal import results_for_programs, show_results

    params = commands.load()
    if as_json:
        print(json.dumps(results_for_programs(params, Path()), indent=2))
    else:
        show_results(params, Path())


@_grid("logs lra-text-rmfa-exp-maclauformer-42")
def logs(
    cell: Annotated[str, argument("The id of a cell, or another job as `status` shows it.", completion.log)],
) -> None:
    """Show the output of a cell's last run."""
    from pipeline.monitor.status import read_grid

    folder = Path("logs", read_grid()[0])
    path = folder / f"{cell}.log"
    if not path.is_file():
        known = list_choices(cell, sorted(log.stem for log in folder.glob("*.log")))
        raise UserError(f"no log of {cell!r} in {folder}; there are: {known}")
    with path.open(encoding="utf-8", errors="replace") as file:
        shutil.copyfileobj(file, sys.stdout)


@_setup("list", "list attn", "list profiles --json", name="list")
def list_names(
    kind: Annotated[str | None, argument(f"One of {', '.join(KINDS)}. Default: all.", lambda: list(KINDS))] = None,
    as_json: Json = False,
) -> None:
    """List the names that can be used, what they stand for, and what comes from other distributions."""
    from pipeline.grid.checked import ensure_checked
    from pipeline.grid.settings import PARAMS_FILE, PROJECT_FILE

    if kind is not None and kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    found = {each: names(each) for each in KINDS if kind in (None, each)}
    if as_json:
        print(json.dumps({each: [dataclasses.asdict(name) for name in listed] for each, listed in found.items()}))
    else:
        for each, listed in found.items():
            print(*([f"{each}:"] if kind is None else []), *described(listed), sep="\n")
    if PARAMS_FILE.exists() or PROJECT_FILE.exists():
        ensure_checked()


@_setup("use cpu")
def use(
    profile: Annotated[str, argument("Name of a file in profiles/.", completion.profile)],
    force: Annotated[bool, option("Even if params.yaml is not a copy of any profile.", "--force")] = False,
) -> None:
    """Put profiles/PROFILE.yaml into params.yaml, and its record, if it has one, into dvc.lock."""
    from pipeline.grid.checked import load_checked
    from pipeline.grid.settings import PARAMS_FILE
    from pipeline.models.trained import current_profile
    from pipeline.record.writer import exchange_record
    from schoenbat.files import write_bytes

    known = [each.name for each in names("profiles")]
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
    if PARAMS_FILE.exists():
        exchange_record(current_profile(), profile)
    write_bytes(PARAMS_FILE, source.read_bytes())
    print(f"params.yaml is now profile {profile}{': ' + params.note if params.note else ''}")


@_setup("doctor", "doctor --json")
def doctor(as_json: Json = False) -> None:
    """Say whether all that a grid needs is here, and how to mend what is not; exit code 1 if something is wrong."""
    from pipeline.doctor.checks import examine

    found = []
    for finding in examine():
        found.append(finding)
        if not as_json:
            print(finding.line(), flush=True)
    wrong = any(finding.state == "wrong" for finding in found)
    if as_json:
        print(json.dumps({"ok": not wrong, "findings": [finding._asdict() for finding in found]}, indent=2))
    raise typer.Exit(int(wrong))


@_trained('predict --cell CELL "A gem of a film."', "predict --cell CELL --json < reviews.txt")
def predict(
    cell: Annotated[str, option("The id of a trained cell.", names=completion.trained)],
    texts: Annotated[
        Strings,
        argument(
            "In pairs where the task compares two. Default: standard input, a text a line; two with a tab between.",
            metavar="TEXT",
        ),
    ] = None,
    top: Annotated[int, option("So many classes of each text, the likeliest first.")] = 3,
    device: Annotated[str, option("cpu, cuda or cuda:N.", envvar="SCHOENBAT_DEVICE")] = "cpu",
    profile: OfProfile = None,
    as_json: Json = False,
) -> None:
    """Classify texts with a trained cell."""
    from pipeline.models import predict as tool

    tool.run(cell, texts or [], top=top, device_name=device, profile=profile, as_json=as_json)


@_trained("export CELL exported/rmfa", "export CELL exported/rmfa --format onnx")
def export(
    cell: Annotated[str, argument("The id of a trained cell.", completion.trained)],
    folder: Annotated[Path, argument("Is made; must be empty if it is there.")],
    file_format: Annotated[
        str, option("safetensors; or onnx, for the model as ONNX beside it.", "--format")
    ] = "safetensors",
) -> None:
    """Write a trained cell into a folder that stands for itself: weights, config, model card, settings."""
    from pipeline.models import export as tool

    print(*tool.run(cell, folder, file_format), sep="\n")


@_trained("compare quick cpu", "compare HEAD~1", "compare CELL OTHER-CELL", "compare v1 v2 --json")
def compare(
    a: Annotated[str, argument("A profile, trained cell (or PROFILE/CELL) or git revision.", completion.comparable)],
    b: Annotated[str, argument("Another of them; . is the working folder as it is.", completion.comparable)] = ".",
    as_json: Json = False,
) -> None:
    """Compare two profiles, cells or git revisions: settings, data, code, and every number with its significance."""
    from pipeline.models import compare as tool

    tool.run(a, b, as_json=as_json)


@_trained("ui", "ui --open", "ui --profile cpu --port 5001")
def ui(
    profile: OfProfile = None,
    port: Annotated[int, option("Of this machine.", min=1, max=65535)] = 5000,
    open_browser: Annotated[bool, option("Open the page in a browser.", "--open")] = False,
) -> None:
    """Serve MLflow's pages until Ctrl-C; the address is that of the page that compares the cells of a profile."""
    from pipeline.cli import mlflow_ui as tool

    tool.run(profile=profile, port=port, open_browser=open_browser)


@_trained("log", "log --profile cpu")
def log(profile: OfProfile = None) -> None:
    """Log the finished cells that MLflow lacks, from their files."""
    from pipeline.mlflow import tracking
    from pipeline.models import trained

    profile = profile or trained.current_profile()
    cells = [*trained.trained_cells(profile), *(path.stem for path in Path("runs", profile, "trained").glob("*.json"))]
    if problem := tracking.Tracker(profile, cells).finish():
        raise UserError(problem)
    print(f"MLflow has all {len(cells)} finished cells of profile {profile}: {tracking.shown(tracking.store_uri())}")


app.add_typer(commands.app)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `schoenbat-exp`."""
    watch()
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(commands.exit_code(app, given or ["--help"]))
