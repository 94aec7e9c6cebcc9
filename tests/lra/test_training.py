"""Training: killed and resumed it gives the same bits, the best dev result wins, and bad runs end with a reason."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from schoenbat.errors import TrainingFailed, TrainingStopped, UserError
from schoenbat.lra import training
from schoenbat.lra.data.arrays import IGNORED, Dataset, batches, write_dataset
from schoenbat.lra.encoder import Classifier, ModelConfig, build_model
from schoenbat.lra.multihead import FormerConfig
from schoenbat.lra.training import (
    Evaluation,
    FitResult,
    OtherCheckpoint,
    TrainingConfig,
    evaluate,
    fit,
    load_model,
    predict,
    save_model,
)

CPU = torch.device("cpu")
CONFIG = TrainingConfig(batch_size=8, learning_rate=3e-3, warmup_steps=5, steps=60, eval_every=7)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Texts in which label 1 has more of token 5."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 130)
    docs = [
        np.where(rng.random(rng.integers(5, 40)) < 0.2 + 0.5 * label, 5, rng.integers(1, 9)).astype(np.uint8)
        for label in labels
    ]
    rows = np.arange(130, dtype=np.int32)[:, None]
    splits = {
        name: (rows[part], labels[part].astype(np.int64))
        for name, part in (("train", slice(0, 90)), ("dev", slice(90, 110)), ("test", slice(110, 130)))
    }
    folder = tmp_path_factory.mktemp("data") / "toy"
    meta = {"task": "toy", "num_classes": 2, "vocab_size": 9, "num_texts": 1, "max_length": 64}
    write_dataset(folder, docs, splits, {**meta, "label": "toy", "source": "drawn", "notes": []})
    return Dataset(folder)


def model(seed: int = 0) -> Classifier:
    return build_model(
        vocab_size=9,
        num_classes=2,
        num_texts=1,
        max_length=64,
        model=ModelConfig(num_layers=1, width=8, ffn_width=8, num_heads=2, dropout=0.2, head_width=8),
        attn="rmfa",
        attention={"num_features": 16},
        dotf="exp",
        former="maclauformer",
        former_config=FormerConfig(),
        seed=seed,
    )


def train(
    dataset: Dataset, checkpoint: Path | None = None, config: TrainingConfig = CONFIG, **callbacks: Any
) -> tuple[Classifier, FitResult]:
    net = model()
    result = fit(net, dataset, config, seed=3, device=CPU, checkpoint=checkpoint, fingerprint="a", **callbacks)
    return net, result


class Killed(BaseException):
    """Ends a run at once, as a signal would."""


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_resumed_run_is_bit_for_bit_the_undisturbed_one(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int | None
) -> None:
    config = replace(CONFIG, micro_batch=micro_batch)
    undisturbed, expected = train(dataset, config=config)
    # A checkpoint after every step, so that runs also stop between two evaluations.
    monkeypatch.setattr("schoenbat.lra.training.CHECKPOINT_SECONDS", 0.0)
    checkpoint = tmp_path / "last.pt"
    for stop in (3, 7, 26, 41, 59):

        def on_step(report: Any, stop: int = stop) -> None:
            if report.step >= stop:
                raise Killed

        with pytest.raises(Killed):
            train(dataset, checkpoint, config, on_step=on_step)
    seen: list[Evaluation] = []
    resumed, result = train(dataset, checkpoint, config, on_evaluation=seen.append)
    assert result.resumed == 5
    assert result.evaluations == expected.evaluations
    assert (result.best_step, result.final_train_loss) == (expected.best_step, expected.final_train_loss)
    assert result.tokens == expected.tokens
    assert len(seen) < len(expected.evaluations)
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_run_asked_to_stop_ends_after_that_step_and_goes_on_to_the_same_bits(
    dataset: Dataset, tmp_path: Path
) -> None:
    """At a step of its own, at one with a report (10) and at one with an evaluation (49)."""
    undisturbed, expected = train(dataset)
    checkpoint = tmp_path / "last.pt"
    done = 0
    for step in (3, 10, 49):
        asked: list[None] = []

        def stop(asked: list[None] = asked, left: int = step - done) -> bool:
            asked.append(None)
            return len(asked) == left

        with pytest.raises(TrainingStopped, match=f"stopped at step {step} of 60") as stopped:
            train(dataset, checkpoint, stop=stop)
        done = stopped.value.step
        assert done == step
    resumed, result = train(dataset, checkpoint, stop=lambda: False)
    assert result.resumed == 3
    assert result.evaluations == expected.evaluations
    assert (result.best_step, result.final_train_loss) == (expected.best_step, expected.final_train_loss)
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_run_is_not_stopped_when_it_is_done_and_needs_no_checkpoint_to_stop(dataset: Dataset) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(len(asked) + 1)
        return len(asked) >= CONFIG.steps

    _, result = train(dataset, stop=stop)
    assert result.steps_run == CONFIG.steps
    assert asked == list(range(1, CONFIG.steps))
    with pytest.raises(TrainingStopped, match="stopped at step 1 of 60"):
        train(dataset, stop=lambda: True)


def test_run_that_stopped_at_its_end_only_reports(dataset: Dataset, tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.pt"
    _, first = train(dataset, checkpoint)
    _, again = train(dataset, checkpoint)
    assert again.evaluations == first.evaluations
    assert again.steps_run == CONFIG.steps


def test_best_weights_are_those_of_the_best_dev_accuracy_after_the_first_fifth(dataset: Dataset) -> None:
    net, result = train(dataset)
    eligible = [row for row in result.evaluations if row.step >= 0.2 * CONFIG.steps]
    assert result.best_dev_accuracy == max(row.dev_accuracy for row in eligible)
    assert result.best_step == next(row.step for row in eligible if row.dev_accuracy == result.best_dev_accuracy)
    score = evaluate(net, dataset, "dev", batch_size=8, device=CPU)
    assert score.accuracy == result.best_dev_accuracy
    assert score.loss == pytest.approx(result.best_dev_loss, abs=1e-9)


def test_the_first_of_the_best_after_a_fifth_of_the_steps_is_kept(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 7 of 60 is too early, 14 is not."""
    scripted = iter([0.9, 0.8, 0.7, 0.8, *[0.1] * 5])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: training.Score(0.5, next(scripted), 20))
    _, result = train(dataset)
    assert [row.step for row in result.evaluations][:4] == [7, 14, 21, 28]
    assert (result.best_step, result.best_dev_accuracy) == (14, 0.8)


