"""Where the tests marked gpu run. SCHOENBAT_TEST_DEVICE=cpu tries the tests themselves where there is no GPU."""

import contextlib
import os
from collections.abc import Iterator

import torch

DEVICE = torch.device(os.environ.get("SCHOENBAT_TEST_DEVICE", "cuda:0"))
ON_GPU = DEVICE.type == "cuda"


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU inside the block is a RuntimeError."""
    wait(allowed=False)
    try:
        yield
    finally:
        wait(allowed=True)


def wait(*, allowed: bool) -> None:
    """Whether the host may wait for the GPU from now on."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("default" if allowed else "error")
