"""docs/tutorial.md, followed word for word in a copy of the project."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
# One process for all commands, as most of a command is the import of torch.
PROGRAM = """
import json, sys, warnings
from pipeline.cli.app import main

for arguments in json.loads(sys.argv[1]):
    print("$", *arguments, flush=True)
    try:
        main(arguments)
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"exit code {ended.code}")
"""
CELL = "table-rmfa-cosh-maclauformer-0"
STAGES = """
download --task table
preprocess --task table
train --task table --attn softmax --former transformer --seed 0
eval --task table --attn softmax --former transformer --seed 0
train --task table --attn rmfa --dotf cosh --former maclauformer --seed 0
eval --task table --attn rmfa --dotf cosh --former maclauformer --seed 0
"""
"""What `run --grid` does for two cells; timings and errors of estimates, which take longer, have tests of their own."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("schoenbat", "pipeline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "build"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles", ignore=shutil.ignore_patterns("*.lock"))
    shutil.copy(ROOT / "profiles/quick.yaml", tmp_path / "params.yaml")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
    )
    return tmp_path


def run_python(folder: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
def test_the_tutorial_leads_to_a_kernel_in_the_table_and_an_export_that_classifies(checkout: Path) -> None:
    films, kernel, use = blocks("python")
    (settings,) = blocks("yaml")
    (checkout / "films.py").write_text(films)
    (checkout / "schoenbat/kernels/cosh.py").write_text(kernel)
    (checkout / "profiles/films.yaml").write_text(settings)
    written = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert ["python", "films.py"] in written
    run_python(checkout, "films.py")

    commands = [words[1:] for words in written if words[0] == "schoenbat-exp"]
    assert commands[0] == ["doctor"]
    assert ["run", "--grid"] in commands
    assert ["use", "films"] in commands
    assert commands[-1] == ["ui"]
    trained = [shlex.split(line) for line in STAGES.strip().splitlines()]
    at = commands.index(["run", "--grid"])
    told = run_python(checkout, "-c", PROGRAM, json.dumps([*commands[1:at], *trained, *commands[at + 1 : -1]]))
    assert re.search(r"cosh +cosh\(x\), the even half of exp", told)
    assert f"{CELL}: train_kernel@films-{CELL.removesuffix('-0')}" in told
    assert re.search(r"^rmfa cosh with ppSBN +\d+\.\d", told, re.MULTILINE)
    assert re.search(r"good +\d+\.\d %", told)
    assert re.search(r"test accuracy +\d", told)

    answer = run_python(checkout, "-c", use)
    assert re.match(r"\[\{'(good|bad)': [\d.e-]+, '(good|bad)': [\d.e-]+\}\]", answer)

    (back,) = re.findall(r"`schoenbat-exp (use \w+)`", TEXT)
    run_python(checkout, "-c", PROGRAM, json.dumps([back.split()]))
    assert (checkout / "params.yaml").read_bytes() == (ROOT / "profiles/quick.yaml").read_bytes()
