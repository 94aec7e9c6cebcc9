r"""Low-rank updates of queries and keys, fitted to exact attention: what kernels of heads leave is learned.

A replaced layer describes sharp attention the worse the larger its arguments are. With an update B A of rank r to each
of its projections to queries and keys (LoRA: Hu et al., arXiv 2106.09685), by the library peft, the layer may choose
arguments that it describes better. What is fitted, at first, are the outputs of each layer to those of exact attention
on the same inputs, which a copy of the model with the same weights gives (attention transfer, as in LoLCATs: Zhang et
al., arXiv 2410.10254); then, if wished, the output of the whole model, or its own loss. The kernels of heads
(`schoenbat.fitting`) learn with them.
"""

import copy
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schoenbat.errors import UserError
from schoenbat.files import write_bytes
from schoenbat.integrations import huggingface, layers
from schoenbat.nn.modes import evaluating
from schoenbat.ops.sparse import HeadKernels

__all__ = ["LowRank", "transfer_low_rank"]

CHECKPOINT_EVERY = 20
"""Steps."""
_PROJECTIONS = re.compile(r"(q|k|query|key)(_proj|_lin)?")
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class LowRank:
    """What low-rank updates are worth, on batches that they were not fitted to; `str` makes a table of it.

    Attributes:
        layers: by name, the squared error of a layer's output over the square of that of exact attention on the same
            inputs, before and after.
        whole: the mean loss of the model where batches have labels, else the squared error of its output, likewise.
        exact: the loss by exact attention, or 0.
    """

    layers: Mapping[str, tuple[float, float]]
    whole: tuple[float, float]
    exact: float
    _undo: Callable[[], None] = field(repr=False, compare=False)

    def undo(self) -> None:
        """Take the updates and the kernels fitted with them away."""
        self._undo()

    def __str__(self) -> str:
        rows = [*self.layers.items(), ("whole model", self.whole)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'layer':{width}}  error before, after"]
        lines += [f"{name:{width}}  {before:.4f}, {after:.4f}" for name, (before, after) in rows]
        return "\n".join([*lines[:-1], f"{lines[-1]}; by exact attention {self.exact:.4f}"])


@dataclass(frozen=True)
class _Pair:
    """A model, and one with the same weights that attends exactly."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    names: Sequence[str]

    def outputs(self, batch: Batch) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield of each replaced layer its output and that of exact attention, for the inputs of the latter."""
        calls: dict[str, tuple[Any, ...]] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _, given, named, out: calls.update({name: (given, named, out[0])})

        handles = [
            self.teacher.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in self.names
        ]
        try:
            with torch.no_grad():
                self.teacher(**batch)
        finally:
            for handle in handles:
                handle.remove()
        for name, (given, named, out) in calls.items():
            yield name, self.student.get_submodule(name)(*given, **named)[0], out

    def whole(self, batch: Batch) -> Tensor:
        """Return the loss of the model, or the error of its output."""
        out = self.student(**batch)
        if "labels" in batch:
            return torch.as_tensor(out.loss)
        with torch.no_grad():
            truth = self.teacher(**batch)[0]
        return _error(out[0], truth, batch)

    def layers(self, batch: Batch) -> dict[str, Tensor]:
        return {name: _error(own, exact, batch) for name, own, exact in self.outputs(batch)}

    @torch.no_grad()
    def judge(self, batches: Sequence[Batch]) -> tuple[dict[str, float], float]:
        """Return the mean error of each layer, and that of the whole model."""
        found = [{name: float(error) for name, error in self.layers(batch).items()} for batch in batches]
        means = {name: sum(errors[name] for errors in found) / len(batches) for name in found[0]}
        return means, sum(float(self.whole(batch)) for batch in batches) / len(batches)


