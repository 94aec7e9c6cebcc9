"""The program that bounds the speed of causal attention sets products and both attentions against the exact one."""

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks/causal_products.py"


def test_each_is_named_and_set_against_the_exact_one() -> None:
    options = ["--lengths", "130", "--num-features", "16", "--rounds", "1", "--threads", "1"]
    ended = subprocess.run([sys.executable, PROGRAM, *options], capture_output=True, text=True, check=True)
    _, _, *rows = ended.stdout.splitlines()
    found = dict(re.fullmatch(r" +130 +16  (.*?) +[\d.]+ +([\d.]+)", row).groups() for row in rows)  # type: ignore[union-attr]
    assert list(found) == ["exact", "ours", "products, C = 64", "products, C = 128", "products, C = 256"]
    assert float(found["exact"]) == 1.0
