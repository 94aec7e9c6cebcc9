"""What the benchmark times, refuses to time, and measures beside time; the times themselves are not tested."""

import csv
import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.grid.params import BenchParams, Params, load_params
from pipeline.reporting._results import BENCH_SETTING, BENCH_VALUES
from pipeline.stages import bench
from schoenbat.attention import ATTENTIONS, Attention, KernelAttention
from schoenbat.attention.kernelized import Kernelized
from schoenbat.errors import TrainingFailed

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> Params:
    """A grid with a variant, two kernels, and a mechanism made for a largest length."""
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 1e-9)
    quick = load_params(PROJECT / "profiles/quick.yaml")
    plain = dataclasses.replace(quick.grid.plain, attn=["mean", "gaussian", "linformer"])
    kernel = dataclasses.replace(quick.grid.kernel, attn=["kernelized", "rmfa", "rmfa+32"], dotf=["exp", "inverse"])
    return dataclasses.replace(
        quick,
        grid=dataclasses.replace(quick.grid, plain=plain, kernel=kernel),
        attention={**{name: {} for name in plain.attn + kernel.attn}, "rmfa+32": {"num_features": 32}},
        bench=BenchParams(lengths=[64, 130], repeats=1, num_features=[64, 16], threads=1, max_quadratic_length=64),
    )


def test_what_the_grid_has_is_timed_with_its_settings_and_nothing_else(tmp_path: Path, params: Params) -> None:
    bench.run(params, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(BENCH_VALUES) | set(BENCH_SETTING) | set(bench.CHECKS) < set(rows[0]), "what the report reads"
    plain = {("mean", "", ""), ("gaussian", "", ""), ("linformer", "", "")}
    sized = (("kernelized", ""), ("rmfa", "128"), ("rmfa+32", "32"))
    contenders = {("sdpa", "", ""), (bench.FUNCTION, "exp", "64"), (bench.FUNCTION, "exp", "16"), *plain}
    contenders |= {(attn, dotf, size) for attn, size in sized for dotf in ("exp", "inverse")}
    found = Counter((row["attn"], row["dotf"], row["num_features"], row["length"]) for row in rows)
    expected = {
        (*contender, length): 5
        if contender[0] in ("sdpa", bench.FUNCTION)
        else 4
        if ATTENTIONS.get(contender[0]).has_causal_form
        else 2
        for contender in contenders
        for length in ("64", "130")
        if length == "64" or contender[0] not in ("kernelized", "gaussian")
    }
    assert found == expected
    for row in rows:
        assert float(row["milliseconds"]) > 0
        assert float(row["peak_memory_mb"]) > 0
        assert float(row["speedup_vs_sdpa"]) > 0
        assert math.isfinite(float(row["relative_error"]))
        exact = row["attn"] in ("sdpa", "kernelized")
        assert float(row["relative_error"]) <= (1e-4 if exact else 1 if row["dotf"] else math.inf)
        assert row["threads"] == "1"


@pytest.mark.parametrize("wrong", [lambda out: out * 1.001, lambda out: out * float("nan")])
def test_a_wrong_result_is_not_timed(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor]
) -> None:
    right = Kernelized.forward
    monkeypatch.setattr(Kernelized, "forward", lambda self, *inputs, **options: wrong(right(self, *inputs, **options)))
    with pytest.raises(TrainingFailed, match="kernelized at length 64 is not timed"):
        bench.run(params, tmp_path / "bench.csv")
    assert not (tmp_path / "bench.csv").exists()


def test_a_mechanism_made_for_a_largest_length_is_made_for_the_longest_that_is_timed(params: Params) -> None:
    longer = dataclasses.replace(params, bench=dataclasses.replace(params.bench, lengths=[64, 5000]))
    made = {c.attn: c.attend for c in bench._contenders(longer, bench.Shape(), torch.device("cpu"))}
    linformer = made["linformer"]
    assert isinstance(linformer, Attention)
    assert linformer.config.max_length == 5000


def test_a_causal_form_that_sees_the_future_is_not_timed(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Kernelized.forward
    monkeypatch.setattr(Kernelized, "forward", lambda self, *inputs, is_causal=False: right(self, *inputs))
    with pytest.raises(TrainingFailed, match="causal kernelized at length 64 is not timed"):
        bench.run(params, tmp_path / "bench.csv")


def test_mechanisms_are_timed_as_the_encoder_runs_them_on_unit_vectors(params: Params) -> None:
    modules = [c.attend for c in bench._contenders(params, bench.Shape(), torch.device("cpu"))]
    kernels = [module for module in modules if isinstance(module, KernelAttention)]
    assert kernels
    assert all(module.gets_units for module in kernels)


def test_a_wrong_gradient_is_not_timed(tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kernelized.forward
    monkeypatch.setattr(
        Kernelized, "forward", lambda self, query, key, value: right(self, query.detach(), key.detach(), value)
    )
    with pytest.raises(TrainingFailed, match="gradients"):
        bench.run(params, tmp_path / "bench.csv")


def test_a_pass_whose_quartiles_are_far_apart_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has a spread of half its median once, the second always, the third never."""
    asked: list[list[int]] = []

    def interleaved(tasks: dict[int, Callable[[], None]], _: int) -> dict[int, list[float]]:
        asked.append(list(tasks))
        wide, narrow = [1.5, 2.0, 2.5], [2.0, 2.0, 2.1]
        return {i: wide if i == 1 or (i == 0 and len(asked) == 1) else narrow for i in tasks}

    monkeypatch.setattr(bench, "_interleaved", interleaved)
    what = {"direction": "forward", "length": 8, "num_features": None, "relative_error": None}
    rows = list(
        bench.time_passes(
            [(what | {"attn": name}, list) for name in ("sdpa", "a", "b")], "sdpa", 3, torch.device("cpu")
        )
    )
    assert asked == [[0, 1, 2], [0, 1], [1]]
    assert [row["spread"] for row in rows] == pytest.approx([0.05, 0.5, 0.05])


def test_peak_memory_is_what_is_held_at_once() -> None:
    mebibyte = 2**18

    def call() -> None:
        for _ in range(3):
            first = torch.empty(mebibyte)
            second = torch.empty(2 * mebibyte)
            del first, second

    assert bench._peak_memory_mb(call, torch.device("cpu")) == pytest.approx(3, abs=0.01)
