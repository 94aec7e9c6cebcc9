"""Attention through the features of least expected error; `rmfa` is the published form."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    is_random = True
    cost = "linear"
    paper = "this library, after arXiv 2505.12252"

    @classmethod
    def flops(cls, config: Config, *, length: int, head_dim: int) -> float:
        return 4.0 * length * head_dim * (config.num_features + head_dim)

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
        scale = query.shape[-1] ** -0.5
        weight = None if key_mask is None else key_mask[:, None, :, None].to(dtype)
        if self.centred:
            q, k, weight = _Centre.apply(q, k, weight, scale)
        # Scaling the projection saves a pass over queries and keys.
        projection = self.features.projection * scale**0.5
        return product_attention(q, k, v, projection, self.features.plan, weight).to(query.dtype)


class _Centre(torch.autograd.Function):
    """q - m, k - c, and the weights of the keys, exp(scale <m, k>) up to a factor common to all of them, which cancels.

    `counts` [B, 1, N, 1] is 1 for the tokens that are there and 0 for others, which get no weight; None is all ones.
    One operation to autograd instead of a dozen: for few tokens these would cost more than the arithmetic.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, counts: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = _mean(q, counts)
        exponent = (mean * scale) @ k.mT
        if counts is not None:
            exponent = exponent.masked_fill(counts.mT == 0, torch.finfo(k.dtype).min)
        weight = torch.softmax(exponent, -1).mT
        return q - mean, k - _mean(k, counts), weight if counts is None else weight * counts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output[2])

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, counts, weight = ctx.saved_tensors
        weighted = weight * grad_weight
        grad_exponent = (weighted - weight * weighted.sum(-2, keepdim=True)) * ctx.scale
        grad_mean = grad_exponent.mT @ k - grad_q.sum(-2, keepdim=True)
        grad_centre = -grad_k.sum(-2, keepdim=True)
        share = 1 / q.shape[-2] if counts is None else counts / _number(counts)
        return grad_q + grad_mean * share, grad_k + grad_centre * share + grad_exponent * _mean(q, counts), None, None


def _mean(x: Tensor, counts: Tensor | None) -> Tensor:
    """The mean token [B, H, 1, d]; 0 where no token counts."""
    if counts is None:
        return x.mean(-2, keepdim=True)
    return (x * counts).sum(-2, keepdim=True) / _number(counts)


def _number(counts: Tensor) -> Tensor:
    return counts.sum(-2, keepdim=True).clamp_min(1)
