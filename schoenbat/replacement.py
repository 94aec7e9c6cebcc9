"""Replace the attention of a trained model, layer by layer, by the cheapest settings that explain enough of it."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from schoenbat.calibration import CALIBRATOR
from schoenbat.errors import UserError
from schoenbat.estimate import WATCHER, Estimate
from schoenbat.nn.mha import MultiheadKernelAttention
from schoenbat.nn.modes import evaluating
from schoenbat.ops._share import compare_exactly
from schoenbat.ops.reference import AttentionInputs, fill_masked
from schoenbat.ops.sparse import QUERIES

EXACT_KEYS = (8, 16, 32, 64, 128)
"""Tokens of a block, and heavy keys, of the settings that are tried."""
NUM_FEATURES = 256
"""Features of the setting that is tried without near and heavy keys."""


@dataclass(frozen=True)
class Choice:
    """The settings that a layer got.

    Attributes:
        layer: the name of the module.
        estimate: the settings; exact attention where its `num_features` is None.
        share, worst: the share of the attention explained (see `schoenbat.diagnosis`), of all heads together and of the
            worst head.
        cost: multiplications against those of exact attention at `length` tokens.
    """

    layer: str
    estimate: Estimate
    share: float
    worst: float
    cost: float


@dataclass(frozen=True)
class Replacement:
    """What `replace` did to a model; printed, a table.

    Attributes:
        choices: one for each layer of attention.
        length: the number of tokens at which costs are compared.
    """

    choices: list[Choice]
    length: int
    _undo: Callable[[], None] = field(repr=False, compare=False)

    def undo(self) -> None:
        """Give the model the attention back that it had."""
        self._undo()

    def __str__(self) -> str:
        rows = [("layer", "setting", "share", "worst head", f"cost at {self.length:,} tokens")]
        for choice in self.choices:
            values = f"{choice.share:.3f}", f"{choice.worst:.3f}", f"{choice.cost:.2f}"
            rows.append((choice.layer, describe(choice.estimate), *values))
        return align(rows, left=2)


def align(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return rows as lines of equal columns, of which the first `left` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([*map(str.ljust, row[:left], widths), *map(str.rjust, row[left:], widths[left:])]) for row in rows
    ]
    return "\n".join(map(str.rstrip, lines))


def describe(estimate: Estimate) -> str:
    """Say settings in a few words."""
    if estimate.num_features is None:
        return "exact"
    parts = [f"{estimate.num_features} features"]
    if estimate.heavy:
        parts.insert(0, f"{estimate.heavy} heavy keys")
    if estimate.window:
        parts.insert(0, f"window {estimate.window}")
    return ", ".join(parts)


def candidates_for(head_dim: int) -> list[Estimate]:
    """Return the settings that `replace` tries: features alone, and near and heavy keys with one or two degrees."""
    two_degrees = 1 + head_dim + head_dim * (head_dim + 1) // 2
    sparse = [
        Estimate(num_features=num_features, window=number, heavy=number)
        for number in EXACT_KEYS
        for num_features in (1 + head_dim, two_degrees)
    ]
    return [Estimate(num_features=NUM_FEATURES), *sparse]


def cost_of(estimate: Estimate, inputs: AttentionInputs, length: int) -> float:
    """Count the multiplications for one query among `length` tokens, over those of exact attention."""
    head_dim, width = inputs.query.shape[-1], inputs.value.shape[-1] + 1
    exact = length * (head_dim + width) / (2 if inputs.is_causal else 1)
    if estimate.num_features is None:
        return 1.0
    # Projections, sums over keys and look-ups of queries.
    features = 2 * estimate.num_features * width + 2 * head_dim**2
    if estimate.sparsity is None:
        return features / exact
    near = 0
    if inputs.is_causal:
        near = 2 * estimate.window + estimate.sinks
    elif inputs.self_attention:
        near = 3 * estimate.window
    # Near keys that are not causal are taken out of the sums as well, in two degrees.
    taken = 0 if inputs.is_causal else 2 * near * width
    chosen = 0 if inputs.is_causal else QUERIES * head_dim
    return (features + (near + estimate.heavy) * (head_dim + width) + taken + chosen) / exact


def replace(
    model: nn.Module,
    batch: Mapping[str, Any] | Tensor,
    share: float = 0.95,
    *,
    candidates: Sequence[Estimate] | None = None,
    length: int | None = None,
) -> Replacement:
    """Replace each layer of attention by the cheapest settings that explain `share` of each of its heads on a batch.

    The model is run once, with exact attention, and each layer is measured on what it is given there. The worst head
    decides, as what a model computes in one head it does not have in another. A layer that no candidate explains is
    left exact. Nothing of the model's weights changes; what a model of transformers has been given is saved by its
    `save_pretrained` (see `schoenbat.integrations.layers`).

    Args:
        model: a model of transformers whose attention goes through the attention interface, or any module with layers
            of nn.MultiheadAttention, such as nn.TransformerEncoder, whose dropout of weights is left out.
        batch: the model's keyword arguments, or its only argument: real texts of the length that matters, with masks.
        share: of the attention of a head to be explained, up to 1; see `schoenbat.diagnosis` for its definition.
        candidates: the settings to try; those of `candidates_for` where it is None.
        length: at which costs are compared, in tokens; that of the batch where it is None.

    Returns:
        The choices, printed as a table; its method `undo` gives the model back what it had.

    Raises:
        UserError: a model without such layers, a share above 1, or no candidates.
    """
    if not share <= 1:
        raise UserError(f"share must be at most 1, not {share}")
    if candidates is not None and not candidates:
        raise UserError("candidates must be settings to try, such as [schoenbat.Estimate(window=16, heavy=16)]")
    measured: dict[str, _Measured] = {}

    def measure(layer: str, inputs: AttentionInputs) -> None:
        own = measured.setdefault(layer, _Measured(inputs))
        own.add(inputs, candidates or candidates_for(inputs.query.shape[-1]))

    kind = _Transformers if is_of_transformers(model) else _Torch
    host = kind(model)
    host.run(batch, measure)
    if not measured:
        raise UserError(f"{type(model).__name__} called no attention layer that schoenbat can replace")
    at = max(own.inputs.key.shape[2] for own in measured.values()) if length is None else length
    choices = [own.choose(layer, share, at) for layer, own in measured.items()]
    host.give({choice.layer: choice.estimate for choice in choices})
    return Replacement(choices, at, host.undo)


class _Measured:
    """The least shares that candidates explain of the calls of one layer: of all heads, and of the worst."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs
        self.shares: dict[Estimate, tuple[float, float]] = {}

    def add(self, inputs: AttentionInputs, candidates: Sequence[Estimate]) -> None:
        inputs = inputs._replace(value=fill_masked(inputs.value, inputs.key_mask))
        exact = compare_exactly(Estimate().function, inputs)
        for estimate in candidates:
            with warnings.catch_warnings():
                # How little a candidate explains is what is measured.
                warnings.simplefilter("ignore")
                out = estimate.attend(*inputs[:5], scale=inputs.scale, self_attention=inputs.self_attention)
            (share,) = exact.share_explained(out, dim=(0, 1, 2, 3), keepdim=True)
            worst = min(exact.share_explained(out, dim=(0, 2, 3)))
            before = self.shares.get(estimate, (math.inf, math.inf))
            self.shares[estimate] = min(share, before[0]), min(worst, before[1])

    def choose(self, layer: str, share: float, length: int) -> Choice:
        enough = [estimate for estimate, (_, worst) in self.shares.items() if worst >= share]
        costs = {estimate: cost_of(estimate, self.inputs, length) for estimate in enough}
        if not costs:
            return Choice(layer, Estimate(num_features=None), 1.0, 1.0, 1.0)
        best = min(costs, key=lambda estimate: costs[estimate])
        return Choice(layer, best, *self.shares[best], costs[best])


