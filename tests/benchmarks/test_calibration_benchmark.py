"""The program that says what calibration is worth judges it on vectors that the basis was not made from."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks/calibration.py"


def test_each_kind_of_vectors_is_judged_before_and_after() -> None:
    options = ["--head-dims", "32", "--scales", "2", "--num-features", "64"]
    command = [sys.executable, "-W", "ignore", PROGRAM, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    _, _, _, *rows = ended.stdout.splitlines()
    found = {row[:12].strip(): [float(x) for x in row[12:].split()[:5]] for row in rows}
    assert list(found) == ["isotropic", "8 clusters", "decaying"]
    assert all(numbers[:3] == [32, 2, 64] for numbers in found.values())
    (*_, before, after), clustered, decaying = found.values()
    assert after == pytest.approx(before, abs=0.02)
    assert clustered[4] > 0.95 > clustered[3]
    assert decaying[4] > 0.5 > decaying[3]
