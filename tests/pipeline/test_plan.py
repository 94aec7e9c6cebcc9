"""What a grid plans: every job has a limit, and what earlier runs have left is a help and no need."""

from pathlib import Path

import pytest
from pipeline.grid.graph import read_graph
from pipeline.hashes import Hashes
from project_folder import Project, write_results

from pipeline.grid.cells import expand
from pipeline.grid.params import load_params
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