Measure = Callable[[str, AttentionInputs], None]


def _call(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> None:
    with torch.no_grad(), evaluating(model):
        model(**batch) if isinstance(batch, Mapping) else model(batch)


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether it is a model of transformers, without an import of that library."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


class _Transformers:
    """Layers of a model of transformers."""

    def __init__(self, model: Any) -> None:
        from schoenbat.integrations import huggingface

        self.model, self.ours = model, huggingface
        self.layers = huggingface.attention_layers(model)
        before = model.config._attn_implementation
        self.before = "sdpa" if before in huggingface.ESTIMATES else before

    def run(self, batch: Mapping[str, Any] | Tensor, measure: Measure) -> None:
        self.ours.uninstall(self.model, self.ours.EXACT_NAME)
        names = {layer: name for name, layer in self.layers.items()}

        def take(layer: nn.Module, estimate: Estimate, *given: Any, scale: Any, self_attention: bool) -> None:
            measure(names[layer], estimate.prepare(*given, scale=scale, self_attention=self_attention))

        token = CALIBRATOR.set(take)
        try:
            _call(self.model, batch)
        finally:
            CALIBRATOR.reset(token)
            self.ours.uninstall(self.model, self.before)

    def give(self, estimates: Mapping[str, Estimate]) -> None:
        for name, layer in self.layers.items():
            self.ours.give_drawn(layer, estimates.get(name, self.ours.EXACT), None)
        self.ours.switch(self.model, self.ours.NAME)

    def undo(self) -> None:
        self.ours.uninstall(self.model, self.before)


class _Torch:
    """Layers of nn.MultiheadAttention."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)}
        if "" in self.layers:
            raise UserError("replace exchanges layers within a module; put this layer into one, such as nn.Sequential")

    def run(self, batch: Mapping[str, Any] | Tensor, measure: Measure) -> None:
        twins = {name: kernel_form(layer, Estimate(num_features=None)) for name, layer in self.layers.items()}
        self._exchange(twins)
        current: list[str] = []

        def take(_: Estimate, inputs: AttentionInputs, __: object) -> None:
            # Candidates are estimates as well, and not to be measured themselves.
            inside = WATCHER.set(None)
            measure(current[-1], inputs)
            WATCHER.reset(inside)

        token = WATCHER.set(take)
        handles = [
            twin.register_forward_pre_hook(lambda *_, name=name: current.append(name)) for name, twin in twins.items()
        ]
        try:
            _call(self.model, batch)
        finally:
            WATCHER.reset(token)
            for handle in handles:
                handle.remove()
            self.undo()

    def give(self, estimates: Mapping[str, Estimate]) -> None:
        self._exchange(
            {
                name: kernel_form(self.layers[name], estimate)
                for name, estimate in estimates.items()
                if estimate.num_features is not None
            }
        )

    def undo(self) -> None:
        self._exchange(self.layers)

    def _exchange(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            parent, _, own = name.rpartition(".")
            layer.train(self.model.training)
            setattr(self.model.get_submodule(parent), own, layer)


def kernel_form(layer: nn.MultiheadAttention, estimate: Estimate) -> MultiheadKernelAttention:
    """Make a layer with the same parameters, themselves and not copies, that attends by `estimate`.

    Raises:
        UserError: a layer with add_bias_kv or add_zero_attn.
    """
    twin = MultiheadKernelAttention(
        layer.embed_dim,
        layer.num_heads,
        bias=layer.in_proj_bias is not None,
        add_bias_kv=layer.bias_k is not None,
        add_zero_attn=layer.add_zero_attn,
        kdim=layer.kdim,
        vdim=layer.vdim,
        batch_first=layer.batch_first,
        device=layer.out_proj.weight.device,
        dtype=layer.out_proj.weight.dtype,
        kernel=estimate.kernel,
        num_features=estimate.num_features,
        estimator=estimate.estimator,
        seed=estimate.seed,
        normalize=estimate.normalize,
        max_degree=estimate.max_degree,
        window=estimate.window,
        heavy=estimate.heavy,
        sinks=estimate.sinks,
    )
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(twin, name, parameter)
    twin.out_proj = layer.out_proj
    return twin
