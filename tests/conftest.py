"""Tensors of the tests are tiny: one thread each is faster than handing work to others."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels for GPUs are interpreted then; triton has to know it when it is imported first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from schoenbat.ops.native.build import VARIABLE

torch.set_num_threads(1)


@pytest.fixture(params=["", "torch"], ids=["chosen-form", "torch-form"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as it is computed here, which is the compiled form where there is a compiler, and in the torch form."""
    monkeypatch.setenv(VARIABLE, request.param)
