"""The gate of the kernels sees errors: each of these is one, and the case beside it fails."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernel_cases import CASES, DEVICE, assert_kernels_are_the_formulas

from schoenbat.ops.triton import kernels, launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE.type == "cuda", reason="an error may make the GPU unusable for later tests"),
]
SOURCE = Path(kernels.__file__).read_text(encoding="utf-8")


class Mutant(NamedTuple):
    """The first `original` after `function` in kernels.py becomes `replaced`."""

    name: str
    function: str
    original: str
    replaced: str
    killed_by: str


MUTANTS = [
    Mutant("mask dropped", "centre_kernel", "if MASKED:", "if False:", "masked"),
    Mutant("wrong split", "centre_kernel", "range(split * per_split,", "range(0,", "several blocks"),
    Mutant("sum of the last block only", "sum_kernel", "sums += _dot", "sums = _dot", "several blocks"),
    Mutant("sum in bfloat16", "sum_kernel", "sums += _dot(psi, v, LIKE, PRECISION)",
           "sums = (sums + _dot(psi, v, LIKE, PRECISION)).to(tl.bfloat16).to(tl.float32)", "plain"),
    Mutant("values not centred", "sum_kernel", "v = (v - average[None, :]) *", "v = v *", "plain"),
    Mutant("wrong key head", "sum_kernel", "of_keys = head // groups", "of_keys = head % groups", "grouped heads"),
    Mutant("tail off by one", "look_up_kernel", "inside = rows < tokens", "inside = rows < tokens - 1", "plain"),
    Mutant("query not cooled", "look_up_kernel", "x *= tl.sqrt(cooled)[:, None]", "pass", "cooled"),
    Mutant("excess forgotten", "look_up_kernel", "(denominator - even, least)", "(denominator, least)", "plain"),
    Mutant("one factor twice", "look_up_kernel", "factors, index + 1,", "factors, index,", "plain"),
    Mutant("factors of a gradient swapped", "_pull_back", "_dot(grad * y, matrix,", "_dot(grad * z, matrix,", "plain"),
    Mutant("cooler of complete degrees", "query_grad_kernel", "tl.where(is_cooler, along_psi, 0.0)", "along_psi",
           "plain"),
    Mutant("number without gradient", "key_grad_kernel", " + weight * tl.load(grad_squares + head)", "",
           "several blocks"),
    Mutant("centre without gradient", "centre_grad_kernel", "grad_x += weight[:, None] * of_centre[None, :]", "pass",
           "plain"),
    Mutant("masked queries in the mean", "mean_grad_kernel", "tl.where(there[:, None],", "tl.where(inside[:, None],",
           "masked"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_an_error_is_seen(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = SOURCE.index(f"def {mutant.function}(")
    changed = SOURCE[:begin] + SOURCE[begin:].replace(mutant.original, mutant.replaced, 1)
    assert changed != SOURCE
    file = tmp_path / "mutant.py"
    file.write_text(changed, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(launch, "kernels", module)
    (case,) = (case for case in CASES if case.name == mutant.killed_by)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(AssertionError, match="is off by"):
            assert_kernels_are_the_formulas(case)
    finally:
        torch.use_deterministic_algorithms(False)
