"""How much of a model's attention an estimate would explain, before it is put in.

The share of the attention that an estimate explains is

    1 - |estimate - exact|^2 / |exact - uniform|^2

over the outputs of some queries: 1 is exact, 0 is what uniform weights reach, and below 0 the estimate is worse than
knowing nothing. A relative error does not tell these apart, as attention may be close to uniform anyway.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from schoenbat.attention import KernelAttention
from schoenbat.errors import UserError
from schoenbat.estimate import WATCHERS, Estimate
from schoenbat.features.plan import FeatureMap
from schoenbat.nn.mha import MultiheadKernelAttention
from schoenbat.ops.linear import attend
from schoenbat.ops.reference import fill_masked

NUM_FEATURES = (64, 128, 256, 512, 1024)
ENOUGH = 0.9
POOR = 0.5
_QUERIES = 64
"""Queries, spread over the sequence, on which outputs are compared."""


class PoorEstimateWarning(UserWarning):
    """A drop-in explains less than half of the attention that it stands for."""


@dataclass(frozen=True)
class Head:
    """What was found of one head of one layer.

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
    estimate: Estimate | None = None,
    num_features: tuple[int, ...] = NUM_FEATURES,
    layer: str = "",
) -> list[Head]:
    """The share that `estimate` would explain of the attention of these tensors, per head, for each budget.

    Args:
        query, key, value, key_mask, is_causal, scale: as for `Estimate.attend`.
        estimate: the settings, whose `num_features` is not used; the default of `Estimate` where it is None.
        num_features: the budgets.
    """
    estimate = Estimate() if estimate is None else estimate
    with torch.no_grad():
        query, key, value = query.detach(), key.detach(), fill_masked(value.detach(), key_mask)
        truth, uniform, scores, rows, allowed = _truth(estimate, query, key, value, key_mask, is_causal, scale)
        counts = allowed.sum(-1).clamp_min(1)
        mean = scores.sum(-1) / counts
        variance = (scores.square().sum(-1) / counts - mean.square()).clamp_min(0)
        largest = scores.abs().amax((0, 2, 3)).tolist()
        spread = variance.sqrt().mean((0, 2)).tolist()
        shares: dict[int, list[float]] = {}
        q, k, positive = estimate.prepare(query, key, scale, key_mask)
        for budget in num_features:
            features = replace(estimate, num_features=budget).draw(query.shape[-1], positive, query.device)
            found = attend(features, q, k, value, key_mask, is_causal, positive)
            shares[budget] = _share(found[:, :, rows], truth, uniform, dim=(0, 2, 3))
    heads = []
    for head in range(query.shape[1]):
        own = {budget: values[head] for budget, values in shares.items()}
        needed = next((budget for budget in sorted(own) if own[budget] >= ENOUGH), None)
        heads.append(Head(layer, head, largest[head], spread[head], own, needed))
    return heads


def diagnose(
    model: nn.Module, *inputs: Any, num_features: tuple[int, ...] = NUM_FEATURES, **named_inputs: Any
) -> list[Head]:
    """`diagnose_tensors` for every attention layer that model(*inputs, **named_inputs) calls.

    Looked at are torch's nn.MultiheadAttention, `schoenbat.MultiheadKernelAttention`, the kernelised mechanisms of
    `schoenbat.attention`, and models of transformers whose attn_implementation was registered by schoenbat. A layer of
    torch is taken for softmax attention.

    Raises:
        UserError: the model called no such layer.
    """
    found: list[Head] = []

    def take(layer: str, estimate: Estimate, *tensors: Any, scale: float | None = None) -> None:
        heads = diagnose_tensors(*tensors, scale=scale, estimate=estimate, num_features=num_features, layer=layer)
        found.extend(heads)

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
    try:
        WATCHERS.append(
            lambda estimate, q, k, v, mask, causal, scale, _: take(
                inside[-1] if inside else "", replace(estimate, normalize=False), q, k, v, mask, causal, scale=scale
            )
        )
        with torch.no_grad():
            model(*inputs, **named_inputs)
    finally:
        WATCHERS.pop()
        for handle in handles:
            handle.remove()
    if not found:
        raise UserError(f"{type(model).__name__} called no attention layer that schoenbat knows")
    return found


