"""Attention through the features of least expected error; `rmfa` is the published form."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from schoenbat.attention import KernelAttention, scale_and_widen
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import Kernel
from schoenbat.ops.linear import causal_linear_attention
from schoenbat.ops.products import product_attention


class RmfaSketch(KernelAttention):
    r"""phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1) with phi from `schoenbat.features.sketch`, made for unit vectors.

    For exp, queries and keys are first centred at their means m and c. As

        exp(<q, k>) = exp(<q, c>) exp(<m, k - c>) exp(<q - m, k - c>)

    and the first factor is the same for all keys, nothing changes but that phi sees shorter vectors, whose products the
    low degrees describe better; the second factor weights the keys. Causal attention is not centred: the means would
    tell a token of the ones after it.
    """

    @dataclass(frozen=True)
    class Config:
        """`centre` has no effect on kernels other than exp."""

        num_features: int = 128
        max_degree: int = 20
        centre: bool = True

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        self.centred = config.centre and self.kernel.is_exponential
        self.features = Sketch(
            self.kernel,
            head_dim=head_dim,
            num_features=config.num_features,
            max_degree=config.max_degree,
            scale=head_dim**-0.5,
            fixed_norm=not self.centred,
            generator=generator,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if is_causal:
            q, k, v = scale_and_widen(query, key, value)
            return causal_linear_attention(self.features(q), self.features(k), v, key_mask).to(query.dtype)
        dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
        weight = None if key_mask is None else key_mask[:, None, :, None].to(dtype)
        scale = query.shape[-1] ** -0.5
        if self.centred:
            q, k, weight = _Centre.apply(q, k, weight, scale)
        projection = self.features.projection * scale**0.5
        return product_attention(q, k, v, projection, self.features.plan, weight).to(query.dtype)


class _Centre(torch.autograd.Function):
    """q - m, k - c, and exp(scale <m, k>) up to a factor common to all keys, 0 where `weight` (of 0 and 1, or None) is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = _mean(q, weight)
        exponent = (mean * scale) @ k.mT
        if weight is not None:
            exponent = exponent.masked_fill(weight.mT == 0, torch.finfo(k.dtype).min)
        factor = torch.softmax(exponent, -1).mT
        return q - mean, k - _mean(k, weight), factor if weight is None else factor * weight

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, weight, scale = inputs
        ctx.save_for_backward(q, k, weight, output[2])
        ctx.scale = scale  # type: ignore[attr-defined]

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_q: Tensor, grad_k: Tensor, grad_factor: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        q, k, weight, factor = ctx.saved_tensors  # type: ignore[attr-defined]
        weighted = factor * grad_factor
        grad_exponent = (weighted - factor * weighted.sum(-2, keepdim=True)) * ctx.scale  # type: ignore[attr-defined]
        grad_mean = grad_exponent.mT @ k - grad_q.sum(-2, keepdim=True)
        grad_q = grad_q + _spread(grad_mean, q, weight)
        grad_k = grad_k - _spread(grad_k.sum(-2, keepdim=True), k, weight) + grad_exponent * _mean(q, weight)
        return grad_q, grad_k, None, None


def _mean(x: Tensor, weight: Tensor | None) -> Tensor:
    """The mean token [B, H, 1, d]; 0 where no token counts."""
    if weight is None:
        return x.mean(-2, keepdim=True)
    return (x * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp_min(1)


def _spread(grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of x, from that of its mean token."""
    if weight is None:
        return grad / x.shape[-2]
    return grad / weight.sum(-2, keepdim=True).clamp_min(1) * weight
