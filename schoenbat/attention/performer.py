"""FAVOR+: softmax attention through positive orthogonal random features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schoenbat.attention import Attention, check_positive, sums_bytes
from schoenbat.features.positive import orthogonal_gaussian
from schoenbat.kernels import Kernel
from schoenbat.ops.linear import causal_linear_attention, linear_attention


class Performer(Attention):
    r"""phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1), phi(x) = exp(W x - |x|^2 / 2) (arXiv 2009.14794, Lemma 1, Eqs. 5-7).

    x is q or k times head_dim^(-1/4), so that it estimates softmax(q k^T / sqrt(head_dim)); wrappers that scale once
    more estimate another softmax. The rows of W are orthogonal in blocks of head_dim, with the lengths of independent
    normal vectors. Masked keys have no feature; published code leaves them phi(0).

    exp is kept in range by factors that cancel: the largest exponent of a query and, of keys, the largest of a head
    among those that are there. In causal attention the latter would look ahead, so a constant takes its place:
    <w, k> - |k|^2 / 2 is at most |w|^2 / 2. Nothing is added to the features: the published 1e-4 outweighs them as soon
    as their exponents spread.

    The error falls with 1 / sqrt(num_features) for short vectors only. Time n m d and memory n m of a head.
    """

    @dataclass(frozen=True)
    class Config:
        """The budget.

        Attributes:
            num_features: m, the random features.
        """

        num_features: int = 128

        def __post_init__(self) -> None:
            check_positive(num_features=self.num_features)

    is_random = True
    cost = "linear"
    paper = "Choromanski et al., ICLR 2021, arXiv 2009.14794"
    vectors: Tensor

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        vectors = orthogonal_gaussian(config.num_features, head_dim, generator)
        self.register_buffer("vectors", vectors.to(torch.float32))

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        return sums_bytes(self.config.num_features, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        scale = q.shape[-1] ** -0.25
        vectors = self.vectors.to(q.dtype)
        # exp(-|q|^2 / 2) is common to all features of a query, so it cancels as well.
        q_exponent = (q * scale) @ vectors.T
        q_features = (q_exponent - q_exponent.detach().amax(-1, keepdim=True)).exp()
        k_exponent = (k * scale) @ vectors.T - (k * scale).square().sum(-1, keepdim=True) / 2
        if is_causal:
            largest = (vectors.square().sum(-1).amax() / 2 - 80).clamp_min(0.0)
            return causal_linear_attention(q_features, (k_exponent - largest).exp(), v, key_mask)
        if key_mask is not None:
            k_exponent = k_exponent.masked_fill(~key_mask[:, None, :, None], -torch.inf)
        largest = k_exponent.detach().amax((-1, -2), keepdim=True).clamp_min(torch.finfo(q.dtype).min)
        return linear_attention(q_features, (k_exponent - largest).exp(), v, key_mask)
