"""docs/gpu-kernels.csv is a table of the kernels as they are, and says that they fit onto a GPU."""

import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "docs/gpu-kernels.csv"
MOST_SHARED = 227 * 1024
SPILLS = {("key_grad_kernel", "all degrees", "bfloat16", "64", "80"): 32}
"""Bytes that are known to spill: docs/gpu.md says so."""
WITH_PRODUCTS = {"sum_kernel", "look_up_kernel", "query_grad_kernel", "key_grad_kernel"}


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as table:
        return list(csv.DictReader(table))


def test_the_table_is_of_this_code() -> None:
    """`python benchmarks/gpu_kernels.py docs` makes it anew."""
    sources = (ROOT / "schoenbat/ops/triton" / name for name in ("kernels.py", "launch.py"))
    expected = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]
    assert {row["source"] for row in rows(TABLE)} == {expected}


def test_kernels_spill_nothing_unsaid_fit_into_shared_memory_and_use_tensor_cores() -> None:
    table = rows(TABLE)
    assert {row["kernel"] for row in table if int(row["tensor_core_instructions"])} == WITH_PRODUCTS
    for row in table:
        own = tuple(row[name] for name in ("kernel", "features", "dtype", "head_dim", "capability"))
        assert int(row["spilled_bytes"]) == SPILLS.get(own, 0), row
        assert int(row["shared_bytes"]) <= MOST_SHARED, row
        assert (row["kernel"] in WITH_PRODUCTS) == (int(row["tensor_core_instructions"]) > 0), row


@pytest.mark.slow
def test_the_table_is_what_the_compiler_says(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    part = {"capability": "90", "dtype": "bfloat16", "head_dim": "64"}
    options = [text for name, value in part.items() for text in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, "benchmarks/gpu_kernels.py", str(tmp_path), *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    expected = [row for row in rows(TABLE) if part.items() <= row.items()]
    assert expected
    assert rows(tmp_path / "gpu-kernels.csv") == expected
