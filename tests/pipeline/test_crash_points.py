"""Whatever is cut short at a point at which the disk is touched ends, done again, as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EVERY = os.environ.get("SCHOENBAT_CRASH_EVERY", "131")
"""1 walks all of them."""
JOBS = "2" if EVERY == "1" else "1"


def test_cut_short_at_any_point_and_done_again_it_ends_with_the_same_bytes() -> None:
    command = [sys.executable, "crash_points.py", "--every", EVERY, "--jobs", JOBS]
    ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
