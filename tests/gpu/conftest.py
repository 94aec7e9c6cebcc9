"""What is asked of a GPU; skipped where there is none."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, wait

# The small projects of the pipeline's tests.
sys.path.append(str(Path(__file__).parents[1] / "pipeline"))


@pytest.fixture(autouse=True)
def gpu() -> Iterator[torch.device]:
    """The device of the test; afterwards the host may wait for it again."""
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield DEVICE
    wait(allowed=True)


@pytest.fixture
def keep(tmp_path: Path) -> Callable[[str], Path]:
    """Where a test leaves a file of what it has measured: in SCHOENBAT_GPU_RESULTS, if that is set."""
    folder = Path(os.environ.get("SCHOENBAT_GPU_RESULTS", tmp_path))
    return lambda name: folder / name
