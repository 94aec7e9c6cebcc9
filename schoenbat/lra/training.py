"""Train a classifier and score it. What happens in a run is a pure function of (model, data, config, seed).

Data order comes from (seed, epoch) and dropout from (seed, step), so a run that is killed and resumed from its
checkpoint goes on exactly as if nothing had happened.
"""

import io
import math
import pickle
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schoenbat.errors import TrainingFailed, TrainingStopped, UserError
from schoenbat.files import write_bytes
from schoenbat.lra.data.arrays import IGNORED, Batch, Dataset, batches
from schoenbat.registry import check_bounds

CHECKPOINT_SECONDS = 30.0
BEST_AFTER = 0.2
"""The best checkpoint is looked for after this share of the steps."""
CLIP_VALUE = 1.0
REPORT_EVERY = 10
"""Losses are fetched from the device, checked and reported once in so many steps."""
TOKENS_AT_ONCE = {"cpu": 2**15}
"""Tokens worked through at a time where `micro_batch` is null: on a CPU, activations of more leave the cache."""


class OtherCheckpoint(UserError):
    """A checkpoint is of another configuration; nothing was changed."""


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation of one task.

    Attributes:
        batch_size: examples of an update.
        learning_rate: the highest of the one-cycle schedule.
        warmup_steps: updates up to it.
        steps: updates in all.
        eval_every: updates between two evaluations on dev; the weights of the best one are kept.
        micro_batch: a batch is worked through so many examples at a time, each time padded to their own longest text
            only, and the gradients are added up; null for as many as have 32,768 tokens on a CPU, for all elsewhere.
            Without dropout the update is the same up to rounding; with it, other units are dropped.
        stop_at_accuracy: training ends at the first evaluation that finds so much on dev, as a share; null to go on
            to the last step.
    """

    batch_size: int
    learning_rate: float
    warmup_steps: int
    steps: int
    eval_every: int
    micro_batch: int | None = None
    stop_at_accuracy: float | None = None

    def __post_init__(self) -> None:
        check_bounds(self, batch_size=(1, 10**6), steps=(1, 10**9), eval_every=(1, 10**9), micro_batch=(1, 10**6))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, not {self.learning_rate}")
        if self.stop_at_accuracy is not None and not 0 < self.stop_at_accuracy <= 1:
            raise ValueError(f"stop_at_accuracy must lie in (0, 1], not {self.stop_at_accuracy}")
        # OneCycleLR divides by warmup_steps - 1.
        if not 2 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must lie in [2, {self.steps}), not {self.warmup_steps}")


@dataclass(frozen=True)
class StepReport:
    """The progress of a run: mean loss and accuracy since the last evaluation, speed of this process."""

    step: int
    steps: int
    loss: float
    accuracy: float
    steps_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """One row of the learning curve; `train_*` are means since the previous row."""

    step: int
    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    dev_loss: float
    dev_accuracy: float


@dataclass(frozen=True)
class Score:
    """Means over the labels of a split: one an example, or those of all positions that have one."""

    loss: float
    accuracy: float
    examples: int


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for every example of a split, in its order; a target is a label that is to be predicted.

    Attributes:
        correct: int64 [n], how many targets of the example are predicted rightly.
        targets: int64 [n], how many it has: 1, or the positions with a label.
        log_probability: float64 [n], of the true labels, the mean over the targets of the example.
        predicted: int64 [n], the class; None where labels are per position.
    """

    correct: np.ndarray
    targets: np.ndarray
    log_probability: np.ndarray
    predicted: np.ndarray | None

    def score(self) -> Score:
        """Return the means over all targets."""
        total = int(self.targets.sum())
        return Score(
            loss=-float((self.log_probability * self.targets).sum()) / total,
            accuracy=int(self.correct.sum()) / total,
            examples=len(self.targets),
        )


@dataclass
class FitResult:
    """The result of a run. `seconds`, `tokens` and `steps_run` count training only, over all processes of the run."""

    best_step: int
    best_dev_accuracy: float
    best_dev_loss: float
    evaluations: list[Evaluation]
    final_train_loss: float
    seconds: float
    steps_run: int
    tokens: int
    resumed: int
    peak_memory_mb: float


