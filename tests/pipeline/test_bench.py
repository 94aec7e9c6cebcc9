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
from torch.nn import functional as F

from pipeline.grid.params import BenchParams, Params, load_params
from pipeline.reporting._results import BENCH_SETTING, BENCH_VALUES
from pipeline.stages import bench
from pipeline.stages._rivals import installed_rivals
from schoenbat.attention import ATTENTIONS, Attention, KernelAttention
from schoenbat.attention.kernelized import Kernelized
from schoenbat.errors import TrainingFailed

PROJECT = Path(__file__).resolve().parents[2]
QUADRATIC = {"sdpa", "softmax", "kernelized", "gaussian"}
RIVALS = {"performer-pytorch", "transformers-nystromformer"}


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 1e-9)
    quick = load_params(PROJECT / "profiles/quick.yaml")
    return dataclasses.replace(
        quick,
        bench=BenchParams(lengths=[64, 130], repeats=1, num_features=[64, 32], threads=[2, 1], max_quadratic_length=64),
    )


@pytest.mark.slow
def test_every_mechanism_is_timed_at_every_length_it_can_bear(tmp_path: Path, params: Params) -> None:
    bench.run(params, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(BENCH_VALUES) | set(BENCH_SETTING) | set(bench.CHECKS) < set(rows[0]), "what the report reads"
    counted = {name: hasattr(ATTENTIONS.get(name).Config(), "num_features") for name in ATTENTIONS.names()}
    contenders = {("sdpa", ""), *((bench.FUNCTION, features) for features in ("64", "32"))} | {
        (name, features) for name in ATTENTIONS.names() for features in (("64", "32") if counted[name] else ("",))
    }
    expected = {
        (threads, length, name, features)
        for threads in ("2", "1")
        for length in ("64", "130")
        for name, features in contenders
        if length == "64" or name not in QUADRATIC - {"sdpa"}
    }
    found = Counter((row["threads"], row["length"], row["attn"], row["num_features"]) for row in rows)
    rivals = {key for key in found if key[2] in RIVALS}
    causal = {"sdpa", bench.FUNCTION} | {name for name in ATTENTIONS.names() if ATTENTIONS.get(name).has_causal_form}
    passes = {key: 4 if key[2] in causal else 2 for key in expected}
    passes |= {key: 5 for key in expected if key[2] in ("sdpa", bench.FUNCTION)}
    assert {key: found[key] for key in found.keys() - rivals} == passes
    directions = Counter(row["direction"] for row in rows if row["attn"] in causal)
    assert directions.pop("one token") == sum(key[2] in ("sdpa", bench.FUNCTION) for key in expected)
    every = ("forward", "forward+backward", "causal forward", "causal forward+backward")
    assert directions == dict.fromkeys(every, sum(key[2] in causal for key in expected))
    for row in rows:
        assert float(row["milliseconds"]) > 0
        assert float(row["peak_memory_mb"]) > 0
        registered = row["attn"] in ATTENTIONS.names()
        needs_kernel = row["attn"] == bench.FUNCTION or (registered and ATTENTIONS.get(row["attn"]).needs_kernel)
        assert row["dotf"] == ("exp" if needs_kernel else "")
        assert float(row["speedup_vs_sdpa"]) > 0
        of_its_own = registered and not row["dotf"] and row["attn"] not in QUADRATIC - {"gaussian"}
        bound = math.inf if of_its_own else 1e-4 if row["attn"] in QUADRATIC else 1
        assert math.isfinite(float(row["relative_error"]))
        assert float(row["relative_error"]) <= bound


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
        bench._time([(what | {"attn": name}, list) for name in ("sdpa", "a", "b")], "sdpa", 3, torch.device("cpu"))
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


def test_one_training_step_is_timed_where_asked(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "STEP_LENGTH", 64)
    monkeypatch.setattr(bench, "STEP_BATCH", 2)
    only_step = dataclasses.replace(params, bench=BenchParams(lengths=[], repeats=1, step=["rmfa"]))
    bench.run(only_step, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["attn"], row["direction"], row["batch"]) for row in rows] == [
        ("softmax", "training step", "2"),
        ("rmfa", "training step", "2"),
    ]


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_a_rival_estimates_softmax_attention(name: str) -> None:
    """Within 0.2, where the error of an output of zeros is 1; both draw from a fixed seed."""
    device = torch.device("cpu")
    found = {r.name: r for r in installed_rivals(heads=2, head_dim=32, num_features=64, device=device)}
    if name not in found:
        pytest.skip(f"{name} is not installed")
    query, key, value = bench._inputs(bench.Shape(), 128, device)
    truth = F.scaled_dot_product_attention(query, key, value)
    error = (found[name].attend(query, key, value) - truth).norm() / truth.norm()
    assert error.item() < 0.2
