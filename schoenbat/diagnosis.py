"""How much of a model's attention an estimate would explain, before it is put in.

The share of the attention that an estimate explains is

    1 - |estimate - exact|^2 / |exact - uniform|^2

over the outputs of some queries: 1 is exact, 0 is what uniform weights reach, and below 0 the estimate is worse than
knowing nothing. A relative error does not tell these apart, as attention may be close to uniform anyway.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any
from xml.sax.saxutils import escape

import torch
from torch import Tensor, nn

from schoenbat.attention import KernelAttention
from schoenbat.calibration import FittedFeatures
from schoenbat.errors import UserError, shorten
from schoenbat.estimate import WATCHER, Estimate
from schoenbat.features.plan import FeatureMap
from schoenbat.functional import check_shapes
from schoenbat.nn.modes import evaluating
from schoenbat.ops._share import POOR, PoorEstimateWarning, compare_exactly
from schoenbat.ops.reference import AttentionInputs, fill_masked, normalise
from schoenbat.replacement import align, describe, is_of_transformers, kernel_form

__all__ = ["Diagnosis", "Head", "PoorEstimateWarning", "diagnose", "diagnose_tensors"]

NUM_FEATURES = (64, 128, 256, 512, 1024)
ENOUGH = 0.9


@dataclass(frozen=True)
class Head:
    """The diagnosis of one head of one layer.

    Attributes:
        layer, head: the name of the module, and the number of the head.
        largest, spread: of the kernel's arguments: the largest absolute value, and the mean over queries of the
            standard deviation over keys.
        effective_keys: 1 / sum_j w_j^2 of the weights w of a query, mean over queries: 1 for one key that gets all, the
            number of keys where weights are uniform.
        shares: the share of the attention explained by each number of features, or by each of `estimates`.
        needed: the least number of features, or the first of `estimates`, that explains 0.9; None if none does.
    """

    layer: str
    head: int
    largest: float
    spread: float
    effective_keys: float
    shares: Mapping[Any, float]
    needed: int | Estimate | None

    def __str__(self) -> str:
        shares = "; ".join(f"{_name(setting)} {share:.2f}" for setting, share in self.shares.items())
        name = f"{self.layer}, head {self.head}" if self.layer else f"head {self.head}"
        return (
            f"{name}: arguments up to {self.largest:.3g}, spread {self.spread:.3g}, {self.effective_keys:.3g} "
            f"effective keys; share explained by {shares}. {self.verdict}"
        )

    @property
    def verdict(self) -> str:
        """A sentence that says whether the head can be replaced."""
        best = max(self.shares, key=lambda setting: self.shares[setting])
        if self.needed is not None:
            return f"It can be replaced with {_name(self.needed)}."
        if self.shares[best] >= POOR:
            return f"It can be replaced with {_name(best)} after further training."
        return "It cannot be replaced as it is: its attention is too sharp for an estimate of this size."


class Diagnosis(list[Head]):
    """The heads of a model, layer after layer; printed, a table of layers, and in a notebook a picture of all heads."""

    @property
    def layers(self) -> dict[str, list[Head]]:
        """The heads of each layer, by the name of the layer."""
        found: dict[str, list[Head]] = {}
        for head in self:
            found.setdefault(head.layer, []).append(head)
        return found

    def __str__(self) -> str:
        rows = [("layer", "spread", "effective keys", *map(_name, self[0].shares))]
        for layer, heads in self.layers.items():
            values = [f"{fmean(head.spread for head in heads):.2f}", f"{fmean(h.effective_keys for h in heads):.0f}"]
            for setting in heads[0].shares:
                shares = [head.shares[setting] for head in heads]
                values.append(f"{median(shares):.2f}, {min(shares):.2f}")
            rows.append((layer, *values))
        return f"share of the attention explained: median, worst head\n{align(rows, left=1)}"

    def picture(self, setting: int | Estimate | None = None) -> str:
        """Draw the share of each head that a setting explains, a row for each layer and a column for each head, as SVG.

        Args:
            setting: one of those measured; the last where it is None.

        Raises:
            UserError: a setting that was not measured.
        """
        measured = [*self[0].shares]
        setting = measured[-1] if setting is None else setting
        if setting not in measured:
            raise UserError(f"{_name(setting)} were not measured; choose from: {'; '.join(map(_name, measured))}")
        left, size, top = 8 * max(map(len, self.layers)) + 12, 36, 44
        width = left + size * max(map(len, self.layers.values())) + 8
        parts = [f'<text x="8" y="18">Share of the attention explained by {_name(setting)}</text>']
        for row, (layer, heads) in enumerate(self.layers.items()):
            y = top + size * row
            parts.append(f'<text x="8" y="{y + 22}">{escape(layer)}</text>')
            for column, head in enumerate(heads):
                share, x = head.shares[setting], left + size * column
                ink = "#ffffff" if share > 0.6 else "#000000"
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{size - 2}" height="{size - 2}" fill="#08519c" '
                    f'fill-opacity="{min(max(share, 0.0), 1.0):.3f}" stroke="#bbbbbb"/>'
                    f'<text x="{x + size / 2 - 1}" y="{y + 22}" fill="{ink}" text-anchor="middle">{share:.2f}</text>'
                )
        height = top + size * len(self.layers) + 8
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#ffffff"/>'
            f"{''.join(parts)}</svg>\n"
        )

    def _repr_svg_(self) -> str:
        return self.picture()


def _name(setting: int | Estimate) -> str:
    return describe(setting) if isinstance(setting, Estimate) else f"{setting} features"


def diagnose_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    self_attention: bool = False,
    estimate: Estimate | None = None,
    num_features: Sequence[int] = NUM_FEATURES,
    estimates: Sequence[Estimate] | None = None,
    layer: str = "",
) -> Diagnosis:
    """Measure the share that estimates would explain of the attention of these tensors, per head.

    Args:
        query, key, value, key_mask, is_causal, scale, self_attention: as for `Estimate.attend`.
        estimate: whose attention it is, and the settings that `num_features` vary; the default of `Estimate` where it
            is None.
        num_features: the budgets.
        estimates: settings to try instead, such as some with a window and heavy keys, the cheapest first.

    Raises:
        UserError: no budgets or settings, or shapes that do not fit together.
    """
    settings = _settings(num_features, estimates)
    check_shapes(query, key, value)
    estimate = Estimate() if estimate is None else estimate
    inputs = estimate.prepare(query, key, value, key_mask, is_causal, scale=scale, self_attention=self_attention)
    return _look(layer, settings, estimate, inputs)


def _settings(num_features: Sequence[int], estimates: Sequence[Estimate] | None) -> list[int] | list[Estimate]:
    if estimates is not None:
        if not isinstance(estimates, Sequence) or not estimates or any(not isinstance(e, Estimate) for e in estimates):
            raise UserError(
                f"estimates must be settings to try, such as [Estimate(window=16)], not {shorten(estimates)}"
            )
        return list(estimates)
    if not isinstance(num_features, Sequence) or not num_features or None in num_features:
        raise UserError(f"num_features must be the numbers of features to try, such as (64, 256), not {num_features!r}")
    return sorted(num_features)


def _look(
    layer: str,
    settings: Sequence[int] | Sequence[Estimate],
    estimate: Estimate,
    inputs: AttentionInputs,
    features: FeatureMap | None = None,
) -> Diagnosis:
    """Diagnose what `schoenbat.estimate.WATCHER` is shown."""
    with torch.no_grad():
        query = inputs.query
        inputs = inputs._replace(value=fill_masked(inputs.value, inputs.key_mask))
        exact = compare_exactly(estimate.function, inputs)
        scores, seen = exact.scores, exact.allowed.any(-1)
        counts = exact.allowed.sum(-1).clamp_min(1)
        mean = scores.sum(-1) / counts
        deviation = (scores.square().sum(-1) / counts - mean.square()).clamp_min(0).sqrt()
        largest = scores.abs().amax((0, 2, 3)).tolist()
        spread = (deviation.sum((0, 2)) / seen.sum().clamp_min(1)).tolist()
        squares = normalise(estimate.function, scores, exact.allowed).square().sum(-1)
        keys = (squares.reciprocal().masked_fill(~seen, 0.0).sum((0, 2)) / seen.sum().clamp_min(1)).tolist()
        shares: dict[int | Estimate, list[float]] = {}
        for setting in settings:
            out = _try(setting, estimate, inputs, features)
            shares[setting] = exact.share_explained(out, dim=(0, 2, 3))
    heads = Diagnosis()
    for head in range(query.shape[1]):
        of_head = {setting: values[head] for setting, values in shares.items()}
        needed = next((setting for setting in of_head if of_head[setting] >= ENOUGH), None)
        heads.append(Head(layer, head, largest[head], spread[head], keys[head], of_head, needed))
    return heads


def _try(setting: int | Estimate, estimate: Estimate, inputs: AttentionInputs, features: FeatureMap | None) -> Tensor:
    if isinstance(setting, Estimate):
        estimate = setting
        inputs = estimate.prepare(*inputs[:5], scale=inputs.scale, self_attention=inputs.self_attention)
    elif isinstance(features, FittedFeatures):
        return estimate.compute(inputs, features.resized(setting))
    else:
        estimate = replace(estimate, num_features=setting)
    if estimate.num_features is None:
        return estimate.compute(inputs, None)
    return estimate.compute(inputs, estimate.draw(inputs.query.shape[-1], inputs.scale, inputs.query.device))


def diagnose(
    model: nn.Module,
    *inputs: Any,
    num_features: Sequence[int] = NUM_FEATURES,
    estimates: Sequence[Estimate] | None = None,
    **named_inputs: Any,
) -> Diagnosis:
    """Run `diagnose_tensors` on every attention layer that model(*inputs, **named_inputs) calls, in evaluation mode.

    Looked at are torch's nn.MultiheadAttention, `schoenbat.MultiheadKernelAttention`, the kernelised mechanisms of
    `schoenbat.attention`, and models of transformers whose attention goes through the attention interface: for the run
    they attend exactly, but where their attn_implementation was registered by schoenbat. A layer of torch is taken for
    softmax attention, and a calibrated layer is looked at in its basis, but for `estimates`.

    Args:
        num_features, estimates: as for `diagnose_tensors`.

    Raises:
        UserError: no budgets or settings; the model called no such layer, or one whose attention schoenbat does not
            have, such as that of nn.MultiheadAttention with add_bias_kv or a mask of pairs of tokens.
    """
    settings = _settings(num_features, estimates)
    found = Diagnosis()

    def take(layer: str, estimate: Estimate, inputs: AttentionInputs, features: FeatureMap | None = None) -> None:
        found.extend(_look(layer, settings, estimate, inputs, features))

    handles = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_forward_pre_hook(_of_torch(name, take), with_kwargs=True))
        elif isinstance(module, KernelAttention):
            handles.append(module.register_forward_pre_hook(_of_mechanism(name, take)))
        else:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
            handles.append(module.register_forward_hook(lambda *_: inside.pop() and None, always_call=True))
    # torch's encoder would hand nested tensors to its layers, for a fused form that hooks keep it from.
    was_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    token = WATCHER.set(lambda *given: take(inside[-1] if inside else "", *given))
    try:
        with (
            torch.no_grad(),
            evaluating(model),
            torch.compiler.set_stance("force_eager"),
            _through_our_interface(model),
        ):
            model(*inputs, **named_inputs)
    finally:
        WATCHER.reset(token)
        torch.backends.mha.set_fastpath_enabled(was_fused)
        for handle in handles:
            handle.remove()
    if not found:
        raise UserError(f"{type(model).__name__} called no attention layer that schoenbat knows")
    return found


@contextlib.contextmanager
def _through_our_interface(model: nn.Module) -> Iterator[None]:
    """Let models of transformers whose attention is not ours attend by our exact form inside the block."""
    if not any(map(is_of_transformers, model.modules())):
        yield
        return
    from transformers import PreTrainedModel

    from schoenbat.integrations.huggingface import ESTIMATES, EXACT_NAME

    # A model sets those that it contains as well, which come after it.
    before = {m: m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)}
    try:
        for part, name in before.items():
            part.set_attn_implementation(name if name in ESTIMATES else EXACT_NAME)
        yield
    finally:
        for part, name in before.items():
            part.set_attn_implementation(name)


def _of_torch(layer: str, take: Callable[..., None]) -> Callable[..., None]:
    def hook(module: nn.MultiheadAttention, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        given = dict(zip(names, arguments, strict=False)) | named
        twin = kernel_form(module, Estimate(num_features=None))
        kept = {name: given[name] for name in ("key_padding_mask", "attn_mask") if given.get(name) is not None}
        is_causal = bool(named.get("is_causal", False))
        token = WATCHER.set(lambda _, inputs, features: take(layer, Estimate(), inputs, features))
        try:
            twin(given["query"], given["key"], given["value"], is_causal=is_causal, **kept)
        finally:
            WATCHER.reset(token)

    return hook


def _of_mechanism(layer: str, take: Callable[..., None]) -> Callable[..., None]:
    def hook(module: KernelAttention, arguments: tuple[Any, ...]) -> None:
        estimate = Estimate(module.kernel)
        # The layers of our models attend to their own tokens.
        take(layer, estimate, estimate.prepare(*arguments, self_attention=True))

    return hook