@dataclass
class _Progress:
    """The part of a run's state that is not in model, optimiser or schedule."""

    step: int = 0
    best_step: int = -1
    best_state: dict[str, Tensor] | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    # Per-step values since the last evaluation, kept one by one: a sum would depend on where it was interrupted.
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    final_train_loss: float = float("nan")
    seconds: float = 0.0
    tokens: int = 0
    resumed: int = 0

    def best(self) -> Evaluation:
        return next(row for row in self.evaluations if row.step == self.best_step)


def fit(
    model: nn.Module,
    dataset: Dataset,
    config: TrainingConfig,
    *,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    fingerprint: str = "",
    on_step: Callable[[StepReport], None] | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Train `model` in place and leave its best weights in it.

    AdamW (betas 0.9 and 0.999, eps 1e-6, no weight decay), OneCycleLR with linear phases, gradients clipped by value
    at 1; best dev accuracy after the first fifth of the steps decides, the earlier one in a tie, unless one at which
    training stops comes before. On CUDA, bfloat16 autocast.

    Args:
        checkpoint: where to keep the state of the run; resumed from if it exists, and left there at the end.
        fingerprint: identifies the configuration; a checkpoint with another one is refused.
        on_evaluation: called for each new evaluation, before the checkpoint that contains it is written, so a killed
            process may report one twice but never loses one.
        stop: asked after each step but the last; when it says True, the checkpoint is written and the run ends.

    Raises:
        TrainingFailed: the loss is not finite.
        TrainingStopped: `stop` said so.
        OtherCheckpoint: `checkpoint` is of another configuration.
        UserError: it is unreadable.
    """
    run = _Run(model, dataset.on(device), config, seed, device, checkpoint, fingerprint)
    state = run.state
    for epoch, indices in _remaining_batches(dataset, config.batch_size, seed, state.step, config.steps):
        if run.has_learned():
            break
        learning_rate = float(run.schedule.get_last_lr()[0])
        run.update(indices)
        evaluated = state.step % config.eval_every == 0 or state.step == config.steps
        stopping = stop is not None and state.step < config.steps and stop()
        due = stopping or time.perf_counter() - run.saved_at > CHECKPOINT_SECONDS
        if evaluated or due or len(run.pending) >= REPORT_EVERY:
            run.fetch()
            if on_step is not None:
                on_step(run.report())
        if evaluated:
            with run.clock_stopped():
                row = run.evaluate(epoch, learning_rate)
                if on_evaluation is not None:
                    on_evaluation(row)
        if evaluated or due:
            run.save()
        if stopping:
            raise TrainingStopped(state.step, config.steps)
    return run.result()


class _Run:
    """The state of `fit`: the model with optimiser and schedule, and how far they have come.

    Attributes:
        pending: loss and accuracy of the last steps, still on the device.
        saved_at: when the checkpoint was last written.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: TrainingConfig,
        seed: int,
        device: torch.device,
        checkpoint: Path | None,
        fingerprint: str,
    ) -> None:
        self.model, self.dataset, self.config, self.seed, self.device = model.to(device), dataset, config, seed, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, eps=1e-6, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=config.learning_rate,
            total_steps=config.steps,
            pct_start=config.warmup_steps / config.steps,
            anneal_strategy="linear",
            cycle_momentum=False,
        )
        self.state = _Progress()
        self.pending: list[Tensor] = []
        self._checkpoint, self._fingerprint = checkpoint, fingerprint
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        self._first_step, self._spent_before = self.state.step, self.state.seconds
        self._began = self.saved_at = time.perf_counter()

    def _resume(self, checkpoint: Path) -> None:
        saved = _read_checkpoint(checkpoint)
        if saved["fingerprint"] != self._fingerprint:
            raise OtherCheckpoint(f"{checkpoint} belongs to another configuration; move it away to start over")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        evaluations = [Evaluation(**row) for row in saved["progress"]["evaluations"]]
        self.state = _Progress(**{**saved["progress"], "evaluations": evaluations})
        self.state.resumed += 1

    def save(self) -> None:
        """Write the checkpoint, if there is to be one."""
        if self._checkpoint is not None:
            progress = {f.name: getattr(self.state, f.name) for f in fields(self.state)}
            progress["evaluations"] = [asdict(row) for row in self.state.evaluations]
            saved = {
                "fingerprint": self._fingerprint,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "progress": progress,
            }
            write_torch(self._checkpoint, saved)
        self.saved_at = time.perf_counter()

    def update(self, indices: np.ndarray) -> None:
        """Make one step of the optimiser on these training examples."""
        self.model.train()
        parts = self._cut(indices)
        # Dropout is the only user of torch's global generator here.
        torch.manual_seed((self.seed * 1_000_003 + self.state.step) % 2**63)
        self.optimizer.zero_grad(set_to_none=True)
        figures = add_gradients(self.model, parts, self.device)
        nn.utils.clip_grad_value_(self.model.parameters(), CLIP_VALUE)
        self.optimizer.step()
        self.schedule.step()
        self.state.step += 1
        self.state.tokens += sum(part.tokens.numel() for part in parts)
        self.pending.append(figures)

    def _cut(self, indices: np.ndarray) -> list[Batch]:
        """Cut the batch into the parts that are worked through one after another."""
        size = self.config.micro_batch
        if size is None:
            whole = self.dataset.batch("train", indices)
            size = examples_at_once(whole.tokens, self.device)
            if size == len(indices):
                return [whole]
        return [self.dataset.batch("train", indices[start : start + size]) for start in range(0, len(indices), size)]

    def fetch(self) -> None:
        """Take the pending figures from the device; raises TrainingFailed where a loss is not finite."""
        state = self.state
        fetched = torch.stack(self.pending).tolist()
        for offset, (loss, accuracy) in enumerate(fetched):
            if not math.isfinite(loss):
                at = state.step - len(fetched) + 1 + offset
                raise TrainingFailed(f"loss is {loss} at step {at} of {self.config.steps}")
            state.losses.append(loss)
            state.accuracies.append(accuracy)
        self.pending.clear()
        state.seconds = self._spent_before + time.perf_counter() - self._began

    def report(self) -> StepReport:
        state = self.state
        return StepReport(
            step=state.step,
            steps=self.config.steps,
            loss=float(np.mean(state.losses)),
            accuracy=float(np.mean(state.accuracies)),
            steps_per_second=(state.step - self._first_step) / max(state.seconds - self._spent_before, 1e-9),
        )

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Count the time inside the block as no training time."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped

    def evaluate(self, epoch: int, learning_rate: float) -> Evaluation:
        """Score the dev split, and keep the weights if they are the best so far."""
        state = self.state
        dev = evaluate(self.model, self.dataset, "dev", batch_size=self.config.batch_size, device=self.device)
        row = Evaluation(
            step=state.step,
            epoch=epoch,
            learning_rate=learning_rate,
            train_loss=float(np.mean(state.losses)),
            train_accuracy=float(np.mean(state.accuracies)),
            dev_loss=dev.loss,
            dev_accuracy=dev.accuracy,
        )
        state.final_train_loss = state.losses[-1]
        state.losses, state.accuracies = [], []
        state.evaluations.append(row)
        eligible = state.step >= BEST_AFTER * self.config.steps or self.has_learned()
        if eligible and (state.best_step < 0 or row.dev_accuracy > state.best().dev_accuracy):
            state.best_step = state.step
            state.best_state = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        return row

    def has_learned(self) -> bool:
        """Return whether the last evaluation found the accuracy at which training stops."""
        enough, found = self.config.stop_at_accuracy, self.state.evaluations
        return enough is not None and bool(found) and found[-1].dev_accuracy >= enough

    def result(self) -> FitResult:
        """Leave the best weights in the model, and say how the run went."""
        state = self.state
        assert state.best_state is not None
        self.model.load_state_dict(state.best_state)
        best = state.best()
        return FitResult(
            best_step=best.step,
            best_dev_accuracy=best.dev_accuracy,
            best_dev_loss=best.dev_loss,
            evaluations=state.evaluations,
            final_train_loss=state.final_train_loss,
            seconds=state.seconds,
            steps_run=state.step,
            tokens=state.tokens,
            resumed=state.resumed,
            peak_memory_mb=_peak_memory_mb(self.device),
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int, int], None] | None = None,
) -> Score:
    """Mean loss and accuracy of `model`, without dropout, over every label of a split.

    Args:
        on_batch: called with (examples done, examples in all).
    """
    # Summed on the device, so that it is waited for once and not per batch.
    loss_sum = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    num_labels = 0
    for batch in _in_order(model, dataset, split, batch_size, device, on_batch):
        batch_loss, batch_correct = _score(model, batch, device)
        loss_sum += batch_loss
        correct += batch_correct
        num_labels += batch.num_labels
    examples = dataset.num_examples(split)
    return Score(loss=float(loss_sum) / num_labels, accuracy=int(correct) / num_labels, examples=examples)


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Predict every example of a split with `model`, without dropout.

    Args:
        on_batch: called with (examples done, examples in all).
    """
    tested = _in_order(model, dataset, split, batch_size, device, on_batch)
    parts = [_predict_batch(model, batch, device) for batch in tested]
    correct, targets, log_probability, predicted = (
        torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)
    )
    per_position = dataset.labels(split).ndim == 2
    return Predictions(correct, targets, log_probability.astype(np.float64), None if per_position else predicted)


def save_model(path: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Write weights, random features and a description to `path`, whole or not at all."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    write_torch(path, {"model": state, "description": description})


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the state_dict and description written by `save_model`; raises UserError for a file that is not one."""
    saved = _read_checkpoint(path)
    if not isinstance(saved, dict) or set(saved) != {"model", "description"}:
        raise UserError(f"{path} is not a model saved by this program")
    return saved["model"], saved["description"]


