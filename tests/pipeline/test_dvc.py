"""dvc.yaml and the cells agree on stages and dependencies, and a change concerns only what depends on it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from project_folder import Project

from pipeline.grid.cells import (
    bench_stage,
    data_folder,
    download_stage,
    errors_stage,
    expand,
    preprocess_stage,
    report_stage,
    sources,
    stage_graph,
    trained_cells,
)
from pipeline.grid.params import load_params


def dvc(*arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def stage_names() -> set[str]:
    return {line.split()[0] for line in dvc("stage", "list", "--name-only").splitlines()}


def expected_names() -> set[str]:
    params = load_params()
    tasks = {name for task in params.grid.tasks for name in (download_stage(task), preprocess_stage("tiny", task))}
    errors = {errors_stage("tiny"), *(errors_stage("tiny", cell) for cell in trained_cells(params))}
    return {*stage_graph(params, expand(params)), *tasks, bench_stage("tiny"), *errors, report_stage("tiny")}


def test_stages_of_dvc_are_those_of_the_cells_with_and_without_empty_axes(project: Project) -> None:
    project.add_dvc()
    project.set("errors.trained", ["lra-text-rmfa-exp-maclauformer-0"])
    assert stage_names() == expected_names()
    project.set("errors.trained", [])
    project.set("grid.plain.attn", [])
    project.set("grid.kernel.dotf", [])
    assert (
        stage_names()
        == expected_names()
        == {
            "download@lra-listops",
            "download@lra-text",
            "preprocess@tiny-lra-listops",
            "preprocess@tiny-lra-text",
            "bench@tiny",
            "errors@tiny",
            "report@tiny",
        }
    )


def test_dependencies_of_a_cell_are_its_sources_and_its_data(project: Project) -> None:
    from dvc.repo import Repo

    project.add_dvc()
    params = load_params()
    with Repo(str(project.folder)) as repo:
        stages = {stage.name: stage for stage in repo.index.stages}
    for cell in expand(params):
        train, evaluate = stages[cell.stage("train", "tiny")], stages[cell.stage("evaluate", "tiny")]
        params_names = {name for dep in train.deps if dep.def_path == "params.yaml" for name in dep.params}
        files = {dep.def_path for dep in train.deps} - {"params.yaml"}
        assert files == {path.as_posix() for path in [*sources(cell), data_folder("tiny", cell.task)]}
        assert params_names == {
            f"attention.{cell.attn}",
            f"former.{cell.former}",
            f"task.{cell.task}.model",
            f"task.{cell.task}.training",
        }
        folder = cell.run_folder("tiny").as_posix()
        names = {out.def_path.removeprefix(f"{folder}/") for out in [*train.outs, *evaluate.outs]}
        assert names == {"best.pt", "curves.csv", "metrics.json", "resources.json", "test.json"}
        for stage in (train, evaluate):
            assert " ".join(cell.arguments()) in stage.cmd


@pytest.fixture
def recorded(project: Project) -> Project:
    """A project in which DVC has on record that everything is done, with made-up outputs."""
    project.add_dvc()
    from dvc.repo import Repo

    with Repo(str(project.folder)) as repo:
        for stage in repo.index.stages:
            for out in stage.outs:
                path = Path(out.def_path)
                made = path if path.suffix else path / "file"
                made.parent.mkdir(parents=True, exist_ok=True)
                made.write_text(f"{out.def_path}\n")
    dvc("commit", "--force", "--quiet")
    assert json.loads(dvc("status", "--json")) == {}
    return project


def test_a_change_concerns_only_the_cells_that_depend_on_it(recorded: Project) -> None:
    def changed() -> set[str]:
        return {name for name in json.loads(dvc("status", "--json")) if name.startswith(("train", "prep", "download"))}

    kernel = Path("schoenbat/kernels/inverse.py")
    before = kernel.read_text()
    kernel.write_text(before + "# changed\n")
    assert changed() == {
        f"train_kernel@tiny-{task}-rmfa-inverse-maclauformer-{seed}"
        for task in ("lra-listops", "lra-text")
        for seed in (0, 1)
    }
    kernel.write_text(before)

    recorded.set("task.lra-text.training.steps", 12)
    recorded.set("run.threads", 2)
    cells = expand(load_params())
    assert changed() == {cell.stage("train", "tiny") for cell in cells if cell.task == "lra-text"}
    recorded.set("task.lra-text.training.steps", 6)

    Path("schoenbat/nn/__pycache__").mkdir()
    Path("schoenbat/nn/__pycache__/encoder.cpython-311.pyc").write_text("x")
    assert changed() == set()
