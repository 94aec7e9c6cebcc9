"""What a grid plans: every job has a limit, and what earlier runs have left is a help and no need."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from project_folder import Project, write_results

from pipeline.grid.axes import Cell
from pipeline.grid.cells import expand
from pipeline.grid.freshness import Freshness
from pipeline.grid.params import load_params
from pipeline.grid.results import CellResults, Fingerprint
from pipeline.launch import Job
from pipeline.launch.grid_run import _other_stages
from pipeline.launch.plan import plan_jobs

OTHERS = ["bench@tiny", "errors@tiny-lra-text-rmfa-exp-maclauformer", "report@tiny"]


def planned(project: Project) -> dict[str, Job]:
    params = load_params()
    jobs = plan_jobs(params, expand(params), Freshness(project.settings), OTHERS, force=False, device="cpu")
    return {job.name: job for job in jobs}


def test_what_is_no_cell_comes_alone_and_last_and_needs_only_the_cells_that_it_measures(project: Project) -> None:
    jobs = planned(project)
    cells = [cell.id for cell in expand(load_params())]
    assert list(jobs) == ["data-lra-listops", "data-lra-text", *cells, *OTHERS]
    assert [name for name, job in jobs.items() if job.exclusive] == OTHERS
    assert sorted(OTHERS, key=lambda name: -jobs[name].seconds) == OTHERS
    seeds = tuple(f"lra-text-rmfa-exp-maclauformer-{seed}" for seed in (0, 1))
    assert {name: jobs[name].needs for name in OTHERS if jobs[name].needs} == {OTHERS[1]: seeds}
    assert jobs[seeds[0]].needs == ("data-lra-text",)
    train, test = jobs[seeds[0]].stages
    assert (train.name, test.name) == (f"train_kernel@tiny-{seeds[0][:-2]}", f"evaluate_kernel@tiny-{seeds[0][:-2]}")
    assert train.environment == test.environment == {"SCHOENBAT_CODE": Freshness(project.settings).code("rmfa", "exp")}


def test_every_job_has_the_time_limit_also_those_of_data(project: Project) -> None:
    project.set("run.timeout_minutes", 5)
    jobs = planned(project)
    assert {job.timeout_seconds for job in jobs.values()} == {300.0}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"device": "cpu"}', "\0"])
def test_of_a_damaged_record_of_what_a_cell_took_nothing_is_known(project: Project, damage: str) -> None:
    cell = expand(load_params())[0]
    unknown = planned(project)[cell.id]
    results = CellResults("tiny", cell.id)
    write_results(results, cell, Fingerprint("code", "settings", "data"), 0.5)
    assert planned(project)[cell.id].memory_mb == 300.0
    Path("checkpoints/tiny", cell.id, "resources.json").write_text(damage)
    assert planned(project)[cell.id] == unknown


def test_what_is_no_cell_is_due_where_dvc_finds_it_changed_or_its_output_is_gone(project: Project) -> None:
    bench, errors, report = OTHERS
    project.set("errors.trained", [errors.partition("-")[2]])
    params, cells = load_params(), expand(load_params())

    def due(*changed: str, cells: Sequence[Cell] = (), everything: bool = True) -> list[str]:
        return _other_stages(params, cells, dict.fromkeys(changed, True), everything=everything)

    assert due(cells=cells) == OTHERS
    assert due() == [bench, report], "the weights are not here, as in a clone"
    weights = CellResults("tiny", "lra-text-rmfa-exp-maclauformer-0").best
    outputs = (
        weights,
        "runs/tiny/bench-checks.csv",
        f"runs/tiny/errors/{weights.parent.name}.csv",
        "reports/tiny/index.html",
    )
    for path in map(Path, outputs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert due() == []
    assert due(report) == [report]
    assert due(bench, errors) == OTHERS
    assert due(bench, errors, cells=cells[:1], everything=False) == [report]
    Path("runs/tiny/bench-checks.csv").unlink()
    assert due() == [bench, report]


def test_a_cell_is_expected_to_take_what_it_took_or_what_others_of_its_kind_took(project: Project) -> None:
    """Seconds are the mean of those of a step; memory is the most of what was measured on this kind of device."""
    project.add_code()
    project.set("grid.seeds", [0, 1, 2])
    cells = {cell.id: cell for cell in expand(load_params())}
    for seed, speed, memory in ((0, 2.0, 500.0), (1, 6.0, 700.0)):
        cell = f"lra-text-mean-transformer-{seed}"
        write_results(CellResults("tiny", cell), cells[cell], Fingerprint("code", "settings", "data"), 0.5)
        file = Path("checkpoints/tiny", cell, "resources.json")
        took = {"steps_per_second": speed, "peak_memory_mb": memory, "device": f"{['cpu', 'cuda:0'][seed]} (made up)"}
        file.write_text(json.dumps(json.loads(file.read_text()) | took))
    jobs = planned(project)
    found = [(jobs[f"lra-text-mean-transformer-{seed}"].seconds, seed) for seed in range(3)]
    assert found == [(pytest.approx(6 / 2), 0), (pytest.approx(6 / 6), 1), (pytest.approx(6 * (1 / 2 + 1 / 6) / 2), 2)]
    assert [jobs[f"lra-text-mean-transformer-{seed}"].memory_mb for seed in range(3)] == [500.0, None, 500.0]


def test_where_nothing_is_known_quadratic_cost_and_long_texts_are_expected_to_take_longer(project: Project) -> None:
    project.add_code()
    jobs = planned(project)
    softmax, mean, shorter = (
        jobs[f"{name}-transformer-0"].seconds for name in ("lra-text-softmax", "lra-text-mean", "lra-listops-mean")
    )
    assert softmax > mean > shorter > 0
