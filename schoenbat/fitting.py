r"""Fit the kernels of heads to the outputs of exact attention: what a choice of keys leaves is learned.

With near and heavy keys seen exactly (`schoenbat.ops.sparse`), each head may describe its other keys by a kernel
a (1 + b y + c y^2 / 2) of its own, and any a, b, c > 0 make one: that is Schoenberg's theorem. What is fitted is the
error of the outputs,

    sum |estimate - exact|^2 / sum |exact - uniform|^2,

over some queries of each sequence: 1 minus the share of the attention that is explained (see `schoenbat.diagnosis`).
Outputs are smooth in log a, log b, log c, and heads do not depend on each other, so few steps of the method of
Levenberg and Marquardt (Marquardt, SIAM J. Appl. Math. 11, 1963) do, with derivatives in forward mode. Three numbers a
head are settled by a few sequences. The model's own weights stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd

from schoenbat.calibration import KERNELS_KEPT_AS, note_settings
from schoenbat.errors import UserError
from schoenbat.estimate import WATCHER, Estimate
from schoenbat.features.plan import FeatureMap
from schoenbat.functional import check_shapes
from schoenbat.nn.mha import MultiheadKernelAttention
from schoenbat.ops import sparse
from schoenbat.ops._share import compare_exactly
from schoenbat.ops.reference import AttentionInputs
from schoenbat.ops.sparse import HeadKernels
from schoenbat.replacement import is_of_transformers

if TYPE_CHECKING:
    from schoenbat.integrations.lowrank import LowRank

__all__ = ["Fit", "Transfer", "fit_kernels", "transfer"]

STEPS = 8
LIMIT = 5.0
"""The largest logarithm of a, b or c. Heads that want the second degree alone would take c to infinity and a to 0."""


@dataclass(frozen=True)
class Fit:
    """What fitted kernels are worth to one layer, on batches that they were not fitted to.

    Attributes:
        layer: the name of the module.
        before, after: the share of the attention explained, for each head.
    """

    layer: str
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def gains(self) -> bool:
        """Whether the layer keeps the kernels: its heads gain on average."""
        return sum(self.after) > sum(self.before)


@dataclass(frozen=True)
class Transfer:
    """The result of `transfer`; `str` makes a table of it."""

    layers: tuple[Fit, ...]

    def __str__(self) -> str:
        width = max((len(fit.layer) for fit in self.layers), default=0)
        lines = [f"{'layer':{width}}  share explained, median / worst head: before, after"]
        for fit in self.layers:
            before, after = (f"{median(shares):.3f} / {min(shares):.3f}" for shares in (fit.before, fit.after))
            lines.append(f"{fit.layer:{width}}  {before}, {after}{'' if fit.gains else ' (left as it was)'}")
        return "\n".join(lines)


class _Call(NamedTuple):
    """A call of a layer's attention."""

    inputs: AttentionInputs
    features: FeatureMap


class _Attention(nn.Module):
    """Attention as a function of the kernels of its heads."""

    def __init__(self, estimate: Estimate, kernels: HeadKernels) -> None:
        super().__init__()
        self.estimate, self.kernels = estimate, kernels

    def forward(self, call: _Call, rows: Tensor) -> Tensor:
        sparsity = self.estimate.sparsity
        assert sparsity is not None
        return sparse.attend(call.features, call.inputs, sparsity, self.kernels)[:, :, rows]


class _Look(NamedTuple):
    """The outputs with certain kernels, summed up for each head over calls.

    Attributes:
        error, distance: squares of what lies between exact outputs and the estimate, and uniform ones, [H].
        gradient, curvature: of error / 2 in the logarithms, [H, 3] and, without the second derivatives of outputs,
            [H, 3, 3].
    """

    error: Tensor
    distance: Tensor
    gradient: Tensor
    curvature: Tensor

    def where(self, kept: Tensor, other: "_Look") -> "_Look":
        """Return what these are where `kept` [H], and `other` elsewhere."""
        pairs = zip(self, other, strict=True)
        return _Look(*(torch.where(kept.view(-1, *[1] * (x.ndim - 1)), x, y) for x, y in pairs))

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple((1 - self.error / self.distance).tolist())


