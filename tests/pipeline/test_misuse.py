"""What people type by mistake is one line that says what was meant; what the shell and the help offer beforehand."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from project_folder import ROOT, Project

from pipeline.cli import app as cli
from pipeline.stages import commands

Invoke = Callable[..., tuple[int, str, str]]

PLAIN = "--task lra-listops --attn softmax --former transformer"
CELLS = "lra-listops-softmax-transformer-0"
MISUSES = {
    "trian": "Did you mean 'train'",
    "stats": "Did you mean 'status'",
    "lsit": "Did you mean 'list'",
    "run --gird": "--grid",
    "run --grid --dryrun": "--dry-run",
    "status --jsno": "--json",
    "run": "pass --grid",
    "run quick": "unexpected extra argument(s) (quick)",
    "run --grid --backend slrum": "unknown backend 'slrum'; choose one of: slurm",
    "run --task lra-lisops": "the grid has no task 'lra-lisops'; choose from: lra-listops",
    "run --attn sofmax": "the grid has no attn 'sofmax'; choose from: softmax",
    "run --attn RMFA": "the grid has no attn 'RMFA'; choose from: rmfa",
    "run --seed 11": "the grid has no seed 11; choose from: 1",
    "run --cell lra-listops-softmax-transfomer-0": f"choose from: {CELLS}",
    "run --grid --devices gpu": "choose one of: cpu",
    "run --grid --jobs two": "'--jobs': Input should be a valid integer",
    "train --attn softmax --former transformer": "Missing option '--task'",
    f"train {PLAIN} --task lra_listops": "unknown task 'lra_listops'; choose one of: lra-listops",
    f"train {PLAIN} --attn rmfa-sketsh": "unknown attn 'rmfa-sketsh'; choose one of: rmfa-sketch",
    f"train {PLAIN} --former transfomer": "unknown former 'transfomer'; choose one of: transformer",
    "train --task lra-listops --attn rmfa --former maclauformer --dotf ex": "unknown dotf 'ex'; choose one of: exp",
    f"train {PLAIN} --dotf exp": "takes no kernel",
    f"train {PLAIN} --seed -1": "--seed must lie between 0 and",
    f"train {PLAIN} --device CUDA": "unknown device 'CUDA'; choose one of: cpu",
    "list task": "unknown kind 'task'; choose one of: tasks",
    "use qiuck": "unknown profile 'qiuck'; choose one of: quick",
    "logs lra-listops-softmax-0": f"no log of 'lra-listops-softmax-0' in logs/tiny; there are: {CELLS}",
    "errors --group lra-listops-sofmax-transformer": "choose from: lra-listops-softmax-transformer",
    "download --task listops": "unknown task 'listops'; choose one of: lra-listops",
    "predict --cell lra-listops-softmax-transformer-0 x": "no trained cell",
    "export nowhere": "Missing argument 'folder'",
    "report --profile tinny": "params.yaml is of profile 'tiny', not 'tinny'",
}
assert len(MISUSES) >= 25


@pytest.fixture
def furnished(project: Project) -> Project:
    """A project with profiles and a log."""
    for file, content in (("profiles/quick.yaml", "profile: quick\n"), (f"logs/tiny/{CELLS}.log", "trained\n")):
        Path(file).parent.mkdir(parents=True)
        Path(file).write_text(content)
    return project


@pytest.mark.parametrize("typed", MISUSES)
def test_a_misuse_is_one_line_that_says_what_was_meant(furnished: Project, invoke: Invoke, typed: str) -> None:
    code, out, err = invoke(*shlex.split(typed))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert MISUSES[typed] in err


def run_apart(script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


BROKEN = """
from pipeline.cli import app as cli
from pipeline.stages import commands

@cli.app.command()
def broken() -> None:
    assert 1 == 2, "no such luck"

