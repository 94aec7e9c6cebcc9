"""The commands of the stages, which a worker calls and a person may call; how commands are declared; exit codes.

0 done; 1 failed; 2 wrong usage or configuration; 3 data that cannot be had here; 75 stopped with the work saved (130
for a grid). Modules that take long to import are imported by the commands that need them.
"""

import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.grid import completion
from pipeline.host.heartbeat import OUTCOME_VARIABLE, STOPPED
from pipeline.host.stopping import Stopped
from schoenbat.errors import DataUnavailable, OutOfMemory, TrainingFailed, UserError

if TYPE_CHECKING:
    from pipeline.grid.params import Params

PROGRAM = "schoenbat-exp"
DEBUG_VARIABLE = "SCHOENBAT_DEBUG"
"""Set: every error is shown with its traceback."""

_OUTCOMES: dict[type[Exception], tuple[str, int]] = {
    DataUnavailable: ("unavailable", 3),
    UserError: ("usage", 2),
    OutOfMemory: ("memory", 1),
    MemoryError: ("memory", 1),
    TrainingFailed: ("failed", 1),
    Stopped: ("stopped", STOPPED),
}
"""What a grid calls each error, and its exit code; of two that fit, the first."""


def make_app(**settings: Any) -> typer.Typer:
    """Return an empty group of commands."""
    help_names = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, context_settings=help_names, **settings)