def write_torch(path: Path, content: Any) -> None:
    """Write torch.save to `path`, complete or not at all; raises OSError."""
    # torch.save reports a full disk as a RuntimeError without a reason; writing bytes, as the OSError that it is.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer())


def _read_checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); delete it") from error


def _remaining_batches(
    dataset: Dataset, batch_size: int, seed: int, step: int, steps: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (epoch, indices) of each update from `step` on."""
    # `batches` refuses a split that is smaller than one batch.
    per_epoch = max(1, dataset.num_examples("train") // batch_size)
    while step < steps:
        epoch, skip = divmod(step, per_epoch)
        for position, indices in enumerate(batches(dataset, "train", batch_size, seed=seed, epoch=epoch)):
            if position >= skip and step < steps:
                yield epoch, indices
                step += 1


def _in_order(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int, int], None] | None,
) -> Iterator[Batch]:
    """Yield the batches of a split in order, on `device`, and switch dropout off; `on_batch` is told of each."""
    model.to(device).eval()
    dataset = dataset.on(device)
    total, done = dataset.num_examples(split), 0
    for indices in batches(dataset, split, batch_size, seed=None, epoch=0):
        yield dataset.batch(split, indices)
        done += len(indices)
        if on_batch is not None:
            on_batch(done, total)


def examples_at_once(tokens: Tensor, device: torch.device) -> int:
    """Choose how many examples of a batch [B, num_texts, N] are worked through at a time; at least 1."""
    limit = TOKENS_AT_ONCE.get(device.type)
    return len(tokens) if limit is None else min(len(tokens), max(1, limit // max(1, tokens[0].numel())))


def add_gradients(model: nn.Module, parts: Sequence[Batch], device: torch.device) -> Tensor:
    """Add the gradients of the mean loss over all labels of `parts`; that loss and the accuracy, left on the device."""
    num_labels = sum(part.num_labels for part in parts)
    figures = torch.zeros(2, device=device)
    for part in parts:
        loss_sum, correct = _score(model, part, device)
        loss = loss_sum / num_labels
        loss.backward()
        figures = figures + torch.stack([loss.detach(), correct / num_labels])
    return figures


def _score(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sum the loss over the labels of a batch and count how many are right, both left on the device."""
    labels = batch.labels
    with autocast(device):
        logits = model(batch.tokens, batch.key_mask)
    loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    # No logit is the largest at IGNORED, so a position without a label is never right.
    return loss, (logits.argmax(-1) == labels).sum()


def _predict_batch(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """Return per example right targets, targets, mean log-probability of the truth, and the first position's class."""
    labels = batch.labels
    with autocast(device):
        logits = model(batch.tokens, batch.key_mask)
    rows = len(labels)
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    guesses = logits.argmax(-1).view(rows, -1)
    labels = labels.view(rows, -1)
    targets = (labels != IGNORED).sum(-1)
    return (guesses == labels).sum(-1), targets, -losses.view(rows, -1).sum(-1) / targets, guesses[:, 0]


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return what a model is run under: bfloat16 autocast on CUDA, nothing elsewhere."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
