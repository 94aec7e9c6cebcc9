"""What a worker calls, and a person may: the commands of the stages, with the exit codes of them all.

0 done; 1 failed; 2 wrong usage or configuration; 3 data that cannot be had here; 75 stopped with the work saved (130
for a grid). Modules that take long to import are imported by the commands that need them.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import completion
from pipeline.lease import OUTCOME_VARIABLE, STOPPED
from pipeline.stopping import Stopped
from schoenbat.errors import DataUnavailable, OutOfMemory, TrainingFailed, UserError

if TYPE_CHECKING:
    from pipeline.grid.params import Params

PROGRAM = "schoenbat-exp"
STAGE_COMMANDS = "One stage at a time"
"""The group of these commands in the help."""


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "Examples:\n" + "\n".join(f"  {PROGRAM} {line}" for line in lines)


app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PARAMS_VARIABLE = "SCHOENBAT_PARAMS"
"""Names the copy of params.yaml that a grid has made when it started."""
DEBUG_VARIABLE = "SCHOENBAT_DEBUG"
"""Set: every error is shown with its traceback."""

_CELL_PANEL = "The cell"
TaskOption = Annotated[
    str,
    typer.Option("--task", autocompletion=completion.task, rich_help_panel=_CELL_PANEL, help="Name of the task."),
]
AttnOption = Annotated[
    str,
    typer.Option(
        "--attn", autocompletion=completion.attn, rich_help_panel=_CELL_PANEL, help="Name of the attention mechanism."
    ),
]
DotfOption = Annotated[
    str | None,
    typer.Option(
        "--dotf",
        autocompletion=completion.kernel,
        rich_help_panel=_CELL_PANEL,
        help="Name of the kernel, if the mechanism needs one.",
    ),
]
FormerOption = Annotated[
    str,
    typer.Option(
        "--former",
        autocompletion=completion.former,
        rich_help_panel=_CELL_PANEL,
        help="maclauformer (with ppSBN) or transformer (without).",
    ),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", rich_help_panel=_CELL_PANEL, help="Default: the first seed of the grid.")
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        autocompletion=completion.profile,
        help="Of which params.yaml must be. Default: whichever it is of.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", envvar="SCHOENBAT_DEVICE", help="cpu, cuda or cuda:N. Default: run.device."),
]


@app.command(
    rich_help_panel=STAGE_COMMANDS,
    epilog=examples(
        "train --task lra-text --attn rmfa --dotf exp --former maclauformer",
        "train --task lra-text --attn softmax --former transformer --seed 43 --device cuda:0",
    ),
)
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
    from pipeline.grid.cells import make_cell
    from pipeline.stages import train as stage

    params = load(profile)
    cell = make_cell(params, task, attn, dotf, former, seed)
    stage.run(params, cell, device_name=device or params.run.device, save=save, restart=restart)


@app.command(
    "eval",
    rich_help_panel=STAGE_COMMANDS,
    epilog=examples("eval --task lra-text --attn rmfa --dotf exp --former maclauformer"),
)
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
    from pipeline.grid.cells import make_cell
    from pipeline.stages import evaluate as stage

    params = load(profile)
    stage.run(params, make_cell(params, task, attn, dotf, former, seed), device_name=device or params.run.device)


@app.command(rich_help_panel=STAGE_COMMANDS, epilog=examples("download --task lra-text"))
def download(task: TaskOption, profile: ProfileOption = None) -> None:
    """Fetch and verify the raw data of one task."""
    from pipeline.stages import download as stage

    params = load(profile)
    stage.run(params, task)


@app.command(rich_help_panel=STAGE_COMMANDS, epilog=examples("preprocess --task lra-text"))
def preprocess(task: TaskOption, profile: ProfileOption = None) -> None:
    """Turn the raw data of one task into the arrays that training reads."""
    from pipeline.stages import preprocess as stage

    params = load(profile)
    stage.run(params, task)


@app.command(rich_help_panel=STAGE_COMMANDS, epilog=examples("report", "report --reference mean --margin 2"))
def report(
    profile: ProfileOption = None,
    reference: Annotated[str, typer.Option(help="The mechanism that the others are compared with.")] = "softmax",
    margin: Annotated[float, typer.Option(help="Points of accuracy within which two count as equal.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Even if the report there shows more finished cells.")] = False,
) -> None:
    """Build tables, figures and the page from what is finished."""
    from pipeline.stages import report as stage

    params = load(profile)
    stage.run(params, reference=reference, margin=margin, force=force)


@app.command(rich_help_panel=STAGE_COMMANDS, epilog=examples("bench"))
def bench(profile: ProfileOption = None) -> None:
    """Time all mechanisms side by side in one process."""
    from pipeline.stages import bench as stage

    params = load(profile)
    stage.run(params, Path("runs", params.profile, "bench.csv"))


@app.command(
    rich_help_panel=STAGE_COMMANDS, epilog=examples("errors", "errors --cell lra-text-rmfa-exp-maclauformer-42")
)
def errors(
    cell: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.cell, help="On the vectors of this trained cell. Default: made-up ones."
        ),
    ] = None,
    profile: ProfileOption = None,
) -> None:
    """Measure how far each estimate of a kernel is from it, at equal numbers of features."""
    from pipeline.grid.cells import expand, select
    from pipeline.stages import errors as stage

    params = load(profile)
    folder = Path("runs", params.profile)
    if cell is None:
        stage.run(params, folder / "errors.csv")
    else:
        (chosen,) = select(expand(params), id=[cell])
        stage.run_trained(params, chosen, folder / "errors" / f"{cell}.csv")


def load(profile: str | None = None) -> "Params":
    """The settings: params.yaml, or under a grid those of its start; UserError if they are of another profile."""
    from pipeline.grid.checked import load_checked
    from pipeline.grid.code import check_code
    from pipeline.grid.settings import PARAMS_FILE

    path = Path(os.environ.get(PARAMS_VARIABLE, PARAMS_FILE))
    params = load_checked(path)
    if profile is not None and profile != params.profile:
        raise UserError(f"{path} is of profile {params.profile!r}, not {profile!r}")
    check_code()
    return params


def run_command(arguments: Sequence[str]) -> int:
    """Run the command of a stage in this process; its exit code."""
    return exit_code(app, arguments)


def exit_code(commands: Callable[..., Any], arguments: Sequence[str] | None) -> int:
    """Run a command: what a user can get wrong, and what can go wrong, ends in one line and an exit code."""
    try:
        code = commands(arguments, prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except typer.TyperException as error:
        # Its own form would take four lines.
        return _fail("usage", " ".join(error.format_message().split()), error.exit_code)
    except DataUnavailable as error:
        return _fail("unavailable", str(error), 3)
    except UserError as error:
        return _fail("usage", str(error), 2)
    except OutOfMemory as error:
        return _fail("memory", str(error), 1)
    except TrainingFailed as error:
        return _fail("failed", str(error), 1)
    except Stopped as error:
        return _fail("stopped", str(error), STOPPED)
    except OSError as error:
        return _fail("crash", f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)


def _fail(kind: str, message: str, code: int) -> int:
    """Show the error, and hand it to the grid that started this command, if one did."""
    if DEBUG_VARIABLE in os.environ:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    outcome = os.environ.get(OUTCOME_VARIABLE)
    if outcome:
        Path(outcome).write_text(json.dumps({"kind": kind, "message": message}), encoding="utf-8")
    return code
