"""Dot-product-kernel attention with the names of torch.nn.functional.scaled_dot_product_attention."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from schoenbat.errors import UserError
from schoenbat.features.estimators import centres_keys, check_estimator, make_features
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.ops.blockwise import attend, centre_keys
from schoenbat.ops.exact import exact_attention


def dot_product_kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    kernel: str | Kernel = "exp",
    num_features: int | None = 256,
    estimator: str = "sketch",
    seed: int = 0,
    features: Callable[[Tensor], Tensor] | None = None,
    centre: bool = False,
    key_mask: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """sum_j f(scale <q_i, k_j>) v_j / sum_j f(scale <q_i, k_j>), in time linear in the length.

    Args:
        query, key, value: [B, H, L, d], [B, Hk, S, d], [B, Hk, S, v], or all without heads, [B, L, d] and so on. Sums
            are taken in float32 or wider.
        attn_mask: only a mask of keys, bool and broadcastable to [B, 1, 1, S], True = attend. A mask of pairs has no
            meaning in linear time.
        dropout_p: must be 0, as there are no weights that could be dropped.
        is_causal: query i sees keys up to i; requires L = S.
        scale: 1 / sqrt(d) where it is None.
        enable_gqa: H may be a multiple of Hk; consecutive query heads share a key head.
        kernel: f, by name or itself, estimated through `num_features` features drawn from `seed`; the same arguments
            give the same result in every process. Draws are kept for further calls. With `num_features` None, f is
            evaluated exactly, in quadratic time.
        estimator: "sketch", or "maclaurin" as published, with 2 to 100 times the error; see
            `schoenbat.features.estimators`.
        features: phi with <phi(x), phi(y)> close to f(<x, y>), instead of the above; applied to query and key times
            sqrt(scale) each. Inside torch.compile and torch.func, give this.
        centre: whether `features` estimate exp, so that their error falls if the keys are centred first
            (`schoenbat.ops.blockwise.centre_keys`). Not with `is_causal`.
        key_mask: [B, S] bool, True = attend; the shorter way to say it.
        block: see `schoenbat.ops.blockwise.attend`.

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
    _check_shapes(query, key, value, is_causal, enable_gqa)
    key_mask = _one_mask(query, key, attn_mask, key_mask, has_heads)
    if centre and (features is None or is_causal):
        raise UserError("centre goes with features of your own, in attention that is not causal")
    q, k = share_scale(query, key, scale)
    if features is None:
        check_estimator(estimator)
        kernel = kernel_named(kernel) if isinstance(kernel, str) else kernel
        if not isinstance(kernel, Kernel):
            raise UserError(f"kernel must be a name or a Kernel, not {kernel!r}; see Kernel.from_callable")
        _check_radius(kernel, q, k, key_mask)
        if num_features is not None:
            features = draw_features(kernel, query.shape[-1], num_features, seed, query.device, estimator)
            centre = centres_keys(estimator, kernel) and not is_causal
    if features is None:
        assert isinstance(kernel, Kernel)
        # Autocast would round the scores after they were checked against the radius.
        with torch.autocast(query.device.type, enabled=False):
            out = exact_attention(q, k, value.to(q.dtype), kernel, key_mask, is_causal)
    else:
        k = centre_keys(k, key_mask) if centre else k
        out = attend(features, q, k, value, key_mask, is_causal, block)
    out = out.to(query.dtype)
    return out if has_heads else out.squeeze(1)


@functools.cache
def kernel_named(name: str) -> Kernel:
    """One instance per name, so that draws made for it are found again."""
    return KERNELS.get(name)()


def check_defined(kernel: Kernel, normalize: bool) -> None:
    """Raise UserError for a kernel that is not defined everywhere, unless query and key are put on the unit sphere."""
    if not math.isinf(kernel.radius) and not normalize:
        raise UserError(
            f"kernel {type(kernel).__name__} is defined for arguments below {kernel.radius:g} only; set normalize=True"
        )


def share_scale(query: Tensor, key: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Query and key in float32 or wider, times sqrt(scale) each; a negative sign goes to the query."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    root = math.sqrt(abs(factor))
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.to(dtype) * math.copysign(root, factor), key.to(dtype) * root


@functools.lru_cache(maxsize=64)
def draw_features(
    kernel: Kernel,
    head_dim: int,
    num_features: int,
    seed: int,
    device: torch.device,
    estimator: str = "sketch",
    max_degree: int = 20,
) -> nn.Module:
    """The feature map that these arguments stand for, drawn on the CPU so that devices agree."""
    # A tensor made in inference mode could never take part in training.
    with torch.inference_mode(False), torch.device("cpu"):
        features = make_features(
            estimator,
            kernel,
            head_dim=head_dim,
            num_features=num_features,
            max_degree=max_degree,
            generator=torch.Generator().manual_seed(seed),
        )
        return features.to(device)


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


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> None:
    fits = query.shape[0] == key.shape[0] and query.shape[-1] == key.shape[-1] and key.shape[:3] == value.shape[:3]
    if not fits:
        raise UserError(f"query {_shape(query)}, key {_shape(key)} and value {_shape(value)} do not fit together")
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and not enable_gqa:
        raise UserError(f"query has {heads} heads and key {key_heads}; set enable_gqa to share key heads")
    if heads % key_heads:
        raise UserError(f"the {heads} heads of query are no multiple of the {key_heads} heads of key")
    if is_causal and query.shape[-2] != key.shape[-2]:
        raise UserError(f"is_causal needs as many queries as keys, not {query.shape[-2]} and {key.shape[-2]}")


def _one_mask(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None, has_heads: bool
) -> Tensor | None:
    """[B, S] from whichever was given."""
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
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, keys)):
        raise UserError(f"key_mask must be bool [{batch}, {keys}], not {key_mask.dtype} {_shape(key_mask)}")
    return key_mask


def _check_radius(kernel: Kernel, q: Tensor, k: Tensor, key_mask: Tensor | None) -> None:
    if math.isinf(kernel.radius):
        return
    lengths = k.detach().norm(dim=-1)
    if key_mask is not None:
        lengths = lengths.masked_fill(~key_mask[:, None], 0.0)
    largest = float(q.detach().norm(dim=-1).amax() * lengths.amax()) if q.numel() and k.numel() else 0.0
    if not largest < kernel.radius:
        raise UserError(
            f"kernel {type(kernel).__name__} is defined for arguments below {kernel.radius:g}; scale |query| |key| "
            f"reaches {largest:.3g} here. Put query and key through schoenbat.norm.pre_sbn, or lower scale"
        )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
