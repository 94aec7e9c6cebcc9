"""Attention through the features of least expected error; `rmfa` is the published form."""

from dataclasses import dataclass

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
        q, k, v = scale_and_widen(query, key, value)
        if is_causal:
            return causal_linear_attention(self.features(q), self.features(k), v, key_mask).to(query.dtype)
        weight = None if key_mask is None else key_mask[:, None, :, None].to(v.dtype)
        if self.centred:
            mean = _mean(q, weight)
            k = k - _mean(k, weight)
            q = q - mean
            exponent = mean @ k.transpose(-1, -2)
            if key_mask is not None:
                exponent = exponent.masked_fill(~key_mask[:, None, None, :], torch.finfo(exponent.dtype).min)
            # exp up to a factor common to all keys, which cancels.
            factor = torch.softmax(exponent, -1).transpose(-1, -2)
            weight = factor if weight is None else factor * weight
        return product_attention(q, k, v, self.features.projection, self.features.plan, weight).to(query.dtype)


def _mean(x: Tensor, weight: Tensor | None) -> Tensor:
    """The mean token [B, H, 1, d]; 0 where no token counts."""
    if weight is None:
        return x.mean(-2, keepdim=True)
    return (x * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp_min(1)
