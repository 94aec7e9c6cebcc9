"""Dot-product-kernel attention with the names of torch.nn.functional.scaled_dot_product_attention."""

from collections.abc import Callable

import torch
from torch import Tensor

from schoenbat.errors import UserError
from schoenbat.estimate import Estimate
from schoenbat.features.plan import FeatureMap
from schoenbat.kernels import Kernel
from schoenbat.ops.linear import attend


def dot_product_kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    *,
    kernel: str | Kernel = "exp",
    num_features: int | None = 256,
    estimator: str = "sketch",
    seed: int = 0,
    normalize: bool = False,
    max_degree: int = 20,
    window: int = 0,
    heavy: int = 0,
    sinks: int = 4,
    features: Callable[[Tensor], Tensor] | None = None,
    key_mask: Tensor | None = None,
    block: int | None = None,
    self_attention: bool = False,
) -> Tensor:
    """Compute sum_j f(scale <q_i, k_j>) v_j / sum_j f(scale <q_i, k_j>), in time linear in the length.

    Args:
        query, key, value: [B, H, L, d], [B, Hk, S, d], [B, Hk, S, v], or all without heads, [B, L, d] and so on. Sums
            are taken in float32 or wider.
        attn_mask: only a mask of keys, bool and broadcastable to [B, 1, 1, S], True = attend. A mask of pairs has no
            meaning in linear time.
        dropout_p: must be 0, as there are no weights that could be dropped.
        is_causal: query i sees keys up to i; requires L = S.
        scale: 1 / sqrt(d) where it is None; a tensor of one number, or of one for each head, may be learned.
        enable_gqa: H may be a multiple of Hk; consecutive query heads share a key head.
        kernel, num_features, estimator, seed, normalize, max_degree, window, heavy, sinks: see `schoenbat.Estimate`.
            Draws are kept for further calls.
        features: any phi with <phi(x), phi(y)> close to f(<x, y>), instead of the above; a FeatureMap is made for the
            kernel that it was drawn for, another callable is applied to query and key times sqrt(scale) as they are.
        key_mask: [B, S] bool, True = attend; the shorter way to say it.
        block, self_attention: see `schoenbat.ops.linear.attend`.

    Returns:
        [B, H, L, v] in the dtype of `query`; 0 for a query that may attend to nothing.

    Raises:
        UserError: an argument that cannot be honoured, or dot products beyond the radius of convergence of `kernel`.
    """
    if dropout_p != 0:
        raise UserError(f"dropout_p must be 0, not {dropout_p}: linear attention has no weights to drop")
    for name, x in {"query": query, "key": key, "value": value}.items():
        if not x.is_floating_point():
            raise UserError(f"{name} must hold floating-point numbers, not {x.dtype}")
    if block is not None and block < 1:
        raise UserError(f"block must be at least 1 token, not {block}")
    query, key, value, has_heads = _with_heads(query, key, value)
    check_shapes(query, key, value)
    _check_use(query, key, is_causal, enable_gqa)
    key_mask = _one_mask(query, key, attn_mask, key_mask, has_heads)
    if features is None or isinstance(features, FeatureMap):
        kernel = kernel if features is None else features.kernel
        estimate = Estimate(kernel, num_features, estimator, seed, normalize, max_degree, window, heavy, sinks)
        out = estimate.attend(
            query,
            key,
            value,
            key_mask,
            is_causal,
            scale=scale,
            features=features,
            block=block,
            self_attention=self_attention,
        )
    else:
        inputs = Estimate().prepare(query, key, value, key_mask, is_causal, scale=scale)
        out = attend(features, *inputs[:6], block=block)
    return out if has_heads else out.squeeze(1)


def _with_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    dims = {x.ndim for x in (query, key, value)}
    if dims == {3}:
        return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), False
    if dims != {4}:
        raise UserError(
            "query, key and value must all be [batch, heads, length, width] or all [batch, length, width], "
            f"not {_shape(query)}, {_shape(key)} and {_shape(value)}"
        )
    return query, key, value, True


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise a UserError unless these are [B, H, L, d], [B, Hk, S, d] and [B, Hk, S, v], with H a multiple of Hk."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise UserError("nested tensors are not supported; pad them, and give a key_mask that is True at tokens")
    fits = query.ndim == key.ndim == 4 and query.shape[0] == key.shape[0] and query.shape[-1] == key.shape[-1]
    if not fits or key.shape[:3] != value.shape[:-1]:
        raise UserError(
            f"query {_shape(query)}, key {_shape(key)} and value {_shape(value)} do not fit together as "
            "[batch, heads, length, width]"
        )
    heads, key_heads = query.shape[1], key.shape[1]
    if not heads * key_heads * query.shape[-1]:
        raise UserError(f"query {_shape(query)} and key {_shape(key)} must have at least one head, of width 1 or more")
    if heads % key_heads:
        raise UserError(f"the {heads} heads of query are no multiple of the {key_heads} heads of key")


def _check_use(query: Tensor, key: Tensor, is_causal: bool, enable_gqa: bool) -> None:
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and not enable_gqa:
        raise UserError(f"query has {heads} heads and key {key_heads}; set enable_gqa to share key heads")
    if is_causal and query.shape[-2] != key.shape[-2]:
        raise UserError(f"is_causal needs as many queries as keys, not {query.shape[-2]} and {key.shape[-2]}")


def _one_mask(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None, has_heads: bool
) -> Tensor | None:
    """Return the mask of keys, [B, S], from whichever was given."""
    batch, keys = query.shape[0], key.shape[-2]
    if attn_mask is not None:
        if key_mask is not None:
            raise UserError("attn_mask and key_mask say the same thing; give one of them")
        dims = 4 if has_heads else 3
        shape = (1,) * (dims - attn_mask.ndim) + tuple(attn_mask.shape)
        of_keys = attn_mask.dtype == torch.bool and len(shape) == dims and set(shape[1:-1]) == {1}
        if not of_keys or shape[0] not in (1, batch) or shape[-1] not in (1, keys):
            raise UserError(
                f"attn_mask must be a bool mask of keys, broadcastable to [{batch}, 1, 1, {keys}], True = attend, not "
                f"{attn_mask.dtype} {_shape(attn_mask)}; a mask of pairs has no meaning in linear time"
            )
        return attn_mask.reshape(shape[0], shape[-1]).expand(batch, keys)
    return key_mask


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
