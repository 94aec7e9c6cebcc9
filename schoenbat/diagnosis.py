"""How much of a model's attention an estimate would explain, before it is put in.

The share of the attention that an estimate explains is

    1 - |estimate - exact|^2 / |exact - uniform|^2

over the outputs of some queries: 1 is exact, 0 is what uniform weights reach, and below 0 the estimate is worse than
knowing nothing. A relative error does not tell these apart, as attention may be close to uniform anyway.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from schoenbat.attention import KernelAttention
from schoenbat.calibration import FittedFeatures
from schoenbat.errors import UserError
from schoenbat.estimate import WATCHER, Estimate
from schoenbat.features.plan import FeatureMap
from schoenbat.functional import check_shapes
from schoenbat.nn.mha import MultiheadKernelAttention
from schoenbat.ops._share import POOR, PoorEstimateWarning, compare_exactly
from schoenbat.ops.linear import attend
from schoenbat.ops.reference import AttentionInputs, fill_masked

__all__ = ["Head", "PoorEstimateWarning", "diagnose", "diagnose_tensors"]

NUM_FEATURES = (64, 128, 256, 512, 1024)
ENOUGH = 0.9


@dataclass(frozen=True)
class Head:
    """The diagnosis of one head of one layer.

    Attributes:
        layer, head: the name of the module, and the number of the head.
        largest, spread: of the kernel's arguments: the largest absolute value, and the mean over queries of the
            standard deviation over keys.
        shares: the share of the attention explained by each number of features.
        needed: the least of these that explains 0.9, or None.
    """

    layer: str
    head: int
    largest: float
    spread: float
    shares: Mapping[int, float]
    needed: int | None

    def __str__(self) -> str:
        shares = ", ".join(f"{num_features}: {share:.2f}" for num_features, share in self.shares.items())
        name = f"{self.layer}, head {self.head}" if self.layer else f"head {self.head}"
        return (
            f"{name}: arguments up to {self.largest:.3g}, spread {self.spread:.3g}; share explained by {shares}. "
            + self.verdict
        )

    @property
    def verdict(self) -> str:
        """A sentence that says whether the head can be replaced."""
        best = max(self.shares, key=lambda num_features: self.shares[num_features])
        if self.needed is not None:
            return f"It can be replaced with {self.needed} features."
        if self.shares[best] >= POOR:
            return f"It can be replaced with {best} features after further training."
        return "It cannot be replaced as it is: its attention is too sharp for an estimate of this size."


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
    num_features: tuple[int, ...] = NUM_FEATURES,
    layer: str = "",
) -> list[Head]:
    """Measure the share that `estimate` would explain of the attention of these tensors, per head, for each budget.

    Args:
        query, key, value, key_mask, is_causal, scale, self_attention: as for `Estimate.attend`.
        estimate: the settings, whose `num_features` is not used; the default of `Estimate` where it is None.
        num_features: the budgets.

    Raises:
        UserError: no budgets, or shapes that do not fit together.
    """
    _check_budgets(num_features)
    check_shapes(query, key, value)
    estimate = Estimate() if estimate is None else estimate
    inputs = estimate.prepare(query, key, value, key_mask, is_causal, scale=scale, self_attention=self_attention)
    return _look(layer, num_features, estimate, inputs)


def _check_budgets(num_features: Sequence[int]) -> None:
    if not isinstance(num_features, Sequence) or not num_features or None in num_features:
        raise UserError(f"num_features must be the numbers of features to try, such as (64, 256), not {num_features!r}")


def _look(
    layer: str,
    num_features: tuple[int, ...],
    estimate: Estimate,
    inputs: AttentionInputs,
    features: FeatureMap | None = None,
) -> list[Head]:
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
        shares: dict[int, list[float]] = {}
        for budget in num_features:
            if isinstance(features, FittedFeatures):
                own: FeatureMap = features.resized(budget)
            else:
                own = replace(estimate, num_features=budget).draw(query.shape[-1], inputs.scale, query.device)
            shares[budget] = exact.share_explained(attend(own, *inputs), dim=(0, 2, 3))
    heads = []
    for head in range(query.shape[1]):
        of_head = {budget: values[head] for budget, values in shares.items()}
        needed = next((budget for budget in sorted(of_head) if of_head[budget] >= ENOUGH), None)
        heads.append(Head(layer, head, largest[head], spread[head], of_head, needed))
    return heads


def diagnose(
    model: nn.Module, *inputs: Any, num_features: tuple[int, ...] = NUM_FEATURES, **named_inputs: Any
) -> list[Head]:
    """Run `diagnose_tensors` on every attention layer that model(*inputs, **named_inputs) calls.

    Looked at are torch's nn.MultiheadAttention, `schoenbat.MultiheadKernelAttention`, the kernelised mechanisms of
    `schoenbat.attention`, and models of transformers whose attn_implementation was registered by schoenbat. A layer of
    torch is taken for softmax attention, and a calibrated layer is looked at in its basis.

    Raises:
        UserError: no budgets; the model called no such layer, or one whose attention schoenbat does not have, such as
            that of nn.MultiheadAttention with add_bias_kv or a mask of pairs of tokens.
    """
    _check_budgets(num_features)
    found: list[Head] = []

    def take(layer: str, estimate: Estimate, inputs: AttentionInputs, features: FeatureMap | None = None) -> None:
        found.extend(_look(layer, num_features, estimate, inputs, features))

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
        with torch.no_grad():
            model(*inputs, **named_inputs)
    finally:
        WATCHER.reset(token)
        torch.backends.mha.set_fastpath_enabled(was_fused)
        for handle in handles:
            handle.remove()
    if not found:
        raise UserError(f"{type(model).__name__} called no attention layer that schoenbat knows")
    return found


def _of_torch(layer: str, take: Callable[..., None]) -> Callable[..., None]:
    def hook(module: nn.MultiheadAttention, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        given = dict(zip(names, arguments, strict=False)) | named
        twin = MultiheadKernelAttention(
            module.embed_dim,
            module.num_heads,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device=module.out_proj.weight.device,
            dtype=module.out_proj.weight.dtype,
            num_features=None,
        )
        twin.load_state_dict(module.state_dict())
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
