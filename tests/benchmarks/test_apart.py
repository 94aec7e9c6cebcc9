"""The program that puts bounds to the test where queries and keys vary in different directions."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks/apart.py"


@pytest.mark.slow
def test_each_kernel_has_its_largest_errors_and_how_many_are_above_the_limit() -> None:
    options = ["--kernels", "exp", "sqrt", "--head-dims", "8", "--decays", "1.5", "--sizes", "1"]
    command = [sys.executable, PROGRAM, *options, "--num-features", "4", "495"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    exp, of_exp, sqrt, of_sqrt = ended.stdout.splitlines()
    for line, name, counted, number in ((exp, "exp", of_exp, 24), (sqrt, "sqrt", of_sqrt, 12)):
        largest = dict(part.split(": ") for part in line.removeprefix(name + " ").split(", "))
        assert list(largest) == ["4", "495"]
        assert 0 <= float(largest["495"]) < float(largest["4"]) < 1.05
        assert counted == f"0 of {number} above 1.05"
