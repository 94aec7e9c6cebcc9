"""The program that says what calibration is worth judges it on vectors that the basis was not made from."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks/calibration.py"


def rows_of(*options: str) -> dict[str, list[float]]:
    """Of each kind of vectors head_dim, s, features, and the shares as published, as drawn and calibrated."""
    command = [sys.executable, "-W", "ignore", PROGRAM, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    _, _, _, *rows = ended.stdout.splitlines()
    return {row[:16].strip(): [float(x) for x in row[16:].split()[:6]] for row in rows}


def test_each_kind_of_vectors_is_judged_before_and_after() -> None:
    found = rows_of("--head-dims", "32", "--scales", "2", "--num-features", "64")
    assert list(found) == ["isotropic", "8 clusters", "8 tight clusters", "decaying"]
    assert all(numbers[:3] == [32, 2, 64] for numbers in found.values())
    (*_, before, after), clustered, _, decaying = found.values()
    assert after == pytest.approx(before, abs=0.02)
    assert clustered[5] > 0.95 > clustered[4]
    assert decaying[5] > 0.5 > decaying[4]


@pytest.mark.slow
def test_on_tight_clusters_the_published_features_beat_the_sketch_and_calibrated_ones_beat_both() -> None:
    options = ("--kinds", "8 tight clusters", "--head-dims", "128", "--scales", "1", "--num-features", "1024")
    ((_, _, _, published, drawn, calibrated),) = rows_of(*options).values()
    assert drawn < published < 0.99 < calibrated
