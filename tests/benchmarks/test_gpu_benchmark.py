"""The tables of docs/gpu.md are those that benchmarks/gpu.py makes of docs/gpu.csv."""

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).parents[2]


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|") and ":--" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_has_the_tables_of_the_file() -> None:
    sys.path.append(str(ROOT / "benchmarks"))
    from gpu import tables

    page = rows((ROOT / "docs/gpu.md").read_text(encoding="utf-8"))
    measured = pd.read_csv(ROOT / "docs/gpu.csv", dtype=str, keep_default_na=False)
    made = [row for table in tables(measured) for row in rows(table)]
    assert len(made) > 80
    assert page[-len(made) :] == made


def test_one_training_step_of_each_mechanism_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sys.path.append(str(ROOT / "benchmarks"))
    import gpu

    monkeypatch.setattr(gpu, "LENGTH", 64)
    monkeypatch.setattr(gpu, "BATCH", 2)
    steps = list(gpu.training_steps(["softmax", "rmfa"], torch.device("cpu")))
    assert [(row["attn"], row["dotf"], row["direction"]) for row, _ in steps] == [
        ("softmax", "", "training step"),
        ("rmfa", "exp", "training step"),
    ]
    for _, step in steps:
        step()
