"""Results are carried over from other code or another checkout only where today's code would compute the same."""

import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from project_folder import Project

from pipeline.grid.axes import Cell
from pipeline.grid.freshness import Freshness
from pipeline.grid.results import CellResults
from pipeline.stages.golden import STEPS

Invoke = Callable[..., tuple[int, str, str]]

CELL = Cell("lra-listops", "mean", None, "transformer", 0)


def is_finished(project: Project) -> bool:
    return Freshness(project.settings).is_finished(CELL)


def pretend_other_code() -> None:
    """Make the results say that they come from other code."""
    results = CellResults("tiny", CELL.id)
    metrics = results.metrics()
    assert metrics is not None
    results.set_fingerprint(dataclasses.replace(metrics.fingerprint, code="of before"))


@pytest.fixture
def finished(project: Project, invoke: Invoke) -> Project:
    project.set("grid.tasks", ["lra-listops"])
    project.set("grid.seeds", [0])
    project.set("grid.plain.attn", ["mean"])
    project.set("grid.kernel.dotf", [])
    project.add_dvc()
    task = ("--task", "lra-listops")
    for command in (
        ("download", *task),
        ("preprocess", *task),
        ("train", *CELL.arguments()),
        ("eval", *CELL.arguments()),
    ):
        code, _, err = invoke(*command)
        assert code == 0, err
    assert is_finished(project)
    return project


def test_a_golden_record_is_the_same_each_time(finished: Project, invoke: Invoke) -> None:
    for name in ("one.npz", "two.npz"):
        assert invoke("golden", name, "--cell", CELL.id)[0] == 0
    with np.load("one.npz") as one, np.load("two.npz") as two:
        assert {name.rpartition("/")[2] for name in one} == {"weights", "losses", "outputs"}
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_what_is_up_to_date_or_no_revision_is_not_carried(finished: Project, invoke: Invoke) -> None:
    code, out, err = invoke("carry", "nowhere", "--tolerance", "1e-6")
    assert (code, out) == (0, "no results are out of date for their code alone\n"), err
    pretend_other_code()
    assert invoke("carry", "nowhere") == (2, "", "error: 'nowhere' is no git revision\n")
    assert not is_finished(finished)


def test_another_checkout_gives_what_would_be_computed_here_and_nothing_else(
    finished: Project, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    for folder in ("runs", "weights"):
        shutil.move(folder, other / folder)
    assert not is_finished(finished)
    code, out, err = invoke("import", str(other))
    assert (code, out) == (0, f"the only cell of profile tiny is taken from {other}\n"), err
    assert is_finished(finished)
    pretend_other_code()
    finished.set("task.lra-listops.training.steps", 9)
    code, out, _ = invoke("import", str(other))
    assert (code, out.split()[0]) == (0, "0")
    code, _, err = invoke("import", str(other / "runs"))
    assert (code, err) == (2, f"error: {other / 'runs'} has no results of profile tiny (runs/tiny)\n")


@pytest.mark.slow
def test_results_of_code_that_computes_the_same_are_carried_over(finished: Project, invoke: Invoke) -> None:
    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    mean = Path("schoenbat/attention/mean.py")
    today = mean.read_text()
    git("init", "-q")
    another = today.replace("return mean.to(", "return 2 * mean.to(")
    for name, text in (("same", f"{today}\nADDED = 1\n"), ("other", another)):
        assert text != today
        mean.write_text(text)
        git("add", "schoenbat", "pipeline", "params.yaml", "dvc.yaml")
        git("commit", "-q", "-m", name)
        git("tag", name)
    mean.write_text(today)
    before = CellResults("tiny", CELL.id).test()
    pretend_other_code()
    assert "differs by" in invoke("carry", "other")[1]
    assert not is_finished(finished)
    code, out, err = invoke("carry", "same")
    assert code == 0, err
    assert "1 of 1 groups" in out
    assert is_finished(finished)
    assert CellResults("tiny", CELL.id).test() == before
    (row,) = Path("runs/tiny/carried.csv").read_text().splitlines()[1:]
    assert row.startswith(f"{CELL.group},")
    assert row.endswith(f",{STEPS},0.0")
