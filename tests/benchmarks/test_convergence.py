"""The program that measures how mechanisms approach what they approximate."""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXACT = {"nystromformer", "informer", "skeinformer", "window", "bigbird"}
"""These are what they approximate at the largest budget."""


def test_it_tabulates_every_mechanism_and_ends_where_the_budget_is_everything(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/convergence.py"), str(tmp_path), "--length", "16", "--draws", "2"]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "convergence.svg").stat().st_size > 0
    with (tmp_path / "convergence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        assert float(row["least"]) <= float(row["error"]) <= float(row["largest"])
        lines.setdefault((row["inputs"], row["attn"]), []).append(float(row["error"]))
    assert {kind for kind, _ in lines} == {"independent", "drifting"}
    assert {attn for _, attn in lines} >= EXACT | {"rmfa", "performer", "rfa", "skyformer", "polysketch", "reformer"}
    for (_, attn), errors in lines.items():
        assert errors[-1] < (1e-10 if attn in EXACT else max(errors[0], 1.0))
