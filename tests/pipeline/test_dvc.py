"""DVC's stages are those that the names, paths and fingerprints of cells stand for, and both find the same changes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project_folder import ROOT, Project, make_up_results

from pipeline.grid.axes import data_stage_names, stage_names
from pipeline.grid.cells import expand
from pipeline.grid.freshness import Freshness, data_folder, raw_folder, summary_file
from pipeline.grid.params import load_params
from pipeline.grid.results import CellResults


def dvc(*arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def as_dvc_reads_it(folder: Path) -> dict[str, Any]:
    """Return command, dependencies, parameters and outputs of each stage, the latter with whether DVC caches them."""
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        return {
            stage.name: (
                stage.cmd,
                {dep.def_path for dep in stage.deps if dep.def_path != "params.yaml"},
                {name for dep in stage.deps if dep.def_path == "params.yaml" for name in dep.params},
                {out.def_path: out.use_cache for out in stage.outs},
            )
            for stage in repo.index.stages
        }


def test_stages_are_named_and_write_as_cells_say_with_and_without_empty_axes(project: Project) -> None:
    project.add_dvc()
    project.set("errors.trained", ["lra-text-rmfa-exp-maclauformer"])
    others = {"numerics", "bench@tiny", "report@tiny"}
    for trained in ({"errors@tiny-lra-text-rmfa-exp-maclauformer"}, set()):
        stages, params = as_dvc_reads_it(project.folder), load_params()
        cells = expand(params)
        data = {name for task in params.grid.tasks for name in data_stage_names("tiny", task)}
        names = {name for cell in cells for name in stage_names("tiny", cell)}
        assert set(stages) == others | trained | data | names
        for task in params.grid.tasks:
            download, prepare = data_stage_names("tiny", task)
            assert stages[download][3] == {str(raw_folder(task)): False}
            made = {str(data_folder("tiny", task)): True, str(summary_file("tiny", task)): False}
            assert stages[prepare][3] == made
        for cell in cells:
            files = CellResults("tiny", cell.id).files()
            train, test = (stages[name] for name in stage_names("tiny", cell))
            assert sorted(str(file.parent) for file in files) == sorted([*train[3], *test[3]])
            # Weights are large, so DVC keeps them; what is small is in git.
            cached = [out for out, is_cached in (train[3] | test[3]).items() if is_cached]
            assert cached == [str(files[0].parent)]
            assert cached[0] in test[1]
            axes = " ".join(cell.arguments()[:-2])
            assert train[0] == f"schoenbat-exp train --profile tiny {axes}"
            assert test[0] == f"schoenbat-exp eval --profile tiny {axes}"
        project.set("errors.trained", [])
        project.set("grid.plain.attn", [])
        project.set("grid.kernel.dotf", [])


@pytest.fixture
def recorded(project: Project) -> Project:
    """A project in which DVC has on record that everything is done, with made-up results."""
    project.set("grid.tasks", ["lra-listops"])
    project.set("grid.plain.attn", ["softmax"])
    project.add_dvc()
    make_up_results()
    for path in ("runs/tiny/bench-checks.csv", "reports/tiny/index.html"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("made up")
    dvc("commit", "--force", "--quiet")
    assert json.loads(dvc("status", "--json")) == {}
    return project


@pytest.mark.slow
def test_a_change_concerns_only_what_depends_on_it_and_dvc_says_the_same(recorded: Project) -> None:
    cells = expand(load_params())
    (task,) = recorded.settings["grid"]["tasks"]

    def changed() -> set[str]:
        """Return the changed stages as DVC has them: the cells whose training is out of date are those of train."""
        found = set(json.loads(dvc("status", "--json")))
        freshness = Freshness(recorded.settings)
        due = {stage_names("tiny", cell)[0] for cell in cells if not freshness.is_trained(cell)}
        assert due == ({name for name in found if name.startswith("train")} if freshness.data(task) else trained)
        return found - {"report@tiny"}

    trained = {stage_names("tiny", cell)[0] for cell in cells}
    softmax, exp, inverse = sorted(trained, key=lambda name: ("softmax" not in name, name))
    assert changed() == set()

    recorded.set("attention.rmfa.num_features", 4)
    assert changed() == {exp, inverse, "bench@tiny"}
    recorded.set("attention.rmfa.num_features", 8)

    recorded.set("task.lra-listops.training.steps", 12)
    recorded.set("run.threads", 2)
    assert changed() == trained
    recorded.set("task.lra-listops.training.steps", 6)

    recorded.set("task.lra-listops.data.train_size", 60)
    assert changed() == set(data_stage_names("tiny", task))
    recorded.set("task.lra-listops.data.train_size", 64)

    # What the code computes is what the stage `numerics` has written of it.
    Path("schoenbat/lra/__pycache__").mkdir(exist_ok=True)
    Path("schoenbat/lra/__pycache__/encoder.cpython-311.pyc").write_text("x")
    assert changed() == set()
    kernel = Path("schoenbat/kernels/inverse.py")
    kernel.write_text(f"{kernel.read_text()}# changed\n")
    assert changed() == {"numerics"}

    weights = CellResults("tiny", "lra-listops-softmax-transformer-0").best
    weights.chmod(0o644)
    weights.write_text("others")
    assert set(json.loads(dvc("status", "--json"))) >= {softmax, softmax.replace("train", "evaluate")}


def test_dvc_itself_works_in_a_project_without_git_once_a_grid_has_asked_it(
    project: Project, invoke: Callable[..., tuple[int, str, str]]
) -> None:
    project.add_dvc()
    Path(".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    Path(".dvc/config.local").write_text("[cache]\n    type = copy\n")
    with pytest.raises(subprocess.CalledProcessError):
        dvc("status")
    assert invoke("run", "--grid", "--dry-run")[0] == 0
    assert "report@tiny" in dvc("status")
    assert "type = copy" in Path(".dvc/config.local").read_text()


def test_a_job_of_dvc_waits_for_another_process_of_dvc_and_says_for_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".dvc/tmp").mkdir(parents=True)
    Path("job.json").write_text(json.dumps([{"name": "report", "command": "dvc --version"}]))
    command = [sys.executable, "-c", "print(flush=True); input()", "dvc"]
    pipes: Any = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, stdin=subprocess.PIPE, **pipes) as other:
        # Before it runs it has no command yet.
        other.stdout.readline()
        holder = {"pid": other.pid, "cmd": "dvc repro"}
        Path(".dvc/tmp/rwlock").write_text(json.dumps({"write": {"curves.csv": holder}}))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SCHOENBAT_OUTCOME_FILE": str(tmp_path / "outcome.json")}
        job = [sys.executable, "-m", "pipeline.launch.worker", "job.json"]
        with subprocess.Popen(job, env=environment, **pipes) as worker:
            assert worker.stdout.readline() == "> dvc --version\n"
            assert worker.stdout.readline() == f"waits for the end of: dvc repro (process {other.pid})\n"
            assert worker.poll() is None
            other.communicate("\n")
            said, _ = worker.communicate(timeout=60)
    assert (worker.returncode, said.count(".")) == (0, 2), said
