"""What is asked of a GPU; skipped where there is none."""

import sys
from collections.abc import Iterator
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
