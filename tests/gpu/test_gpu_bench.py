"""The benchmark on the GPU: every mechanism is timed, and none whose result is wrong; the times are not tested."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, ON_GPU

from pipeline.grid.params import BenchParams
from pipeline.stages import bench
from schoenbat.attention import ATTENTIONS

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = [512, 4096, 16384] if ON_GPU else [64, 128]
LONGEST_QUADRATIC = LENGTHS[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_every_mechanism_is_timed_on_a_gpu(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(bench, "SAMPLE_SECONDS", 1e-9)
    sys.path.append(str(ROOT / "benchmarks"))
    from gpu import every_mechanism

    wanted = BenchParams(lengths=LENGTHS, repeats=5, threads=1, max_quadratic_length=LONGEST_QUADRATIC)
    params = every_mechanism(wanted, str(DEVICE))
    out = tmp_path / "bench.csv"
    bench.run(params, out, bench.Shape(batch=2, heads=8, head_dim=64, dtype=dtype))
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = {(row["attn"], int(row["length"])) for row in rows}
    for name in ["sdpa", *ATTENTIONS.names()]:
        quadratic = name in ATTENTIONS.names() and ATTENTIONS.get(name).cost == "quadratic"
        for length in LENGTHS:
            assert ((name, length) in timed) == (not quadratic or length <= LONGEST_QUADRATIC)
    assert {row["device"].partition(" ")[0] for row in rows} == {str(DEVICE)}
    assert all(float(row["milliseconds"]) > 0 and float(row["peak_memory_mb"]) >= 0 for row in rows)
    assert all(math.isfinite(float(row["relative_error"])) for row in rows)