@pytest.mark.parametrize("found", [[0.5, 0.9], [0.5, 0.6, 0.4, 0.9]])
def test_training_stops_at_the_first_evaluation_that_finds_enough(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: list[float]
) -> None:
    """The first case ends before the first fifth of the steps is over, from which on weights are kept."""
    scripted = iter(found)
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: training.Score(0.5, next(scripted), 20))
    config, checkpoint = replace(CONFIG, eval_every=4, stop_at_accuracy=0.9), tmp_path / "last.pt"
    net, result = train(dataset, checkpoint, config)
    assert result.steps_run == result.best_step == 4 * len(found)
    assert [row.dev_accuracy for row in result.evaluations] == found
    again, resumed = train(dataset, checkpoint, config)
    assert (resumed.steps_run, resumed.evaluations) == (result.steps_run, result.evaluations)
    assert all(map(torch.equal, net.state_dict().values(), again.state_dict().values()))


def test_it_learns(dataset: Dataset) -> None:
    _, result = train(dataset)
    assert result.best_dev_accuracy >= 0.8


def test_evaluation_counts_every_example_once_whatever_the_batch(dataset: Dataset) -> None:
    net = model()
    scores = [evaluate(net, dataset, "test", batch_size=size, device=CPU) for size in (1, 7, 20, 64)]
    assert {score.examples for score in scores} == {20}
    assert len({score.accuracy for score in scores}) == 1
    assert max(score.loss for score in scores) == pytest.approx(min(score.loss for score in scores), abs=1e-5)


def test_predictions_add_up_to_the_score_whatever_the_batch(dataset: Dataset) -> None:
    net = model()
    score = evaluate(net, dataset, "test", batch_size=7, device=CPU)
    for size in (1, 7, 64):
        found = predict(net, dataset, "test", batch_size=size, device=CPU)
        assert found.predicted is not None
        assert ((found.predicted == dataset.labels("test")) == found.correct.astype(bool)).all()
        assert found.score().accuracy == score.accuracy
        assert found.score().loss == pytest.approx(score.loss, abs=1e-5)
        assert found.score().examples == score.examples


