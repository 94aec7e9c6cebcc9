"""What it takes to recall: the published normalisation keeps the kernel flat, a gain on its argument sharpens it."""

import pytest
import torch

from schoenbat.data.arrays import Dataset
from schoenbat.nn.encoder import ModelConfig, build_model
from schoenbat.nn.multihead import FormerConfig
from schoenbat.tasks import TASKS
from schoenbat.training import TrainingConfig, evaluate, fit


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two pairs of 16 symbols in 16 positions; guessing among the values present gives 50 %."""
    task = TASKS.get("recall-mqar")
    folder = tmp_path_factory.mktemp("data")
    config = task.Config(max_length=16, num_pairs=2, num_symbols=16, train_size=20_000, dev_size=200, test_size=1000)
    task(config).prepare(folder, folder / "set")
    return Dataset(folder / "set")


def accuracy(dataset: Dataset, gain: float) -> float:
    net = build_model(
        **{key: dataset.meta[key] for key in ("vocab_size", "num_classes", "num_texts", "max_length")},
        model=ModelConfig(dropout=0.0),
        attn="kernelized",
        attention={},
        dotf="exp",
        former="maclauformer",
        former_config=FormerConfig(gain=gain),
        seed=0,
        per_position=True,
        causal=True,
    )
    config = TrainingConfig(batch_size=64, learning_rate=2e-3, warmup_steps=40, steps=400, eval_every=200)
    fit(net, dataset, config, seed=0, device=torch.device("cpu"))
    return evaluate(net, dataset, "test", batch_size=64, device=torch.device("cpu")).accuracy


def test_between_pre_and_post_sbn_the_kernel_exp_recalls_with_a_gain_and_guesses_without(dataset: Dataset) -> None:
    assert accuracy(dataset, gain=32.0) > 0.95
    assert accuracy(dataset, gain=1.0) < 0.62
