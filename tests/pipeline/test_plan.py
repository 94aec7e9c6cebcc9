"""What a grid plans: every job has a limit, and what earlier runs have left is a help and no need."""

import json
from pathlib import Path

import pytest
from project_folder import Project, write_results

from pipeline.grid.cells import expand
from pipeline.grid.graph import read_graph
from pipeline.grid.params import load_params
from pipeline.hashes import Hashes
from pipeline.launch import Job
from pipeline.launch.plan import plan_jobs
from pipeline.results import CellResults, Fingerprint


def planned(project: Project) -> dict[str, Job]:
    params, graph = load_params(), read_graph(project.settings)
    jobs = plan_jobs(params, expand(params), graph, graph.stages, project.settings, Hashes(), device="cpu")
    return {job.name: job for job in jobs}


def test_every_job_has_the_time_limit_also_those_of_data(project: Project) -> None:
    project.add_code()
    project.set("run.timeout_minutes", 5)
    jobs = planned(project)
    assert {"data-lra-text", "bench@tiny", "report@tiny", "lra-text-mean-transformer-0"} <= jobs.keys()
    assert {job.timeout_seconds for job in jobs.values()} == {300.0}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"device": "cpu"}', "\0"])
def test_of_a_damaged_record_of_what_a_cell_took_nothing_is_known(project: Project, damage: str) -> None:
    project.add_code()
    cell = expand(load_params())[0]
    unknown = planned(project)[cell.id]
    results = CellResults("tiny", cell.id)
    write_results(results, cell, Fingerprint("code", "settings", "data"), 0.5)
    assert planned(project)[cell.id].memory_mb == 300.0
    Path("checkpoints/tiny", cell.id, "resources.json").write_text(damage)
    assert planned(project)[cell.id] == unknown


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
