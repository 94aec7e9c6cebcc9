"""What is read of dvc.yaml is what DVC reads, and what is out of date is what DVC says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from project_folder import Project

from pipeline.grid.cells import expand
from pipeline.grid.graph import cell_sources, read_graph
from pipeline.grid.params import load_params
from pipeline.hashes import Hashes
from pipeline.record.freshness import stage_states
from schoenbat.errors import UserError


def dvc(*arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def as_dvc_reads_it(folder: Path) -> dict[str, Any]:
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        return {
            stage.name: (
                stage.cmd,
                {dep.def_path for dep in stage.deps if dep.def_path != "params.yaml"},
                {name for dep in stage.deps if dep.def_path == "params.yaml" for name in dep.params},
                {out.def_path: (out.use_cache, out.persist) for out in stage.outs},
            )
            for stage in repo.index.stages
        }


def as_it_is_read_here(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        stage.name: (
            stage.command,
            set(stage.deps),
            set(stage.params),
            {out: (out in stage.cached, out in stage.persistent) for out in stage.outs},
        )
        for stage in read_graph(settings).stages.values()
    }


def test_the_stages_are_those_that_dvc_reads_with_and_without_empty_axes(project: Project) -> None:
    project.add_dvc()
    project.set("errors.trained", ["lra-text-rmfa-exp-maclauformer-0"])
    assert as_it_is_read_here(project.settings) == as_dvc_reads_it(project.folder)
    project.set("errors.trained", [])
    project.set("grid.plain.attn", [])
    project.set("grid.kernel.dotf", [])
    found = as_it_is_read_here(project.settings)
    assert found == as_dvc_reads_it(project.folder)
    assert set(found) == {
        "download@tiny-lra-listops",
        "download@tiny-lra-text",
        "preprocess@tiny-lra-listops",
        "preprocess@tiny-lra-text",
        "bench@tiny",
        "report@tiny",
    }


def test_stages_come_after_what_they_need_and_the_report_after_all(project: Project) -> None:
    project.add_dvc()
    project.set("errors.trained", ["lra-text-rmfa-exp-maclauformer-0"])
    graph = read_graph(project.settings)
    seen: set[str] = set()
    for name in graph.stages:
        assert seen.issuperset((*graph.needs[name], *graph.gathers[name]))
        seen.add(name)
    cell = "tiny-lra-text-rmfa-exp-maclauformer-0"
    assert graph.needs[f"train_kernel@{cell}"] == ("preprocess@tiny-lra-text",)
    assert set(graph.needs[f"evaluate_kernel@{cell}"]) == {f"train_kernel@{cell}", "preprocess@tiny-lra-text"}
    assert graph.needs[f"errors_trained@{cell}"] == (f"train_kernel@{cell}",)
    assert [name for name in graph.stages if graph.gathers[name]] == ["report@tiny"]
    assert {stage.cell for stage in graph.stages.values()} - {None} == {c.id for c in expand(load_params())}


def test_a_cell_is_made_from_the_code_that_its_stage_lists(project: Project) -> None:
    project.add_dvc()
    graph, params = read_graph(project.settings), load_params()
    for cell in expand(params):
        (stage,) = [
            stage for stage in graph.stages.values() if stage.cell == cell.id and stage.name.startswith("train")
        ]
        assert cell_sources(cell, "train", "tiny") == list(stage.deps)
        assert " ".join(cell.arguments()) in stage.command


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    cmd: schoenbat-exp bench", "    wdir: elsewhere\n    cmd: schoenbat-exp bench", "wdir is not read"),
        ("      - bench\n", "      - bench\n      - other.yaml: [a]\n", "a file other than params.yaml"),
        ("      - bench\n", "      - benches\n", "missing key 'benches', which stage bench@tiny"),
        ("${errors.trained}", "${errors.unknown}", "missing key 'errors.unknown'"),
        ("runs/${item.profile}/bench-checks.csv", "reports/${item.profile}", "both make reports/tiny"),
    ],
)
def test_what_is_not_read_of_dvc_yaml_is_refused(project: Project, old: str, new: str, message: str) -> None:
    project.add_dvc()
    text = Path("dvc.yaml").read_text()
    assert old in text
    Path("dvc.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_graph(project.settings)


@pytest.fixture
def recorded(project: Project) -> Project:
    """A project in which DVC has on record that everything is done, with made-up outputs."""
    project.add_dvc()
    for stage in read_graph(project.settings).stages.values():
        for out in stage.outs:
            path = Path(out)
            made = path if path.suffix else path / "file"
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(f"{out}\n")
    dvc("commit", "--force", "--quiet")
    assert json.loads(dvc("status", "--json")) == {}
    return project


@pytest.mark.slow
def test_a_change_concerns_only_what_depends_on_it_and_dvc_says_the_same(recorded: Project) -> None:
    def changed() -> set[str]:
        """The changed stages as DVC has them; the states told here are those and what needs them."""
        found = set(json.loads(dvc("status", "--json")))
        graph = read_graph(recorded.settings)
        states = stage_states(graph, recorded.settings, Hashes())
        due = {name for name, state in states.items() if state == "due"}
        assert due == {name for name in graph.stages if graph.upstream([name]) & found}
        return {name for name in found if name.startswith(("train", "prep", "download"))}

    assert changed() == set()
    kernel = Path("schoenbat/kernels/inverse.py")
    before = kernel.read_text()
    kernel.write_text(before + "# changed\n")
    cells = {f"{task}-rmfa-inverse-maclauformer-{seed}" for task in ("lra-listops", "lra-text") for seed in (0, 1)}
    assert changed() == {f"train_kernel@tiny-{cell}" for cell in cells}
    kernel.write_text(before)

    recorded.set("task.lra-text.training.steps", 12)
    recorded.set("run.threads", 2)
    text = {cell for cell in expand(load_params()) if cell.task == "lra-text"}
    assert {name.partition("@")[2] for name in changed()} == {f"tiny-{cell.id}" for cell in text}
    recorded.set("task.lra-text.training.steps", 6)

    Path("schoenbat/lra/__pycache__").mkdir(exist_ok=True)
    Path("schoenbat/lra/__pycache__/encoder.cpython-311.pyc").write_text("x")
    Path("schoenbat/kernels/.gitignore").write_text("x")
    assert changed() == set()

    weights = Path("runs/tiny/lra-text-mean-transformer-0/best.pt")
    weights.chmod(0o644)
    weights.write_text("others")
    assert changed() == {"train@tiny-lra-text-mean-transformer-0"}
    weights.unlink()
    assert changed() == {"train@tiny-lra-text-mean-transformer-0"}


IMPORTED = """
import sys
from pipeline.grid.params import load_params
from pipeline.stages import evaluate, train
load_params()
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("schoenbat.") and module.__file__))
"""
NO_NUMBERS = ("__init__", "config", "diagnosis", "errors", "fetch", "files", "functional", "registry")
"""Files that no model calls, or that only find the file that a cell names itself."""


def test_a_cell_lists_all_code_that_it_imports(project: Project) -> None:
    project.add_dvc()
    (stage,) = [s for n, s in read_graph(project.settings).stages.items() if n.endswith("rmfa-exp-maclauformer-0")][:1]
    command = [sys.executable, "-c", IMPORTED]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "."})
    for file in map(Path, out.stdout.split()):
        name = file.relative_to(file.parents[[p.name for p in file.parents].index("schoenbat") + 1])
        listed = any(name.is_relative_to(dep) for dep in stage.deps)
        one_of_a_kind = name.parent.name in ("attention", "kernels", "tasks", "data")
        assert listed or one_of_a_kind or name.stem in NO_NUMBERS, f"{name} is imported, and dvc.yaml does not list it"
