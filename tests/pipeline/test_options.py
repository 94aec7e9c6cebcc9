"""Every option that the help shows has a test that runs it, here or where the table says."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from project_folder import ROOT, Project
from small_grid import MEAN, RMFA, TASK, make_small, numbers, start_grid

from pipeline.cli import app as cli

Invoke = Callable[..., tuple[int, str, str]]

CELL = ("--task", "lra-listops", "--attn", "mean", "--former", "transformer")
FILTERS = {
    "--task": ("lra-text", 8),
    "--attn": ("mean", 4),
    "--dotf": ("exp", 4),
    "--former": ("transformer", 8),
    "--seed": ("1", 8),
    "--cell": ("lra-text-mean-transformer-0", 1),
}
OF_A_CELL = ("--task", "--attn", "--dotf", "--former", "--seed", "--profile", "--device")
WITH_PROFILE = ("train", "eval", "download", "preprocess", "report", "bench", "errors", "numerics", "golden", "replace")
HERE = "test_options.py"
WHERE = {
    **{("run", option): HERE for option in FILTERS},
    **{("run", option): HERE for option in ("--grid", "--dry-run", "--json", "--jobs", "--devices", "--force")},
    ("run", "--backend"): "test_slurm.py",
    **{(command, option): HERE for command in ("train", "eval") for option in OF_A_CELL},
    **{(command, "--force"): "test_cli.py" for command in ("train", "eval")},
    ("golden", "--cell"): "test_carry.py",
    ("carry", "--tolerance"): "test_carry.py",
    **{("replace", option): "test_replace.py" for option in ("--cell", "--force")},
    **{(command, "--profile"): HERE for command in WITH_PROFILE},
    **{(command, "--task"): HERE for command in ("download", "preprocess")},
    ("errors", "--group"): "test_errors.py",
    **{("ui", option): "test_mlflow_ui.py" for option in ("--profile", "--port", "--open")},
    ("log", "--profile"): "test_tracking.py",
    ("export", "--format"): "test_trained.py",
    **{("predict", option): "test_trained.py" for option in ("--cell", "--top", "--device", "--profile")},
    **{(command, "--json"): "test_trained.py" for command in ("predict", "compare")},
    ("status", "--watch"): HERE,
    ("status", "--json"): HERE,
    ("list", "--json"): HERE,
    ("use", "--force"): HERE,
    **{("report", option): "test_results_command.py" for option in ("--reference", "--margin", "--force")},
    ("results", "--json"): "test_results_command.py",
    ("doctor", "--json"): "test_doctor.py",
    ("", "--version"): HERE,
    ("", "--debug"): "test_misuse.py",
    ("", "--install-completion"): HERE,
    ("", "--show-completion"): HERE,
}


def documented() -> set[tuple[str, str]]:
    """All options of all commands; "" is the program itself."""
    program: Any = typer.main.get_command(cli.app)
    groups = {"": program, **program.commands}
    return {
        (name, option)
        for name, command in groups.items()
        for parameter in command.params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def test_every_option_is_run_by_a_test() -> None:
    assert documented() == set(WHERE)
    for (command, option), file in WHERE.items():
        assert f'"{option}"' in (Path(__file__).parent / file).read_text(encoding="utf-8"), (command, option, file)


def test_help_and_version_are_where_one_looks_for_them(project: Project, invoke: Invoke) -> None:
    assert invoke("--version")[:2] == (0, "schoenbat-exp 0.1.0\n")
    for command in (None, *sorted({command for command, _ in WHERE if command})):
        before = [command] if command else []
        assert invoke(*before, "-h") == invoke(*before, "--help")
        assert invoke(*before, "-h")[0] == 0


def test_completion_is_shown_and_installed_for_a_shell(tmp_path: Path) -> None:
    def run(option: str) -> str:
        # The shell is the process that started the command; without the last word bash would become it.
        command = ["bash", "-c", f"{sys.executable} -m pipeline.cli {option}; exit $?"]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert "complete -o default -F _schoenbat_exp_completion schoenbat-exp" in run("--show-completion")
    assert "bash completion installed" in run("--install-completion")
    assert "schoenbat-exp" in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize("option", FILTERS)
def test_a_filter_of_run_chooses_cells(project: Project, invoke: Invoke, option: str) -> None:
    project.add_dvc()
    value, expected = FILTERS[option]
    code, out, err = invoke("run", option, value, "--dry-run", "--json")
    assert code == 0, err
    jobs = [job["job"] for job in json.loads(out)["jobs"]]
    assert len([job for job in jobs if job.startswith("lra-")]) == expected
    unit = "cell" if expected == 1 else "cells"
    title = invoke("run", option, value, "--dry-run")[1].splitlines()[0]
    assert title == f"profile tiny: {expected} of {expected} {unit} to run"


@pytest.mark.slow
def test_a_plan_of_thousands_of_cells_is_made_without_mlflow(project: Project) -> None:
    project.add_dvc()
    project.set("grid.tasks", ["lra-listops"])
    project.set("grid.kernel.dotf", ["exp"])
    project.set("grid.seeds", list(range(667)))
    code = """
