"""`schoenbat-exp results` and `report` on results that are made up."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from project_folder import ROOT, Project, write_results

from pipeline.grid.cells import expand
from pipeline.grid.freshness import Freshness
from pipeline.grid.params import load_params
from pipeline.grid.results import CellResults, Fingerprint

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def finished(project: Project) -> Project:
    """One of two tasks is done, with two seeds; softmax is far above mean."""
    project.add_code()
    project.set("grid.kernel.dotf", ["exp"])
    Path("runs/tiny/data").mkdir(parents=True)
    summary = {
        **{"fingerprint": "data", "label": "generated", "notes": [], "num_classes": 10, "vocab_size": 16},
        **{"splits": {"train": 64, "dev": 200, "test": 200}, "lengths": {"median": 9, "p95": 30, "max": 39}},
        **{"num_texts": 1, "max_length": 40, "baselines": {"majority class": 0.2, "outermost operator": 0.55}},
    }
    Path("runs/tiny/data/lra-listops.json").write_text(json.dumps(summary))
    finish()
    return project


def finish() -> None:
    """Write results of all cells of the first task."""
    params = load_params()
    for cell in expand(params):
        if cell.task == "lra-listops":
            accuracy = {"softmax": 0.9, "mean": 0.5}.get(cell.attn, 0.7) + 0.01 * cell.seed
            made_from = Fingerprint("code", Freshness(params.written).settings(cell), "data")
            write_results(CellResults("tiny", cell.id), cell, made_from, accuracy)


def test_results_fit_a_terminal_of_80_columns_and_say_what_to_do_next(finished: Project, invoke: Invoke) -> None:
    code, out, err = invoke("results")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "profile tiny: 6 of 12 cells done"
    assert [line.split()[0] for line in lines[2:6]] == ["softmax", "rmfa", "mean", "best"], "the highest comes first"
    (softmax,) = (line.split() for line in lines if line.startswith("softmax"))
    assert softmax[1:] == ["90.5", "±0.7"]
    (mean,) = (line.split() for line in lines if line.startswith("mean"))
    assert mean[-1].endswith("†"), "no seed passed the baseline of 55 %"
    assert any(line.startswith("best baseline (no model)") and "55.0" in line for line in lines)
    assert lines[-1] == "next: schoenbat-exp run --grid (schoenbat-exp status says what is missing)"


def test_a_long_name_is_not_folded_where_there_is_room(finished: Project, invoke: Invoke) -> None:
    former = "maclauformer+" + "gain" * 6
    finished.settings["former"][former] = {}
    finished.set("grid.tasks", ["lra-listops"])
    finished.set("grid.kernel.former", [former])
    finish()
    name = f"rmfa exp with ppSBN {'gain' * 6}"
    assert 30 < len(name) < 48
    (line,) = (line for line in invoke("results")[1].splitlines() if line.startswith("rmfa"))
    assert line.startswith(f"{name} ")


def test_results_for_programs_are_plain_values(finished: Project, invoke: Invoke) -> None:
    code, out, _ = invoke("results", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["profile"], found["finished"], found["cells"], found["report"]) == ("tiny", 6, 12, None)
    softmax, rmfa, mean = found["tasks"]["lra-listops"]["mechanisms"]
    assert (softmax["attn"], softmax["dotf"], softmax["former"]) == ("softmax", "", "transformer")
    assert softmax["seeds"] == pytest.approx({"0": 90, "1": 91})
    assert (softmax["passed_baseline"], mean["passed_baseline"]) == (True, False)
    assert [row["best"] for row in (softmax, rmfa, mean)] == [True, False, False]
    assert found["tasks"]["lra-text"] == {"baselines": {}, "mechanisms": []}


def test_a_report_shows_what_is_finished_in_place_of_the_one_before(finished: Project, invoke: Invoke) -> None:
    folder = Path("reports/tiny")
    folder.mkdir(parents=True)
    (folder / "index.md").write_text("# Profile tiny\n\nFor tests.\n\n7 of 12 cells are finished.\n")
    code, out, err = invoke("report", "--force", "--reference", "mean", "--margin", "2")
    assert (code, out, err) == (0, "report: reports/tiny/index.html\n", "")
    index = (folder / "index.md").read_text()
    assert "6 of 12 cells are finished." in index
    assert "outermost operator 55.00" in index
    assert "No prepared data, so no results, for lra-text" in index
    table = (folder / "tables/contrasts.md").read_text()
    assert "How far is each from mean" in table
    assert "How far is each from softmax" not in table
    assert "Equal within 2" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reference", "softmx"), "unknown attn 'softmx'"),
        (("--margin", "0"), "--margin must lie between 0 and 100 points, not 0"),
    ],
)
def test_wrong_options_of_a_report_are_one_line(
    finished: Project, invoke: Invoke, options: tuple[str, ...], message: str
) -> None:
    code, _, err = invoke("report", *options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_terminal_of_ascii_alone_shows_results_too(finished: Project) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "results"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        encoding="ascii",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "90.5 ?0.7" in done.stdout