def command(
    app: typer.Typer, panel: str, *examples: str, name: str | None = None, about: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds a command to `app`, in a group of the help and with examples at the help's end."""
    lines = "".join(f"\n  {PROGRAM} {line}" for line in examples)
    return app.command(name, help=about, rich_help_panel=panel, epilog=f"Examples:{lines}")


def option(
    about: str, *flags: str, names: completion.Complete | None = None, panel: str | None = None, **more: Any
) -> Any:
    """Return an option as `typer.Annotated` takes it; `names` completes its value in the shell."""
    return typer.Option(*flags, help=about, autocompletion=names, rich_help_panel=panel, **more)


def argument(about: str, names: Callable[..., list[str]] | None = None, **more: Any) -> Any:
    """Return an argument as `typer.Annotated` takes it; `names` completes it in the shell."""
    return typer.Argument(help=about, autocompletion=names, **more)


_CELL = "The cell"
Task = Annotated[str, option("Name of the task.", names=completion.task, panel=_CELL)]
Attn = Annotated[str, option("Name of the attention mechanism.", names=completion.attn, panel=_CELL)]
Dotf = Annotated[
    str | None, option("Name of the kernel, if the mechanism needs one.", names=completion.kernel, panel=_CELL)
]
Former = Annotated[
    str, option("maclauformer (with ppSBN) or transformer (without).", names=completion.former, panel=_CELL)
]
Seed = Annotated[int | None, option("Default: each seed of the grid.", panel=_CELL)]
Profile = Annotated[
    str | None, option("Of which params.yaml must be. Default: whichever it is of.", names=completion.profile)
]
Device = Annotated[str | None, option("cpu, cuda or cuda:N. Default: run.device.", envvar="SCHOENBAT_DEVICE")]
Force = Annotated[bool, option("Even if it is up to date.", "--force")]
Json = Annotated[bool, option("For programs.", "--json")]

app = make_app(add_completion=False)
_add = partial(command, app, "One stage at a time")


def _for_cell(stage: str) -> Callable[..., None]:
    """Return a command that runs a stage for one cell, or for each seed of it."""

    def run(
        task: Task,
        attn: Attn,
        former: Former,
        dotf: Dotf = None,
        seed: Seed = None,
        device: Device = None,
        profile: Profile = None,
        force: Force = False,
    ) -> None:
        from pipeline.grid.cells import make_cells

        module, params = importlib.import_module(f"pipeline.stages.{stage}"), load(profile)
        for cell in make_cells(params, task, attn, dotf, former, seed):
            module.run(params, cell, device_name=device or params.run.device, force=force)

    return run


_add(
    "train --task lra-text --attn rmfa --dotf exp --former maclauformer",
    "train --task lra-text --attn softmax --former transformer --seed 43 --device cuda:0",
    name="train",
    about="Train one cell, or each seed of it that is out of date; an interrupted run goes on from its checkpoint.",
)(_for_cell("train"))
_add(
    "eval --task lra-text --attn rmfa --dotf exp --former maclauformer",
    name="eval",
    about="Test the best weights of one trained cell, or of each seed of it.",
)(_for_cell("evaluate"))


@_add("numerics")
def numerics(profile: Profile = None) -> None:
    """Write down what the code of each component computes, on which DVC's stages depend."""
    from pipeline.grid.numerics import write_numerics

    write_numerics(load(profile).grid.components())


@_add("golden golden.npz", "golden golden.npz --cell lra-text-softmax-transformer-42")
def golden(
    out: Annotated[Path, argument("The .npz file to write.")],
    cell: Annotated[list[str] | None, option("Only this cell; repeat for more.", names=completion.cell)] = None,
    profile: Profile = None,
) -> None:
    """Train cells for a few steps, and write what that gives, to compare two revisions of the code."""
    from pipeline.grid.cells import expand, select
    from pipeline.stages import golden as stage

    params = load(profile)
    chosen = [name for name in cell or () if name not in params.trained.cells]
    replaced = [name for name in params.trained.cells if not cell or name in cell]
    stage.run(params, select(expand(params), id=chosen) if chosen or not cell else [], replaced, out)


@_add("download --task lra-text")
def download(task: Task, profile: Profile = None) -> None:
    """Fetch and verify the raw data of one task."""
    from pipeline.stages import download as stage

    stage.run(load(profile), task)


@_add("preprocess --task lra-text")
def preprocess(task: Task, profile: Profile = None) -> None:
    """Turn the raw data of one task into the arrays that training reads."""
    from pipeline.stages import preprocess as stage

    stage.run(load(profile), task)


@_add("report", "report --reference mean --margin 2")
def report(
    profile: Profile = None,
    reference: Annotated[str, option("The mechanism that the others are compared with.")] = "softmax",
    margin: Annotated[float, option("Points of accuracy within which two count as equal.")] = 1.0,
    force: Annotated[bool, option("Even if the report there shows results that are gone.", "--force")] = False,
) -> None:
    """Build tables, figures and the page from what is finished."""
    from pipeline.stages import report as stage

    stage.run(load(profile), reference=reference, margin=margin, force=force)


@_add("bench")
def bench(profile: Profile = None) -> None:
    """Time all mechanisms side by side in one process."""
    from pipeline.stages import bench as stage

    params = load(profile)
    stage.run(params, Path("runs", params.profile, "bench.csv"))


@_add("errors --group lra-text-rmfa-exp-maclauformer")
def errors(
    group: Annotated[str, option("TASK-ATTN-DOTF-FORMER of a trained cell of the grid.", names=completion.group)],
    profile: Profile = None,
) -> None:
    """Measure how much of the attention of a trained cell, of its first seed, each estimate of a kernel explains."""
    from pipeline.grid.cells import expand, select
    from pipeline.stages import errors as stage

    params = load(profile)
    cell, *_ = select(expand(params), group=[group])
    stage.run(params, cell, Path("runs", params.profile, "errors", f"{group}.csv"))


@_add("replace --cell minilm-exact")
def replace(
    cell: Annotated[str, option("MODEL-METHOD of trained.cells.", names=completion.replaced)],
    profile: Profile = None,
    force: Force = False,
) -> None:
    """Measure what another attention makes of a trained model."""
    from pipeline.stages import replace as stage

    stage.run(load(profile), cell, force=force)


def load(profile: str | None = None) -> "Params":
    """Return the settings: params.yaml, or in a grid those of its start; UserError if they are of another profile."""
    from pipeline.grid.checked import check_code, load_checked
    from pipeline.grid.settings import params_file

    path = params_file()
    params = load_checked(path)
    if profile is not None and profile != params.profile:
        raise UserError(f"{path} is of profile {params.profile!r}, not {profile!r}")
    check_code()
    return params


def run_command(arguments: Sequence[str]) -> int:
    """Run the command of a stage in this process; its exit code."""
    return exit_code(app, arguments)


def exit_code(commands: Callable[..., Any], arguments: Sequence[str] | None) -> int:
    """Run a command; print what a user can get wrong, and what can go wrong, as one line; return the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Of a terminal or a pipe that takes ASCII alone.
        sys.stdout.reconfigure(errors="replace")
    try:
        code = commands(arguments, prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except typer.TyperException as error:
        # Its own form would take four lines.
        return _fail("usage", " ".join(error.format_message().split()), error.exit_code)
    except tuple(_OUTCOMES) as error:
        return _fail(
            *next(
                (how, str(error) or kind.__name__, code)
                for kind, (how, code) in _OUTCOMES.items()
                if isinstance(error, kind)
            )
        )
    except OSError as error:
        return _fail("crash", f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except Exception as error:  # noqa: BLE001 - of what nobody has foreseen, the place is told
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        told = f"{what} ({frame.f_code.co_filename}:{line}); {PROGRAM} --debug ... shows all of it"
        return _fail("failed", told, 1, traced=OUTCOME_VARIABLE in os.environ)


def _fail(kind: str, message: str, code: int, *, traced: bool = False) -> int:
    """Show the error, and hand it to the grid that started this command, if one did."""
    if traced or DEBUG_VARIABLE in os.environ:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    outcome = os.environ.get(OUTCOME_VARIABLE)
    if outcome:
        Path(outcome).write_text(json.dumps({"kind": kind, "message": message}), encoding="utf-8")
    return code
