"""What the benchmark times, refuses to time, and measures beside time; the times themselves are not tested."""

import csv
import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.params import BenchParams, Params, load_params
from pipeline.stages import bench
from schoenbat.attention import ATTENTIONS
from schoenbat.attention.kernelized import Kernelized
from schoenbat.errors import TrainingFailed

PROJECT = Path(__file__).resolve().parents[2]
QUADRATIC = {"sdpa", "softmax", "kernelized"}


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 1e-9)
    quick = load_params(PROJECT / "profiles/quick.yaml")
    return dataclasses.replace(quick, bench=BenchParams(lengths=[64, 130], repeats=2, max_quadratic_length=64))


def test_every_mechanism_is_timed_at_every_length_it_can_bear(tmp_path: Path, params: Params) -> None:
    bench.run(params, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(bench.COLUMNS)
    names = {"sdpa", *ATTENTIONS.names()}
    expected = {("64", name) for name in names} | {("130", name) for name in names - QUADRATIC}
    assert Counter((row["length"], row["attn"]) for row in rows) == dict.fromkeys(expected, 2)
    for row in rows:
        assert float(row["milliseconds"]) > 0
        assert float(row["peak_memory_mb"]) > 0
        assert row["dotf"] == ("exp" if row["attn"] != "sdpa" and ATTENTIONS.get(row["attn"]).needs_kernel else "")
        assert bool(row["speedup_vs_sdpa"]) == (row["length"] == "64")
        assert float(row["relative_error"]) <= (1e-4 if row["attn"] in QUADRATIC else 1)
    by_features = {row["attn"]: row["num_features"] for row in rows}
    assert (by_features["rmfa"], by_features["softmax"]) == ("128", "")


@pytest.mark.parametrize("wrong", [lambda out: out * 1.001, lambda out: out * float("nan")])
def test_a_wrong_result_is_not_timed(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor]
) -> None:
    right = Kernelized.forward
    monkeypatch.setattr(Kernelized, "forward", lambda self, *inputs: wrong(right(self, *inputs)))
    with pytest.raises(TrainingFailed, match="kernelized at length 64 is not timed"):
        bench.run(params, tmp_path / "bench.csv")
    assert not (tmp_path / "bench.csv").exists()


def test_a_wrong_gradient_is_not_timed(tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kernelized.forward
    monkeypatch.setattr(
        Kernelized, "forward", lambda self, query, key, value: right(self, query.detach(), key.detach(), value)
    )
    with pytest.raises(TrainingFailed, match="gradients"):
        bench.run(params, tmp_path / "bench.csv")


def test_peak_memory_is_what_is_held_at_once() -> None:
    mebibyte = 2**18

    def call() -> None:
        for _ in range(3):
            first = torch.empty(mebibyte)
            second = torch.empty(2 * mebibyte)
            del first, second

    assert bench._peak_memory_mb(call, torch.device("cpu")) == pytest.approx(3, abs=0.01)


def test_one_training_step_is_timed_where_asked(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "STEP_LENGTH", 64)
    monkeypatch.setattr(bench, "STEP_BATCH", 2)
    only_step = dataclasses.replace(params, bench=BenchParams(lengths=[], repeats=1, step=True))
    bench.run(only_step, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["attn"], row["direction"], row["batch"]) for row in rows] == [
        ("softmax", "training step", "2"),
        ("rmfa", "training step", "2"),
    ]