import sys
from pipeline.stages.commands import exit_code
from pipeline.cli.app import app
assert exit_code(app, sys.argv[1:]) == 0
print(sorted({"mlflow"} & set(sys.modules)))
"""
    for choice, cells in (("--grid", "2,001 of 2,001 cells"), ("--cell", "1 of 1 cell")):
        value = [MEAN] if choice == "--cell" else []
        arguments = [sys.executable, "-c", code, "run", choice, *value, "--dry-run"]
        out = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines()
        assert out[0] == f"profile tiny: {cells} to run"
        assert out[-1] == "[]"


def test_json_of_run_goes_with_a_dry_run(project: Project, invoke: Invoke) -> None:
    assert invoke("run", "--grid", "--json") == (2, "", "error: --json goes with --dry-run\n")


@pytest.mark.parametrize("command", WITH_PROFILE)
def test_a_stage_refuses_to_run_under_another_profile(project: Project, invoke: Invoke, command: str) -> None:
    needed = {"train": CELL, "eval": CELL, "download": TASK, "preprocess": TASK}
    needed |= {"errors": ("--group", "any"), "golden": ("golden.npz",), "replace": ("--cell", "any")}
    arguments = needed.get(command, ())
    code, _, err = invoke(command, *arguments, "--profile", "other")
    assert (code, err) == (2, "error: params.yaml is of profile 'tiny', not 'other'\n")


def test_the_options_of_one_cell(project: Project, invoke: Invoke) -> None:
    project.add_dvc()
    profile = ("--profile", "tiny")
    assert invoke("download", "--task", "lra-listops", *profile)[0] == 0
    assert invoke("preprocess", "--task", "lra-listops", *profile)[0] == 0
    cell = ("--task", "lra-listops", "--attn", "rmfa", "--dotf", "inverse", "--former", "maclauformer", "--seed", "1")
    assert invoke("train", *cell, *profile, "--device", "cpu")[0] == 0
    code, out, err = invoke("eval", *cell, *profile, "--device", "cpu")
    assert code == 0, err
    assert "lra-listops-rmfa-inverse-maclauformer-1: test accuracy" in out
    assert Path("runs/tiny/lra-listops-rmfa-inverse-maclauformer/test/1.json").is_file()


def run(folder: Path, *options: str) -> tuple[int, str]:
    process = start_grid(folder, *options)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    for name in ("SCHOENBAT_DATA_MIRROR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return make_small(tmp_path)


@pytest.mark.slow
def test_force_runs_again_what_is_up_to_date(trained: Project, invoke: Invoke) -> None:
    small = trained
    assert run(small.folder)[1].startswith("nothing to do: all 2 cells")
    before = numbers(small.folder)
    metrics = {cell: Path("runs/tiny", cell.removesuffix("-0"), "metrics/0.json") for cell in (MEAN, RMFA)}
    written = {cell: path.stat().st_mtime_ns for cell, path in metrics.items()}
    code, out = run(small.folder, "--cell", MEAN, "--force", "--jobs", "1", "--devices", "cpu")
    assert code == 0, out
    assert "1 of 2 cells of profile tiny is done" in out
    assert metrics[MEAN].stat().st_mtime_ns > written[MEAN]
    assert metrics[RMFA].stat().st_mtime_ns == written[RMFA]
    assert numbers(small.folder) == before
    assert run(small.folder)[1].startswith("nothing to do: all 2 cells")


def until_interrupted(folder: Path, *arguments: str, begins: str) -> int:
    """Run a command that goes on until Ctrl-C, interrupt it after its first line; its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "pipeline.cli", *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(begins)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    return process.wait(timeout=60)


@pytest.mark.slow
def test_what_goes_on_ends_with_an_interrupt(project: Project) -> None:
    project.add_dvc()
    assert until_interrupted(project.folder, "status", "--watch", begins="profile tiny: 0 of 16 cells done") == 0


def test_what_programs_read(project: Project, invoke: Invoke) -> None:
    project.add_dvc()
    assert len(json.loads(invoke("status", "--json")[1])["cells"]) == 16
    assert list(json.loads(invoke("list", "dotf", "--json")[1])) == ["dotf"]
    plan = json.loads(invoke("run", "--grid", "--dry-run", "--json")[1])
    assert {"job": "report@tiny", "stages": ["report@tiny"]} in plan["jobs"]


def test_a_profile_can_be_forced_over_an_edited_file(project: Project, invoke: Invoke) -> None:
    Path("profiles").mkdir()
    other = Path("profiles/other.yaml")
    other.write_text(Path("params.yaml").read_text().replace("profile: tiny", "profile: other"))
    assert invoke("use", "other")[0] == 2
    assert invoke("use", "other", "--force")[0] == 0
    assert Path("params.yaml").read_bytes() == other.read_bytes()


def test_the_project_is_found_from_its_subfolders(
    project: Project, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    project.add_dvc()
    (project.folder / "mirror").mkdir()
    monkeypatch.setenv("SCHOENBAT_DATA_MIRROR", "../mirror")
    for folder in ("schoenbat", "schoenbat/nn"):
        monkeypatch.setenv("SCHOENBAT_DATA_MIRROR", "/".join([*[".."] * len(Path(folder).parts), "mirror"]))
        monkeypatch.chdir(project.folder / folder)
        code, out, err = invoke("status")
        assert code == 0, err
        assert out.endswith("profile tiny: 0 of 16 cells done, 16 to run\n")
        monkeypatch.chdir(project.folder / folder)
        assert invoke("download", "--task", "lra-listops")[0] == 0, "the mirror was looked for elsewhere"
    assert not (project.folder / "schoenbat/logs").exists()
