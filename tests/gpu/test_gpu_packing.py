"""Cells share one GPU: those that were measured run side by side, and give what they give alone."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gpu_device import DEVICE, ON_GPU

pytestmark = pytest.mark.gpu


def side_by_side(jobs: Mapping[str, Mapping[str, Any]]) -> int:
    """The largest number of jobs that ran at one time."""
    spans = [(job["since"] - job["seconds"], job["since"]) for job in jobs.values()]
    return max(sum(start < (first + last) / 2 < end for start, end in spans) for first, last in spans)


def test_cells_share_a_gpu_once_their_memory_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from project_folder import ROOT
    from small_grid import make_small

    from pipeline.grid.axes import read_cells
    from pipeline.grid.results import CellResults

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    project = make_small(tmp_path)
    project.set("grid.plain.attn", ["mean", "softmax"])
    project.set("run.device", str(DEVICE))
    project.set("task.lra-listops.training.steps", 400)
    project.set("task.lra-listops.training.eval_every", 100)
    cells = [cell.id for cell in read_cells(project.settings)]
    assert len(cells) == 3

    def run(*options: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "pipeline.cli", "run", "--task", "lra-listops", "--jobs", "3", *options]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        ended = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=300
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        jobs = json.loads((tmp_path / "logs/tiny/grid.json").read_text())["jobs"]
        return {cell: jobs[cell] for cell in cells}

    def losses() -> dict[str, float]:
        tests = {cell: CellResults("tiny", cell, tmp_path).test() for cell in cells}
        return {cell: test.loss for cell, test in tests.items() if test is not None}

    first = run()
    alone = losses()
    assert alone.keys() == set(cells)
    second = run("--force")
    if ON_GPU:
        assert side_by_side(first) == 1
    assert {job["device"] for job in (*first.values(), *second.values())} == {str(DEVICE)}
    assert side_by_side(second) == min(len(cells), len(os.sched_getaffinity(0)))
    assert losses() == pytest.approx(alone, rel=0.05)