def _error(out: Tensor, truth: Tensor, batch: Batch) -> Tensor:
    """Return the squared error of [B, N, ...] over the square of the truth, at the tokens that are there."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == truth.shape[:2]:
        there = mask.bool()
        out, truth = out[there], truth[there]
    return (out - truth).square().sum() / truth.square().sum()


def transfer_low_rank(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    rank: int,
    steps: int,
    *,
    own_steps: int = 0,
    learning_rate: float = 2e-3,
    checkpoint: Path | None = None,
    merge: bool = False,
) -> LowRank:
    """Fit low-rank updates of the replaced layers; see `schoenbat.transfer`, whose arguments these are."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("low-rank updates need peft: pip install peft") from None
    found = {
        name: layer
        for name, layer in huggingface.attention_layers(model).items()
        if (own := layers.estimate_of(layer)) is not None and own.num_features is not None
    }
    if not found:
        raise UserError(f"no layer of {type(model).__name__} is replaced; call schoenbat.replace first")
    projections = {
        f"{name}.{child}": module
        for name, layer in found.items()
        for child, module in layer.named_children()
        if _PROJECTIONS.fullmatch(child) and isinstance(module, nn.Linear)
    }
    if not projections:
        raise UserError(f"{type(next(iter(found.values()))).__name__} has no linear layers of queries and keys alone")
    # All parameters are shared, so that it takes no memory to speak of.
    teacher = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    huggingface.uninstall(teacher, huggingface.EXACT_NAME)
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kernels_before = {name: layers.kernels_of(layer) for name, layer in found.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=[*projections]), model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, layer in found.items():
        if (estimate := layers.estimate_of(layer)) is not None and estimate.sparsity is not None:
            width = next(module.out_features for path, module in projections.items() if path.startswith(f"{name}."))
            kernels = copy.deepcopy(kernels_before[name]) or HeadKernels(width // huggingface.head_dim_of(layer))
            setattr(layer, layers.KERNELS_KEPT_AS, kernels.to(next(layer.parameters()).device))
            learned.append(kernels.logarithms)

    pair, fitted_to, judges = _Pair(model, teacher, [*found]), batches[::2], batches[1::2]
    with evaluating(model), evaluating(teacher), _without_cache(model), _without_cache(teacher):
        before = pair.judge(judges)
        _train(pair, learned, fitted_to, steps, own_steps, learning_rate, checkpoint)
        after = pair.judge(judges)
        exact = 0.0
        if "labels" in judges[0]:
            with torch.no_grad():
                exact = sum(float(teacher(**batch).loss) for batch in judges) / len(judges)
    for parameter, flag in requires_grad.items():
        parameter.requires_grad_(flag)
    weights = {path: module.weight.detach().clone() for path, module in projections.items()} if merge else {}
    if merge:
        _take_out(model, projections, merge=True)
    layers.record(model)

    def undo() -> None:
        _take_out(model, projections)
        with torch.no_grad():
            for path, weight in weights.items():
                projections[path].weight.copy_(weight)
        for name, layer in found.items():
            if hasattr(layer, layers.KERNELS_KEPT_AS):
                delattr(layer, layers.KERNELS_KEPT_AS)
            if (kernels := kernels_before[name]) is not None:
                setattr(layer, layers.KERNELS_KEPT_AS, kernels)
        layers.record(model)

    return LowRank({name: (before[0][name], after[0][name]) for name in found}, (before[1], after[1]), exact, undo)


def _train(
    pair: _Pair,
    learned: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    steps: int,
    own_steps: int,
    learning_rate: float,
    checkpoint: Path | None,
) -> None:
    """Fit layer by layer, and then the whole; from `checkpoint` on, where there is one."""
    optimizer, first = torch.optim.Adam(learned, learning_rate), 0
    if checkpoint is not None and checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(learned, saved["values"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    for step in range(first, steps + own_steps):
        done, number = (step, steps) if step < steps else (step - steps, own_steps)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - done / number)
        optimizer.zero_grad()
        batch = batches[step % len(batches)]
        if step < steps:
            for _, out, exact in pair.outputs(batch):
                _error(out, exact, batch).backward()
        else:
            pair.whole(batch).backward()
        optimizer.step()
        if checkpoint is not None and ((step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps + own_steps):
            content = io.BytesIO()
            values = [parameter.detach() for parameter in learned]
            torch.save({"step": step + 1, "values": values, "optimizer": optimizer.state_dict()}, content)
            write_bytes(checkpoint, content.getvalue())
    optimizer.zero_grad()


def _take_out(model: PreTrainedModel, projections: Mapping[str, nn.Module], merge: bool = False) -> None:
    """Put the linear layers back that the model had, with the updates in their weights if `merge`."""
    for path, module in projections.items():
        parent, _, child = path.rpartition(".")
        place = model.get_submodule(parent)
        if merge:
            getattr(place, child).merge()
        setattr(place, child, module)


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model from caching keys and values inside the block: its layers are called twice."""
    before = getattr(model.config, "use_cache", None)
    model.config.use_cache = False
    try:
        yield
    finally:
        if before is None:
            del model.config.use_cache
        else:
            model.config.use_cache = before
