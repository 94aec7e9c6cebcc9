"""A small project folder for tests: a params file that can be bent, and the real dvc.yaml."""

import copy
import shutil
from pathlib import Path
from typing import Any

import yaml

from pipeline.grid.graph import read_graph
from pipeline.launch import Job, Work

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
        """The files that dvc.yaml and a cell's fingerprint name."""
        shutil.copytree(ROOT / "schoenbat", self.folder / "schoenbat", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "pipeline", self.folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "dvc.yaml", self.folder)
        shutil.copy(ROOT / ".dvcignore", self.folder)

    def add_dvc(self) -> None:
        self.add_code()
        init_dvc(self.folder)


def job(name: str, stages: tuple[str, ...], **options: Any) -> Job:
    """A job of stages of the dvc.yaml in the current folder."""
    graph = read_graph({})
    work = (Work(stage.name, stage.command, outs=stage.outs) for stage in map(graph.stages.__getitem__, stages))
    return Job(name, tuple(work), **options)


def init_dvc(folder: Path) -> None:
    """What `dvc init --no-scm` makes, with everything off that would phone home."""
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n")