def _look(attention: _Attention, logarithms: Tensor, calls: Sequence[_Call]) -> _Look:
    found = []
    for call in calls:
        exact = compare_exactly(attention.estimate.function, call.inputs)
        seen = exact.allowed.any(-1, keepdim=True)

        def outputs(shift: Tensor, call: _Call = call, rows: Tensor = exact.rows) -> tuple[Tensor, Tensor]:
            # Heads do not depend on each other, so that one shift for all gives the derivatives of each.
            out = functional_call(attention, {"kernels.logarithms": logarithms + shift}, (call, rows))
            return out, out

        slopes, out = jacfwd(outputs, has_aux=True)(torch.zeros_like(logarithms[0]))
        slopes = slopes.masked_fill(~seen[..., None], 0.0)
        missing, uniform, truth = (
            x.masked_fill(~seen, 0.0) for x in (out - exact.truth, exact.uniform - exact.truth, exact.truth)
        )
        error, distance, size = (x.square().sum((0, 2, 3)) for x in (missing, uniform, truth))
        gradient = torch.einsum("bhnvi,bhnv->hi", slopes, missing)
        curvature = torch.einsum("bhnvi,bhnvj->hij", slopes, slopes)
        # Attention that is uniform leaves nothing to explain.
        found.append(_Look(error, distance.maximum(1e-10 * size), gradient, curvature))
    return _Look(*(torch.stack(parts).sum(0) for parts in zip(*found, strict=True)))


def _fit(estimate: Estimate, kernels: HeadKernels, calls: Sequence[_Call], steps: int) -> HeadKernels:
    """Fit kernels, beginning at `kernels`."""
    attention = _Attention(estimate, kernels)
    with torch.no_grad():
        at = kernels.logarithms.detach().clone()
        best = _look(attention, at, calls)
        damping = torch.full_like(at[:, :1], 1e-3)
        for _ in range(steps):
            diagonal = best.curvature.diagonal(dim1=1, dim2=2) * damping + torch.finfo(at.dtype).tiny
            step = torch.linalg.solve(best.curvature + diagonal.diag_embed(), best.gradient)
            there = (at - step.clamp(-1, 1)).clamp(-LIMIT, LIMIT)
            new = _look(attention, there, calls)
            better = new.error < best.error
            at = torch.where(better[:, None], there, at)
            best = best.where(~better, new)
            damping = torch.where(better[:, None], (damping / 5).clamp_min(1e-6), damping * 10)
        fitted = HeadKernels(len(at)).to(at)
        fitted.logarithms.copy_(at)
    return fitted


def _shares(estimate: Estimate, kernels: HeadKernels, calls: Sequence[_Call]) -> tuple[float, ...]:
    with torch.no_grad():
        return _look(_Attention(estimate, kernels), kernels.logarithms, calls).shares


def fit_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    estimate: Estimate,
    scale: float | None = None,
    self_attention: bool = False,
    features: FeatureMap | None = None,
    steps: int = STEPS,
) -> HeadKernels:
    """Fit the kernel of each head to these tensors.

    Args:
        query, key, value, key_mask, is_causal, scale, self_attention, features: as for `Estimate.attend`.
        estimate: settings with a window or heavy keys.
        steps: the number of steps; each costs somewhat more than a forward pass.

    Returns:
        Kernels for `Estimate.attend`, on the device of `query`.

    Raises:
        UserError: an estimate without such keys, or shapes that do not fit together.
    """
    if estimate.sparsity is None:
        raise UserError(f"kernels are fitted to keys beside near or heavy ones; {estimate} has no window and no heavy")
    check_shapes(query, key, value)
    inputs = estimate.prepare(query, key, value, key_mask, is_causal, scale=scale, self_attention=self_attention)
    if features is None:
        features = estimate.draw(query.shape[-1], inputs.scale, query.device)
    kernels = _kernels_of_exp(inputs)
    return _fit(estimate, kernels, [_Call(inputs, features)], steps)


def _kernels_of_exp(inputs: AttentionInputs) -> HeadKernels:
    query = inputs.query
    return HeadKernels(query.shape[1]).to(query.device, torch.promote_types(query.dtype, torch.float32))


@overload
def transfer(
    model: nn.Module, batches: Sequence[Tensor | Mapping[str, Any]], steps: int = STEPS, resume: bool = False
) -> Transfer: ...


@overload
def transfer(
    model: nn.Module,
    batches: Sequence[Tensor | Mapping[str, Any]],
    steps: int = STEPS,
    *,
    rank: int,
    own_steps: int = 0,
    learning_rate: float = 2e-3,
    checkpoint: str | Path | None = None,
    merge: bool = False,
) -> "LowRank": ...