cli.main([{before}"broken"])
"""


def test_what_nobody_foresaw_is_one_line_too_and_a_traceback_with_debug(tmp_path: Path) -> None:
    quiet = run_apart(BROKEN.format(before=""))
    assert quiet.returncode == 1
    assert re.fullmatch(r"error: AssertionError: no such luck \(.*:\d+\); schoenbat-exp --debug .*\n", quiet.stderr)
    for shown in (
        run_apart(BROKEN.format(before='"--debug", ')),
        run_apart(BROKEN.format(before=""), SCHOENBAT_DEBUG="1"),
    ):
        assert shown.returncode == 1
        assert shown.stderr.startswith("Traceback")
        assert f"\nAssertionError: no such luck\n{quiet.stderr}" in shown.stderr


def test_debug_shows_where_an_error_of_the_user_was_found(
    project: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(commands.DEBUG_VARIABLE, "")
    code, _, err = invoke("--debug", "use", "huge")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("error: unknown profile 'huge'")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", {"run", "status", "train", "list", "use"}),
        ("st", {"status"}),
        ("train --task ", {"lra-listops", "lra-text"}),
        ("train --attn ", {"softmax", "mean", "rmfa"}),
        ("train --dotf e", {"exp"}),
        ("train --former m", {"maclauformer"}),
        ("run --attn s", {"softmax"}),
        ("run --dotf ", {"exp", "inverse"}),
        ("run --cell lra-text-softmax", {"lra-text-softmax-transformer-0", "lra-text-softmax-transformer-1"}),
        ("run --backend s", {"slurm"}),
        ("errors --group lra-listops-m", {"lra-listops-mean-transformer"}),
        ("logs ", {CELLS}),
        ("list at", {"attn"}),
        ("use q", {"quick"}),
        ("report --profile ", {"quick"}),
    ],
)
def test_the_shell_completes_names(
    furnished: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, typed: str, expected: set[str]
) -> None:
    assert complete(invoke, monkeypatch, typed) >= expected
    if typed:
        assert complete(invoke, monkeypatch, typed) == expected


def complete(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, typed: str) -> set[str]:
    """What typer's own script for bash gets from the program."""
    words = f"schoenbat-exp {typed}"
    monkeypatch.setenv("_SCHOENBAT_EXP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    return set(invoke("ignored")[1].split())


def test_completion_is_silent_where_params_cannot_be_read(
    furnished: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("params.yaml").write_text("grid: [")
    assert complete(invoke, monkeypatch, "run --cell ") == set()
    Path("params.yaml").unlink()
    assert complete(invoke, monkeypatch, "train --task ") == set()


def test_completion_needs_neither_torch_nor_what_takes_long(furnished: Project) -> None:
    script = (
        "import sys; from pipeline.grid import completion as c; c.cell(''), c.kernel(''), c.attn(''); "
        "print(sorted({'torch', 'mlflow', 'dvc', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    assert run_apart(script).stdout == "[]\n"


def commands_of_the_program() -> dict[str, Any]:
    program: Any = typer.main.get_command(cli.app)
    return dict(program.commands)


@pytest.mark.parametrize("name", commands_of_the_program())
def test_the_help_of_a_command_fits_80_columns_and_has_examples_that_parse(
    name: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, _ = invoke(name, "--help")
    assert code == 0
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    command = commands_of_the_program()[name]
    assert command.rich_help_panel, "it belongs to a group"
    lines = [line.strip() for line in (command.epilog or "").splitlines() if line.strip().startswith(commands.PROGRAM)]
    assert lines
    for line in lines:
        program, called, *arguments = shlex.split(line)
        assert called == name
        # Options and arguments are looked up, and nothing runs.
        command.make_context(program, arguments, resilient_parsing=True)


def test_without_a_command_the_groups_are_shown(project: Project, invoke: Invoke) -> None:
    code, out, _ = invoke()
    assert code == 0
    assert out == invoke("--help")[1]
    places = [
        out.index(title) for title in ("The grid", "Names and settings", "What has been trained", "One stage at a time")
    ]
    assert places == sorted(places)
