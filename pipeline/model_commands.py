"""The commands for what has been trained: classify, hand on, compare, look."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline import commands, completion

app = typer.Typer(
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PANEL = "What has been trained"


@app.command(
    rich_help_panel=PANEL,
    epilog=commands.examples(
        'predict --cell CELL "A gem of a film."',
        "predict --cell CELL --file reviews.txt --json",
    ),
)
def predict(
    cell: Annotated[str, typer.Option("--cell", autocompletion=completion.trained, help="The id of a trained cell.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT", help="In pairs where the task compares two. Default: standard input, a text a line."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="A text a line; two with a tab between them where the task compares two."),
    ] = None,
    top: Annotated[int, typer.Option("--top", help="So many classes of each text, the likeliest first.")] = 3,
    device: Annotated[str, typer.Option("--device", envvar="SCHOENBAT_DEVICE", help="cpu, cuda or cuda:N.")] = "cpu",
    profile: Annotated[
        str | None,
        typer.Option("--profile", autocompletion=completion.profile, help="Of the cell. Default: that of params.yaml."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Classify texts with a trained cell."""
    from pipeline import predict as tool

    tool.run(cell, texts or [], file, top=top, device_name=device, profile=profile, as_json=as_json)


@app.command(rich_help_panel=PANEL, epilog=commands.examples("export CELL exported/rmfa"))
def export(
    cell: Annotated[str, typer.Argument(autocompletion=completion.trained, help="The id of a trained cell.")],
    folder: Annotated[Path, typer.Argument(help="Is made; must be empty if it is there.")],
) -> None:
    """Write a trained cell into a folder that stands for itself: weights, config, model card, settings."""
    from pipeline import export as tool

    for path in tool.run(cell, folder):
        print(path)


@app.command(
    rich_help_panel=PANEL,
    epilog=commands.examples("compare quick cpu", "compare HEAD~1", "compare CELL OTHER-CELL", "compare v1 v2 --json"),
)
def compare(
    a: Annotated[
        str,
        typer.Argument(
            autocompletion=completion.comparable,
            help="A profile, the id of a trained cell (or PROFILE/CELL), or a git revision.",
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(autocompletion=completion.comparable, help="Another of them; . is the working folder as it is."),
    ] = ".",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compare two profiles, cells or git revisions: settings, data, code, and every number with its significance."""
    from pipeline import compare as tool

    tool.run(a, b, as_json=as_json)


@app.command(rich_help_panel=PANEL, epilog=commands.examples("ui", "ui --open", "ui --profile cpu --port 5001"))
def ui(
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile", autocompletion=completion.profile, help="Of the cells. Default: that of params.yaml."
        ),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Of this machine.")] = 5000,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve MLflow's pages until Ctrl-C; the address is that of the page that compares the cells of a profile."""
    from pipeline import mlflow_ui as tool

    tool.run(profile=profile, port=port, open_browser=open_browser)