def test_checkpoint_of_another_configuration_is_refused_and_kept(dataset: Dataset, tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.pt"
    train(dataset, checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(OtherCheckpoint, match="belongs to another configuration"):
        fit(model(), dataset, CONFIG, seed=3, device=CPU, checkpoint=checkpoint, fingerprint="b")
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_checkpoint_is_named(dataset: Dataset, tmp_path: Path, damage: str) -> None:
    checkpoint = tmp_path / "last.pt"
    train(dataset, checkpoint)
    content = checkpoint.read_bytes()
    checkpoint.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"x" * 100, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"last\.pt cannot be read as a checkpoint"):
        train(dataset, checkpoint)


def test_loss_that_is_not_a_number_ends_the_run_with_its_step(dataset: Dataset, tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        net.head[0].weight[0, 0] = float("nan")
    checkpoint = tmp_path / "last.pt"
    with pytest.raises(TrainingFailed, match="loss is nan at step 1 of 60"):
        fit(net, dataset, CONFIG, seed=3, device=CPU, checkpoint=checkpoint)
    assert not checkpoint.exists()


def test_batch_larger_than_the_training_set_is_refused(dataset: Dataset) -> None:
    config = TrainingConfig(batch_size=91, learning_rate=1e-3, warmup_steps=2, steps=5, eval_every=5)
    with pytest.raises(UserError, match="batch_size 91 is more than the 90 examples of train"):
        fit(model(), dataset, config, seed=0, device=CPU)


def test_saved_model_comes_back_with_its_description(tmp_path: Path) -> None:
    net = model()
    save_model(tmp_path / "best.pt", net, {"cell": "x", "steps": 3})
    state, description = load_model(tmp_path / "best.pt")
    assert description == {"cell": "x", "steps": 3}
    assert set(state) == set(net.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt"]


def test_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    torch.save({"something": 1}, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt is not a model saved by this program"):
        load_model(tmp_path / "best.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"warmup_steps": 1}, r"warmup_steps must lie in \[2, 60\)"),
        ({"warmup_steps": 60}, r"warmup_steps must lie in \[2, 60\)"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"stop_at_accuracy": 95}, r"stop_at_accuracy must lie in \(0, 1\], not 95"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {"batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 5, "steps": 60, "eval_every": 7}
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """At some positions of a text, never the first: which token stands just before?"""
    rng = np.random.default_rng(1)
    docs, labels = [], np.full((150, 24), IGNORED)
    for row in range(150):
        docs.append(rng.integers(1, 5, rng.integers(6, 25)))
        asked = 1 + rng.choice(len(docs[-1]) - 1, size=int(rng.integers(1, 5)), replace=False)
        labels[row, asked] = docs[-1][asked - 1] - 1
    rows = np.arange(150)[:, None]
    splits = {
        name: (rows[part], labels[part])
        for name, part in (("train", slice(0, 100)), ("dev", slice(100, 125)), ("test", slice(125, 150)))
    }
    folder = tmp_path_factory.mktemp("data") / "copies"
    shape = {"num_classes": 4, "vocab_size": 5, "num_texts": 1, "max_length": 24}
    declared = {"per_position": True, "causal": True, "pad_to_multiple": 8}
    meta = {"task": "copies", **shape, **declared, "label": "copies", "source": "drawn", "notes": []}
    write_dataset(folder, docs, splits, meta)
    return Dataset(folder)


def model_of_positions(dropout: float = 0.0) -> Classifier:
    return build_model(
        vocab_size=5,
        num_classes=4,
        num_texts=1,
        max_length=24,
        model=ModelConfig(num_layers=1, width=32, ffn_width=32, num_heads=2, dropout=dropout, head_width=32),
        attn="softmax",
        attention={},
        dotf=None,
        former="transformer",
        former_config=FormerConfig(),
        seed=0,
        per_position=True,
        causal=True,
    )


def test_labels_at_positions_are_learned(copies: Dataset) -> None:
    net = model_of_positions()
    config = TrainingConfig(batch_size=20, learning_rate=1e-2, warmup_steps=20, steps=400, eval_every=100)
    result = fit(net, copies, config, seed=0, device=CPU)
    assert result.best_dev_accuracy >= 0.9


def test_scores_are_means_over_the_labels_and_not_over_examples(copies: Dataset) -> None:
    """Against a loop over all positions, whatever the size of a batch."""
    net = model_of_positions().eval()
    losses, hits = [], []
    for indices in batches(copies, "test", 1, seed=None):
        batch = copies.batch("test", indices)
        probabilities = net(batch.tokens, batch.key_mask)[0].softmax(-1).detach()
        for position, label in enumerate(batch.labels[0].tolist()):
            if label != IGNORED:
                losses.append(-float(probabilities[position, label].log()))
                hits.append(int(probabilities[position].argmax()) == label)
    assert len(losses) > 25
    for size in (1, 7, 25):
        score = evaluate(net, copies, "test", batch_size=size, device=CPU)
        assert score.loss == pytest.approx(np.mean(losses), abs=1e-5)
        assert score.accuracy == np.mean(hits)
        assert score.examples == 25
        found = predict(net, copies, "test", batch_size=size, device=CPU)
        assert found.predicted is None
        assert (found.targets == (copies.labels("test") != IGNORED).sum(1)).all()
        assert found.score().accuracy == np.mean(hits)
        assert found.score().loss == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 20])
@pytest.mark.parametrize("positions", [False, True])
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    dataset: Dataset, copies: Dataset, micro_batch: int, positions: bool
) -> None:
    """Ten steps without dropout in float64: weights and curve agree far below the size of a step."""

    def run(size: int | None) -> tuple[FitResult, dict[str, torch.Tensor]]:
        net = (model_of_positions() if positions else model()).double()
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        config = TrainingConfig(
            batch_size=20, learning_rate=1e-2, warmup_steps=2, steps=10, eval_every=5, micro_batch=size
        )
        return fit(net, copies if positions else dataset, config, seed=0, device=CPU), net.state_dict()

    (whole, expected), (pieces, found) = run(None), run(micro_batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    for one, other in zip(whole.evaluations, pieces.evaluations, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=1e-5)
        assert one.dev_accuracy == other.dev_accuracy
        assert one.train_accuracy == pytest.approx(other.train_accuracy, abs=1e-6)
    assert pieces.tokens <= whole.tokens


@pytest.mark.parametrize("limit", [1, 130, 10**6])
def test_where_nothing_is_said_a_batch_is_worked_through_as_many_tokens_at_a_time_as_the_cache_holds(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setitem(training.TOKENS_AT_ONCE, "cpu", limit)
    net = model()
    seen: list[int] = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()) if net.training else None)
    fit(net, dataset, CONFIG, seed=3, device=CPU)
    longest = max(len(dataset.batch("train", np.array([i])).tokens[0, 0]) for i in range(90))
    assert max(seen) <= max(limit, longest)
    assert (len(seen) == CONFIG.steps) == (limit == 10**6)


def test_dropout_differs_between_micro_batches(dataset: Dataset) -> None:
    one, same, other = (train(dataset, config=replace(CONFIG, micro_batch=size))[0] for size in (4, 4, 8))
    assert torch.equal(one.head[0].weight, same.head[0].weight)
    assert not torch.equal(one.head[0].weight, other.head[0].weight)


class Steep(torch.nn.Module):
    """A model whose gradients are often beyond the value at which they are clipped; it notes each state of torch's
    generator that its dropout is drawn from."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model().double()
        self.drawn_from: list[torch.Tensor] = []

    def forward(self, tokens: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.drawn_from.append(torch.get_rng_state())
        return 20 * self.inner(tokens, key_mask)


def test_steps_are_those_of_a_loop_of_plain_torch(dataset: Dataset) -> None:
    """AdamW, one linear cycle of the learning rate, gradients clipped by value, and dropout drawn anew in each step."""
    config = TrainingConfig(batch_size=45, learning_rate=0.02, warmup_steps=3, steps=8, eval_every=8)
    trained, plain = Steep(), Steep()
    fit(trained, dataset, config, seed=3, device=CPU)
    assert len({bytes(state.tolist()) for state in trained.drawn_from}) == 8, "the same units are dropped in two steps"

    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    rates = np.interp(range(8), [0, 2, 7], [0.02 / 25, 0.02, 0.02 / 25 / 1e4])
    order = [indices for epoch in range(4) for indices in batches(dataset, "train", 45, seed=3, epoch=epoch)]
    largest = []
    for rate, indices, state in zip(rates, order, trained.drawn_from, strict=True):
        batch = dataset.batch("train", indices)
        torch.set_rng_state(state)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(batch.tokens, batch.key_mask).float(), batch.labels).backward()
        gradients = [p.grad for p in plain.parameters() if p.grad is not None]
        largest.append(max(float(gradient.abs().max()) for gradient in gradients))
        for gradient in gradients:
            gradient.clamp_(-1, 1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert min(largest[:4]) > 1, "nothing was clipped"
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=0, atol=1e-6)