def warn_if_poor(
    estimate: Estimate,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    features: FeatureMap | None,
) -> None:
    """Warn, once for each Estimate, if the first batch shows that it explains less than half of the attention."""
    if features is None or estimate in _SEEN:
        return
    _SEEN.add(estimate)
    with torch.no_grad():
        query, key, value = query.detach(), key.detach(), fill_masked(value.detach(), key_mask)
        # A prepared query has been normalised.
        plain = replace(estimate, normalize=False)
        truth, uniform, _, rows, _ = _truth(plain, query, key, value, key_mask, is_causal, scale)
        found = attend(features, query, key, value, key_mask, is_causal, scale)[:, :, rows]
        try:
            (share,) = _share(found, truth, uniform, dim=(0, 1, 2, 3), keepdim=True)
        except RuntimeError:
            # Under vmap tensors have no values to look at.
            return
    if share < POOR:
        warnings.warn(
            f"{estimate.num_features} features explain {share:.0%} of the attention of this batch; "
            "schoenbat.diagnose says what would. Switch this off by "
            "warnings.simplefilter('ignore', schoenbat.PoorEstimateWarning)",
            PoorEstimateWarning,
            stacklevel=4,
        )


_SEEN: set[Estimate] = set()
WATCHERS.append(warn_if_poor)


def _truth(
    estimate: Estimate,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of some queries: exact and uniform outputs, the kernel's arguments [B, H, n, M], which queries, what they see."""
    q, k, positive = estimate.prepare(query, key, scale, key_mask)
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    k, v = (fill_masked(x.to(wide), key_mask).repeat_interleave(groups, 1) for x in (k, value))
    length, keys = query.shape[2], key.shape[2]
    rows = torch.linspace(0, length - 1, min(_QUERIES, length), device=query.device).long()
    allowed = torch.ones(len(rows), keys, dtype=torch.bool, device=query.device)
    if is_causal:
        allowed = torch.arange(keys, device=query.device) <= rows[:, None]
    allowed = allowed.expand(query.shape[0], 1, len(rows), keys)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    scores = positive * (q[:, :, rows].to(wide) @ k.mT).masked_fill(~allowed, 0.0)
    truth = estimate.function.normalise(scores, allowed) @ v
    counts = allowed.sum(-1, keepdim=True).clamp_min(1)
    return truth, allowed.to(wide) @ v / counts, scores, rows, allowed


def _share(found: Tensor, truth: Tensor, uniform: Tensor, dim: tuple[int, ...], keepdim: bool = False) -> list[float]:
    error = (found.to(truth.dtype) - truth).square().sum(dim, keepdim)
    distance = (truth - uniform).square().sum(dim, keepdim)
    # Attention that is uniform is explained by anything.
    share = 1 - error / distance.clamp_min(torch.finfo(truth.dtype).tiny)
    return torch.where(error <= 1e-10 * truth.square().sum(dim, keepdim), 1.0, share).flatten().tolist()


def _of_torch(layer: str, take: Callable[..., None]) -> Callable[..., None]:
    def hook(module: nn.MultiheadAttention, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        given = dict(zip(names, arguments, strict=False)) | named
        twin = MultiheadKernelAttention(
            module.embed_dim,
            module.num_heads,
            bias=module.in_proj_bias is not None,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            num_features=None,
        )
        twin.load_state_dict(module.state_dict())
        kept = {name: given[name] for name in ("key_padding_mask", "attn_mask") if given.get(name) is not None}
        is_causal = bool(named.get("is_causal", False))
        others = WATCHERS[:]
        WATCHERS[:] = [lambda estimate, q, k, v, mask, causal, scale, _: take(layer, Estimate(), q, k, v, mask, causal)]
        try:
            twin.to(given["query"].device)(given["query"], given["key"], given["value"], is_causal=is_causal, **kept)
        finally:
            WATCHERS[:] = others

    return hook


def _of_mechanism(layer: str, take: Callable[..., None]) -> Callable[..., None]:
    def hook(module: KernelAttention, arguments: tuple[Any, ...]) -> None:
        take(layer, Estimate(module.kernel), *arguments)

    return hook
