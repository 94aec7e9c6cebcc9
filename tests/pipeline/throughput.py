"""How much faster a grid is with two jobs than with one, and what it costs besides training: not a test, a measurement.

    python tests/pipeline/throughput.py [--cells 40] [--steps 150] [--jobs 1 2]

The cells are real ones of generated ListOps, each with one thread. All but the seconds of training that they report
counts as cost: planning, workers, DVC, tests, MLflow and the report. With --steps 3 the cells are as good as empty.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from project_folder import ROOT, Project

MECHANISMS = 4


def make(folder: Path, cells: int, steps: int) -> None:
    project = Project(folder)
    project.set("grid.tasks", ["lra-listops"])
    project.set("grid.seeds", list(range(cells // MECHANISMS)))
    data = {"min_length": 100, "max_length": 200, "train_size": 2000, "dev_size": 100, "test_size": 100}
    project.set("task.lra-listops.data", data)
    model = {"num_layers": 2, "width": 64, "ffn_width": 128, "num_heads": 2, "dropout": 0.0, "head_width": 64}
    project.set("task.lra-listops.model", model)
    training = {"batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 2, "steps": steps, "eval_every": steps}
    project.set("task.lra-listops.training", training)
    project.add_dvc()


def run(folder: Path, jobs: int) -> float:
    """Seconds of the grid."""
    command = [sys.executable, "-m", "pipeline.cli", "run", "--task", "lra-listops", "--jobs", str(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def trained(folder: Path) -> float:
    """Seconds of training, all cells together."""
    logs = [log.read_text(encoding="utf-8") for log in (folder / "logs/tiny").glob("lra-*.log")]
    return sum(float(found) for log in logs for found in re.findall(r"([\d.]+) s of training", log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=40)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print(f"{options.cells} cells of {options.steps} steps")
    for jobs in options.jobs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.chdir(folder)
            make(folder, options.cells, options.steps)
            seconds = run(folder, jobs)
            training = trained(folder)
            cost = (seconds - training / jobs) / options.cells
            print(f"--jobs {jobs}: {seconds:.1f} s, training {training:.1f} s, cost {cost:.2f} s per cell", flush=True)
            os.chdir(ROOT)


if __name__ == "__main__":
    main()