def transfer(
    model: nn.Module,
    batches: Sequence[Tensor | Mapping[str, Any]],
    steps: int = STEPS,
    resume: bool = False,
    *,
    rank: int = 0,
    own_steps: int = 0,
    learning_rate: float = 2e-3,
    checkpoint: str | Path | None = None,
    merge: bool = False,
) -> "Transfer | LowRank":
    """Fit the kernels of all layers that have a window or heavy keys, such as `schoenbat.replace` gives them.

    The model runs once over the batches, and query, key and value of these layers are kept meanwhile. Every other
    batch, from the first one on, is fitted to; the rest judge. A layer gets the kernels as soon as they are fitted,
    if they explain more there: as its submodule `head_kernels`, which is saved with the model. Nothing else changes.

    With a `rank`, low-rank updates of the projections to queries and keys of all replaced layers are learned as well,
    through peft, in a model of transformers (`schoenbat.integrations.lowrank`): 200 steps of Adam are a beginning. The
    updates lie beside the model's own weights, which stay as they are; to be saved they have to be merged.

    Args:
        batches: at least two, each the input ids or the named inputs of a call of the model.
        steps: see `fit_kernels`. Kernels that a layer has already are where its steps begin. With a `rank`, of fitting
            each layer's output to that of exact attention, one batch a step.
        resume: leave layers out that have kernels already, such as those of a call that was interrupted.
        rank: of the updates; 0 for none.
        own_steps: further steps that fit the output of the whole model to that by exact attention, or where batches
            have labels lower its own loss.
        learning_rate: of the first step; it falls to 0 over `steps`, and again over `own_steps`.
        checkpoint: a file that keeps the state of an interrupted call, which the same call goes on from.
        merge: add the updates to the model's own weights in the end, so that it is saved like any other.

    Raises:
        UserError: fewer batches, or a model without such layers; with a rank, one that is not of transformers, or peft
            is not installed.
    """
    if not isinstance(batches, Sequence) or len(batches) < 2:
        raise UserError("transfer needs at least 2 batches, some to fit to and some to judge by")
    if rank:
        if not is_of_transformers(model):
            raise UserError(f"low-rank updates are for models of transformers, not for {type(model).__name__}")
        from schoenbat.integrations.lowrank import transfer_low_rank

        named = [batch if isinstance(batch, Mapping) else {"input_ids": batch} for batch in batches]
        kept = None if checkpoint is None else Path(checkpoint)
        how: Any = {"own_steps": own_steps, "learning_rate": learning_rate, "checkpoint": kept, "merge": merge}
        return transfer_low_rank(model, named, rank, steps, **how)
    estimates = {
        name: estimate
        for name, layer in model.named_modules()
        if (estimate := _settings_of(layer)) is not None and estimate.sparsity is not None
    }
    if not estimates:
        raise UserError(f"no layer of {type(model).__name__} has a window or heavy keys; call schoenbat.replace first")
    layers = {name: model.get_submodule(name) for name in estimates}
    if resume:
        layers = {name: layer for name, layer in layers.items() if getattr(layer, KERNELS_KEPT_AS, None) is None}
    fits = []
    for name, calls in _watch(model, layers, batches).items():
        fitted_to, judges = (list(chain.from_iterable(calls[half::2])) for half in (0, 1))
        if not fitted_to or not judges:
            continue
        layer, estimate = layers[name], estimates[name]
        before = getattr(layer, KERNELS_KEPT_AS, None) or _kernels_of_exp(fitted_to[0].inputs)
        kernels = _fit(estimate, before, fitted_to, steps)
        fits.append(Fit(name, *(_shares(estimate, one, judges) for one in (before, kernels))))
        if fits[-1].gains:
            setattr(layer, KERNELS_KEPT_AS, kernels)
            note_settings(model)
    return Transfer(tuple(fits))


def _settings_of(layer: nn.Module) -> Estimate | None:
    if isinstance(layer, MultiheadKernelAttention):
        return layer.estimate
    return getattr(layer, "kernel_estimate", None)


def _watch(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor | Mapping[str, Any]]
) -> dict[str, list[list[_Call]]]:
    """Run the model, and return the calls of each layer, batch by batch."""
    calls: dict[str, list[list[_Call]]] = {name: [] for name in layers}
    inside: list[str] = []

    def take(_: Estimate, inputs: AttentionInputs, features: FeatureMap | None) -> None:
        if inside and features is not None:
            calls[inside[-1]][-1].append(_Call(inputs, features))

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(layer.register_forward_hook(lambda *_: inside.pop() and None, always_call=True))
    token = WATCHER.set(take)
    try:
        with torch.no_grad():
            for batch in batches:
                for found in calls.values():
                    found.append([])
                model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        WATCHER.reset(token)
        for handle in handles:
            handle.remove()
    return calls
