"""Tensors of the tests are tiny: one thread each is faster than handing work to others."""

import pytest
import torch

from schoenbat.ops.native.build import VARIABLE

torch.set_num_threads(1)


@pytest.fixture(params=["", "torch"], ids=["chosen-form", "torch-form"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as it is computed here, which is the compiled form where there is a compiler, and in the torch form."""
    monkeypatch.setenv(VARIABLE, request.param)
