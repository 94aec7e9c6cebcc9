"""A cell on the GPU: it learns what the CPU learns, in bfloat16 around float32 attention, and no step makes it wait."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_device import DEVICE, ON_GPU, wait
from torch import Tensor, nn

from schoenbat.attention import ATTENTIONS
from schoenbat.errors import TrainingStopped
from schoenbat.lra.data.arrays import Dataset, write_dataset
from schoenbat.lra.encoder import Classifier, ModelConfig, build_model
from schoenbat.lra.multihead import FormerConfig, SelfAttention
from schoenbat.lra.training import REPORT_EVERY, FitResult, StepReport, TrainingConfig, fit

pytestmark = pytest.mark.gpu

SIZES = ModelConfig(num_layers=1, width=32, ffn_width=64, num_heads=2, dropout=0.1, head_width=32)
CONFIG = TrainingConfig(batch_size=8, learning_rate=3e-3, warmup_steps=4, steps=40, eval_every=20)
META = {"task": "made-up", "num_classes": 2, "vocab_size": 20, "num_texts": 1, "max_length": 64}

every_mechanism = pytest.mark.parametrize("attn", ATTENTIONS.names())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Texts of different lengths of tokens 1 to 10, or of 6 to 15: which of the two is the label."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 512)
    docs = [generator.integers(1, 11, size) + 5 * label for size, label in zip(range(9, 521), labels, strict=True)]
    order = generator.permutation(512)
    parts = {"train": order[:384], "dev": order[384:448], "test": order[448:]}
    folder = tmp_path_factory.mktemp("data") / "set"
    write_dataset(folder, docs, {name: (rows[:, None], labels[rows]) for name, rows in parts.items()}, META)
    return Dataset(folder)


def model_with(attn: str, sizes: ModelConfig = SIZES) -> Classifier:
    dotf, former = ("exp", "maclauformer") if ATTENTIONS.get(attn).needs_kernel else (None, "transformer")
    return build_model(
        vocab_size=META["vocab_size"],
        num_classes=META["num_classes"],
        num_texts=META["num_texts"],
        max_length=META["max_length"],
        model=sizes,
        attn=attn,
        attention=None,
        dotf=dotf,
        former=former,
        former_config=FormerConfig(),
        seed=0,
    )


def train(
    attn: str,
    dataset: Dataset,
    config: TrainingConfig = CONFIG,
    *,
    sizes: ModelConfig = SIZES,
    device: torch.device = DEVICE,
    checkpoint: Path | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Classifier, FitResult]:
    model = model_with(attn, sizes)
    result = fit(model, dataset, config, seed=0, device=device, checkpoint=checkpoint, on_step=on_step, stop=stop)
    return model, result


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in model.state_dict().items()}


def are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_mechanism
def test_the_host_waits_for_no_step_between_two_reports(attn: str, dataset: Dataset) -> None:
    steps = 0

    def allow_the_fetch() -> bool:
        # Asked after each step but the last, and before the losses are fetched.
        nonlocal steps
        steps += 1
        if steps % REPORT_EVERY == 0 or steps == CONFIG.steps - 1:
            wait(allowed=True)
        return False

    def forbid(report: StepReport) -> None:
        wait(allowed=report.step == report.steps)

    train(attn, dataset, dataclasses.replace(CONFIG, eval_every=CONFIG.steps), on_step=forbid, stop=allow_the_fetch)
    assert steps == CONFIG.steps - 1


def test_batches_are_made_on_the_gpu_and_are_those_of_the_cpu(dataset: Dataset) -> None:
    rows = np.array([3, 100, 7])
    expected, found = dataset.batch("train", rows), dataset.on(DEVICE).batch("train", rows)
    assert found.num_labels == expected.num_labels
    for name in ("tokens", "key_mask", "labels"):
        assert getattr(found, name).device == DEVICE
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name))


@every_mechanism
def test_attention_is_in_float32_inside_bfloat16(attn: str, dataset: Dataset) -> None:
    model = model_with(attn)
    seen: dict[str, set[torch.dtype]] = {"attention": set(), "projection": set()}
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attention.register_forward_hook(
                lambda _, inputs, out: seen["attention"].update({*(x.dtype for x in inputs[:3]), out.dtype})
            )
            module.project_in.register_forward_hook(lambda _, inputs, out: seen["projection"].add(out.dtype))
    fit(model, dataset, dataclasses.replace(CONFIG, steps=5, eval_every=5), seed=0, device=DEVICE)
    around = torch.bfloat16 if ON_GPU else torch.float32
    assert seen == {"attention": {torch.float32}, "projection": {around}}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@every_mechanism
def test_a_model_learns_on_the_gpu_what_it_learns_on_the_cpu(attn: str, dataset: Dataset) -> None:
    # Dropout draws other units there.
    sizes = dataclasses.replace(SIZES, dropout=0.0)
    (_, there), (_, here) = (train(attn, dataset, sizes=sizes, device=d) for d in (DEVICE, torch.device("cpu")))
    for found, expected in zip(there.evaluations, here.evaluations, strict=True):
        assert found.train_loss == pytest.approx(expected.train_loss, abs=0.05)
        assert found.dev_loss == pytest.approx(expected.dev_loss, abs=0.05)
    assert there.best_dev_accuracy >= 0.95


@every_mechanism
def test_a_resumed_run_ends_with_the_same_bytes_where_runs_repeat_themselves(
    attn: str, dataset: Dataset, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    config = dataclasses.replace(CONFIG, steps=14, eval_every=7)
    whole, _ = train(attn, dataset, config)
    again, _ = train(attn, dataset, config)
    repeats = are_equal(state_of(whole), state_of(again))
    record_property("repeats", repeats)
    calls = iter(range(1, config.steps))
    with pytest.raises(TrainingStopped):
        train(attn, dataset, config, checkpoint=tmp_path / "last.pt", stop=lambda: next(calls) == 9)
    resumed, result = train(attn, dataset, config, checkpoint=tmp_path / "last.pt")
    assert result.resumed == 1
    if attn in ("rmfa", "rmfa-sketch") or not ON_GPU:
        assert repeats
    if repeats:
        assert are_equal(state_of(whole), state_of(resumed))
    else:
        # Sums whose order is the GPU's choice, as in the backward pass of torch's fused softmax.
        for name, value in state_of(whole).items():
            torch.testing.assert_close(state_of(resumed)[name], value, rtol=0.05, atol=0.01)


def test_a_cell_is_trained_and_tested_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from project_folder import Project

    from pipeline.stages import commands

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    project = Project(tmp_path)
    project.set("task.lra-listops.training.steps", 60)
    project.add_code()
    cell = ["--task", "lra-listops", "--attn", "rmfa", "--dotf", "exp", "--former", "maclauformer", "--seed", "0"]
    for command in (["download", *cell[:2]], ["preprocess", *cell[:2]], ["train", *cell], ["eval", *cell]):
        where = ["--device", str(DEVICE)] if command[0] in ("train", "eval") else []
        assert commands.run_command([*command, *where]) == 0, command
    name = "lra-listops-rmfa-exp-maclauformer-0"
    metrics, test = (json.loads((tmp_path / "runs/tiny" / name / f"{f}.json").read_text()) for f in ("metrics", "test"))
    resources = json.loads((tmp_path / "checkpoints/tiny" / name / "resources.json").read_text())
    assert metrics["device"].startswith(str(DEVICE))
    assert resources["device"] == metrics["device"]
    assert resources["peak_memory_mb"] > 0
    assert np.isfinite([metrics["final_train_loss"], test["loss"]]).all()
    assert test["examples"] == 16
