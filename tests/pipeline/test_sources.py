"""A task of one's own, made from a table: another table, or another content of the same, is another data set."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project_folder import ROOT, Project

from pipeline.grid.freshness import Freshness, sources_have_changed
from pipeline.grid.settings import PARAMS_FILE, read_yaml
from schoenbat import registry

Invoke = Callable[..., tuple[int, str, str]]


def test_half_a_note_of_where_data_came_from_is_written_anew(project: Project, invoke: Invoke) -> None:
    assert invoke("download", "--task", "lra-listops")[0] == 0
    note = Path("data/raw/lra-listops/provenance.json")
    whole = note.read_bytes()
    for length in range(len(whole)):
        note.write_bytes(whole[:length])
        assert not sources_have_changed(note.parent)
    assert invoke("download", "--task", "lra-listops")[0] == 0
    assert note.read_bytes() == whole


def test_half_a_description_of_data_is_one_line(project: Project, invoke: Invoke) -> None:
    for stage in ("download", "preprocess"):
        assert invoke(stage, "--task", "lra-listops")[0] == 0
    summary = Path("runs/tiny/data/lra-listops.json")
    summary.write_bytes(summary.read_bytes()[:30])
    code, _, err = invoke("report")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{summary} is damaged" in err


TASK = '''
"""Reviews of one's own: a table of texts and labels."""

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schoenbat.lra.data.arrays import write_dataset
from schoenbat.lra.tasks import Task


class Reviews(Task):
    num_classes, vocab_size = 2, 257

    @dataclass(frozen=True)
    class Config:
        path: str
        max_length: int = 64

    def download(self, folder, mirror, limit_bytes, on_progress):
        shutil.copy(self.config.path, folder / "reviews.csv")
        return {"files": [{"name": "reviews.csv", "from": self.config.path}]}

    def prepare(self, raw, out):
        with open(raw / "reviews.csv", newline="") as file:
            rows = list(csv.reader(file))
        docs = [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + 1 for text, _ in rows]
        labels = np.array([int(label) for _, label in rows])
        parts = np.array_split(np.arange(len(rows)), 3)
        splits = {split: (part[:, None], labels[part]) for split, part in zip(("train", "dev", "test"), parts)}
        meta = dict(task="my-csv", num_classes=2, vocab_size=257, num_texts=1, max_length=64, label="reviews",
                    source="own", notes=[])
        return write_dataset(out, docs, splits, meta)

    @classmethod
    def sample(cls, raw):
        (raw / "reviews.csv").write_text("good,1\\nbad,0\\nfine,1\\n")
        return cls.Config(path=str(raw / "reviews.csv"))
'''


def write_table(path: Path, rows: int) -> None:
    path.write_text("".join(f"text number {row},{row % 2}\n" for row in range(rows)))


@pytest.fixture
def own_task(
    project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    """A project whose task `my-csv` is that of another distribution and reads tables outside the project."""
    installed = tmp_path_factory.mktemp("installed")
    (installed / "my_tasks.py").write_text(TASK)
    metadata = installed / "my_tasks-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-tasks\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[schoenbat.tasks]\nmy-csv = my_tasks:Reviews\n")
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setenv("PYTHONPATH", f"{installed}:{ROOT}")
    registry._entry_points.cache_clear()
    project.add_dvc()
    tables = tmp_path_factory.mktemp("tables")
    for name, rows in (("large", 60), ("small", 30)):
        write_table(tables / f"{name}.csv", rows)
    section = {**project.settings["task"]["lra-listops"], "data": {"path": str(tables / "large.csv")}}
    project.settings["task"] = {"my-csv": section}
    project.settings["grid"] = {
        "tasks": ["my-csv"],
        "seeds": [0],
        "plain": {"attn": ["mean"], "former": ["transformer"]},
        "kernel": {"attn": [], "dotf": [], "former": []},
    }
    project.write()
    yield project
    registry._entry_points.cache_clear()
    sys.modules.pop("my_tasks", None)
    importlib.invalidate_caches()


def train_examples() -> int:
    return int(json.loads(Path("data/processed/tiny/my-csv/meta.json").read_text())["splits"]["train"])


def is_up_to_date() -> bool:
    return Freshness(read_yaml(PARAMS_FILE)).has_arrays("my-csv")


def dvc(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


DATA = {"download@tiny-my-csv", "preprocess@tiny-my-csv"}


@pytest.mark.slow
def test_another_source_or_another_content_is_downloaded_again_and_nothing_else_is(
    own_task: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    table = Path(own_task.settings["task"]["my-csv"]["data"]["path"])
    monkeypatch.setenv("PYTHONPATH", f"{Path(sys.path[0])}:{own_task.folder}")
    assert not is_up_to_date()
    dvc("repro", "preprocess@tiny-my-csv")
    assert train_examples() == 20
    assert is_up_to_date()
    assert set(json.loads(dvc("status", "--json"))).isdisjoint(DATA)

    own_task.set("task.my-csv.data.path", str(table.with_name("small.csv")))
    assert not is_up_to_date()
    assert set(json.loads(dvc("status", "--json"))) >= DATA
    dvc("repro", "preprocess@tiny-my-csv")
    assert train_examples() == 10
    assert is_up_to_date()

    # DVC does not know of a content; a grid and `status` do.
    write_table(table.with_name("small.csv"), 33)
    assert not is_up_to_date()
    table.with_name("small.csv").unlink()
    assert is_up_to_date(), "a source that is gone takes nothing away"

    # The code of the task decides as well.
    module = Path(importlib.import_module("my_tasks").__file__ or "")
    module.write_text(f"{TASK}# more\n")
    assert is_up_to_date()
    module.write_text(
        TASK.replace(".encode(), np.uint8).astype(np.uint16) + 1", ".encode(), np.uint8).astype(np.uint16) + 2")
    )
    assert not is_up_to_date()


def test_other_options_of_a_task_and_other_profiles_leave_the_raw_data_as_it_is(
    project: Project, invoke: Invoke
) -> None:
    project.add_dvc()
    assert invoke("download", "--task", "lra-listops")[0] == 0
    before = {path: path.read_bytes() for path in Path("data/raw").rglob("*") if path.is_file()}
    project.set("task.lra-listops.data.train_size", 32)
    assert invoke("download", "--task", "lra-listops", "--profile", "tiny")[0] == 0
    assert {path: path.read_bytes() for path in Path("data/raw").rglob("*") if path.is_file()} == before
