"""docs/adding.md, followed word for word in an empty folder outside the project."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml
from project_folder import ROOT, Project

TEXT = (ROOT / "docs/adding.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


class Shell:
    """An environment of its own, in which the packages of this one can be imported."""

    def __init__(self, folder: Path, project: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / "bin"
        (site_packages,) = folder.glob("lib/*/site-packages")
        known = [path for path in sys.path if path.endswith("-packages")]
        (site_packages / "known.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in known))
        for command, call in (
            ("schoenbat-exp", "from pipeline.cli.app import main\nif __name__ == '__main__':\n    main()"),
            ("pip", "import sys; from pip._internal.cli.main import main; sys.exit(main())"),
            ("pytest", "import sys, pytest; sys.exit(pytest.main())"),
        ):
            (self.bin / command).write_text(f"#!{self.bin / 'python'}\n{call}\n")
            (self.bin / command).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(project),
            # Nothing is fetched: what a build and the components need is there.
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def run(self, command: str, folder: Path) -> str:
        result = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result.stdout


def git_status(folder: Path) -> set[str]:
    out = subprocess.run(
        ["git", "status", "--porcelain"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    return set(out.splitlines())


@pytest.fixture
def checkout(project: Project) -> Project:
    """A project under git with one task, its components' contract tests, and the grid of the document."""
    project.add_dvc()
    shutil.copytree(ROOT / "tests/contract", project.folder / "tests/contract")
    for name in ("conftest.py", "mechanisms.py"):
        shutil.copy(ROOT / "tests" / name, project.folder / "tests")
    shutil.copy(ROOT / ".gitignore", project.folder)
    (project.folder / ".gitignore").open("a").write("/.dvc/\n")
    (documented,) = (yaml.safe_load(block) for block in blocks("yaml"))
    project.set("grid.tasks", documented["grid"]["tasks"])
    project.set("grid.seeds", [0])
    project.set("grid.plain.attn", [])
    for axis, names in documented["grid"]["kernel"].items():
        project.set(f"grid.kernel.{axis}", names)
    project.settings["attention"] |= documented["attention"]
    project.settings["task"] = documented["task"]
    project.write()
    task: dict[str, Any] = {"__name__": "my_tags"}
    exec(compile(blocks("python")[2], "docs/adding.md", "exec"), task)
    task["Tags"].sample(project.folder)
    for command in ("init -q", "add .", "-c user.name=t -c user.email=t@t commit -q -m start"):
        subprocess.run(["git", *command.split()], cwd=project.folder, check=True)
    return project


@pytest.mark.slow
def test_the_document_leads_from_an_empty_folder_to_a_trained_cell(
    checkout: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project, outside = checkout.folder, tmp_path_factory.mktemp("outside")
    shell = Shell(tmp_path_factory.mktemp("environment"), project)
    kernel, mechanism, task, *_ = blocks("python")
    for name, content in (
        ("pyproject.toml", blocks("toml")[0]),
        ("my_cosh.py", kernel),
        ("my_taylor.py", mechanism),
        ("my_tags.py", task),
    ):
        (outside / name).write_text(content)
    install, use = blocks("sh")
    shell.run(install, outside)

    listing, contract, grid = use.splitlines()
    listed = " ".join(shell.run(listing, project).split())
    assert re.search(r"my-cosh +.*\(my_cosh:Cosh of my-components 0\.1\)", listed)
    assert re.search(r"my-taylor +.*\(my_taylor:Taylor of my-components 0\.1\)", listed)
    tested = shell.run(f"{contract} -rA", project)
    for case in ("my-taylor-my-cosh", "my-taylor-exp", "rmfa-my-cosh", "kernelized-my-cosh", "taylor1-my-cosh"):
        name = f"test_order_of_keys_does_not_matter[chosen-form-{case}]"
        assert f"PASSED tests/contract/test_attention.py::{name}" in tested
    assert "PASSED tests/contract/test_tasks.py::test_every_example_fits_the_problem[my-tags]" in tested
    assert "PASSED tests/contract/test_kernels.py::test_series_sums_to_the_function[my-cosh]" in tested
    assert "the only cell of profile tiny is done" in shell.run(grid, project)

    cell, group = (f"my-tags-my-taylor-my-cosh-maclauformer{seed}" for seed in ("-0", ""))
    assert json.loads((project / f"runs/tiny/{group}/test/0.json").read_text())["accuracy"] > 0.9
    assert git_status(project) == {"?? dvc.lock", "?? numerics/"}, "files of the project were touched"
    assert str(tmp_path_factory.getbasetemp()) not in (project / "dvc.lock").read_text(), "the lock is not portable"

    def is_out_of_date() -> bool:
        plan = json.loads(shell.run(f"schoenbat-exp run --cell {cell} --dry-run --json", project))
        return cell in [job["job"] for job in plan["jobs"]]

    for name in ("my_cosh.py", "my_taylor.py", "my_tags.py"):
        before = (outside / name).read_text()
        for added, expected in (("# a comment\n", False), ("ADDED = 1\n", True)):
            (outside / name).write_text(before + added)
            assert is_out_of_date() == expected, (name, added)
        (outside / name).write_text(before)
    assert not is_out_of_date()


def test_the_example_of_a_function_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    example = blocks("python")[3]
    exec(compile(example, "docs/adding.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.findall(r"print\(.*\)  # (.*)", example)[0]
