"""A small project folder for tests: a params file that can be bent, and the real dvc.yaml."""

import copy
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.grid.axes import Cell, expand_grid
from pipeline.grid.freshness import Freshness
from pipeline.grid.numerics import write_numerics
from pipeline.grid.params import load_params
from pipeline.grid.results import CellResults, Fingerprint, Metrics, Resources, TestScore
from pipeline.grid.settings import PARAMS_FILE, read_yaml
from pipeline.launch import Job, Work
from pipeline.stages import download, preprocess
from schoenbat.files import write_bytes
from schoenbat.lra.training import Evaluation, Predictions

ROOT = Path(__file__).parents[2]

SETTINGS: dict[str, Any] = {
    "profile": "tiny",
    "note": "For tests.",
    "grid": {
        "tasks": ["lra-listops", "lra-text"],
        "seeds": [0, 1],
        "plain": {"attn": ["softmax", "mean"], "former": ["transformer"]},
        "kernel": {"attn": ["rmfa"], "dotf": ["exp", "inverse"], "former": ["maclauformer"]},
    },
    "task": {
        "lra-listops": {
            "data": {"max_length": 40, "min_length": 5, "train_size": 64, "dev_size": 16, "test_size": 16},
            "model": {"num_layers": 1, "width": 8, "ffn_width": 8, "num_heads": 2, "dropout": 0.1, "head_width": 8},
            "training": {
                "batch_size": 8,
                "learning_rate": 1.0e-3,
                "warmup_steps": 2,
                "steps": 6,
                "eval_every": 3,
            },
        },
        "lra-text": {
            "data": {"max_length": 64},
            "model": {"num_layers": 1, "width": 8, "ffn_width": 8, "num_heads": 2, "dropout": 0.1, "head_width": 8},
            "training": {
                "batch_size": 8,
                "learning_rate": 1.0e-3,
                "warmup_steps": 2,
                "steps": 6,
                "eval_every": 3,
            },
        },
    },
    "attention": {"softmax": {}, "mean": None, "rmfa": {"num_features": 8}},
    "former": {"transformer": {}, "maclauformer": {}},
    "run": {"device": "cpu", "threads": 1},
    "bench": {"lengths": [64], "repeats": 1},
    "errors": {"num_features": [4], "tokens": 8, "draws": 2, "trained": []},
    "trained": {"cells": {}},
}


class Project:
    """A folder with params.yaml; it is the current one during the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = copy.deepcopy(SETTINGS)
        self.write()

    def write(self) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.settings), encoding="utf-8")

    def set(self, key: str, value: Any) -> None:
        """Set one key, given with dots, and write the file."""
        *parents, last = key.split(".")
        place = self.settings
        for parent in parents:
            place = place[parent]
        place[last] = value
        self.write()

    def add_code(self) -> None:
        """The code, whose numerics DVC's stages depend on, and dvc.yaml."""
        shutil.copytree(ROOT / "schoenbat", self.folder / "schoenbat", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "pipeline", self.folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "dvc.yaml", self.folder)
        shutil.copy(ROOT / ".dvcignore", self.folder)

    def add_dvc(self) -> None:
        self.add_code()
        init_dvc(self.folder)


def write_results(
    results: CellResults, cell: Cell, made_from: Fingerprint, accuracy: float, test_code: str = "code"
) -> None:
    """What a cell leaves that was trained for 100 steps and tested."""
    write_bytes(results.best, f"weights of {cell.id}".encode())
    evaluations = [
        Evaluation(step, 0, 1e-3, 0.7, 0.5, 0.69, 0.5 + (accuracy - 0.49) * step / 100) for step in (25, 50, 75, 100)
    ]
    resources = Resources("cpu (made up)", 10.0, 10.0, 100.0, 300.0, 0, "none")
    axes = {"cell": cell.id, "profile": results.profile, **dataclasses.asdict(cell)}
    figures = {"steps": 100, "best_step": 100, "best_dev_accuracy": accuracy + 0.01, "best_dev_loss": 0.6}
    where = {"device": "cpu (made up)", "threads": 2, "torch": "2.13.0", "git_revision": "abc123"}
    counts = {"num_parameters": 12345, "train_examples": 2000, "dev_examples": 200}
    metrics = Metrics(
        **axes, **figures, **counts, **where, final_train_loss=0.6, data="made up", attention={}, fingerprint=made_from
    )
    results.write_training(evaluations, resources, metrics)
    tested = dataclasses.replace(made_from, code=test_code)
    predictions = made_up_predictions(accuracy, cell.seed)
    results.write_test(TestScore(cell.id, predictions.score().accuracy, 0.6, 200, 100, tested), predictions)


def make_up_results() -> None:
    """Prepare the data of each task of params.yaml, and make up results of all cells that are up to date."""
    params = load_params()
    write_numerics(params.grid.components())
    for task in params.grid.tasks:
        download.run(params, task)
        preprocess.run(params, task)
    freshness = Freshness(read_yaml(PARAMS_FILE))
    for cell in expand_grid(params.grid):
        made_from = freshness.fingerprint(cell)
        assert made_from is not None
        accuracy = 0.5 + (cell.seed % 97) / 1000
        write_results(CellResults(params.profile, cell.id), cell, made_from, accuracy, made_from.code)


def made_up_predictions(accuracy: float, seed: int, examples: int = 200) -> Predictions:
    """Two classes; so many right that it is about `accuracy`, which ones by `seed`, easier examples first."""
    generator = np.random.default_rng(seed)
    order = np.argsort(np.linspace(0, 1, examples) + generator.normal(0, 0.3, examples))
    correct = np.zeros(examples, np.int64)
    correct[order[: round(accuracy * examples)]] = 1
    return Predictions(correct, np.ones(examples, np.int64), np.where(correct, -0.4, -1.1), correct)


def job(name: str, commands: Mapping[str, str], **options: Any) -> Job:
    """Return a job of shell commands, by the name of their stages."""
    return Job(name, tuple(Work(stage, command) for stage, command in commands.items()), **options)


def init_dvc(folder: Path) -> None:
    """What `dvc init --no-scm` makes, with everything off that would phone home."""
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n")
