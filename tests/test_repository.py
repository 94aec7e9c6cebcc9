"""What a host of the repository runs exists here, and asks for what `make` asks for."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_is_here_and_pin_what_is_not(workflow: Path) -> None:
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]), step
            continue
        for targets in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", step["run"]):
            for target in targets.split():
                assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
        for script in re.findall(r"\.ci/\w+", step["run"]):
            assert os.access(ROOT / script, os.X_OK), script


def test_a_change_is_asked_for_all_that_contributors_are_asked_for() -> None:
    run = " ".join(step.get("run", "") for step in steps(ROOT / ".github/workflows/tests.yml"))
    for command in ("make lint", "make test", "make test-lowest", ".ci/run"):
        assert re.search(rf"(^| ){re.escape(command)}( |$)", run), command
    assert "make test test-all" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_hooks_before_a_commit_ask_what_lint_asks() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert lint is not None
    asked = [line.replace("$(BIN)", ".venv/bin").split()[:2] for line in lint[1].splitlines()]
    assert [hook["entry"].split()[:2] for hook in hooks] == asked


@pytest.mark.slow
def test_a_wheel_built_twice_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        subprocess.run([ROOT / ".ci/wheel", tmp_path / name], check=True, umask=0o022 if name == "one" else 0o077)
    (one,), (two,) = ((tmp_path / name).iterdir() for name in ("one", "two"))
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()


def test_a_run_installs_no_tools_of_developers_and_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    for name in ("Makefile", "pyproject.toml", "pipeline/pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    def lines(target: str) -> list[str]:
        command = ["make", "--no-print-directory", "--dry-run", target]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    run, setup = lines("run"), lines("setup")
    assert not any("[dev]" in line for line in run)
    assert any("[dev]" in line for line in setup)
    installs = [line for line in setup if " pip install " in line]
    assert len(installs) == 2
    assert all(" -q " in line for line in installs)
    assert len([line for line in run if line.startswith("echo")]) == 1
