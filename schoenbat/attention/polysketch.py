"""PolySketchFormer: polynomial weights through sketches whose products cannot be negative."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from schoenbat.attention import Attention, check_positive, sums_bytes
from schoenbat.kernels import Kernel
from schoenbat.ops.linear import causal_linear_attention, linear_attention


class Polysketch(Attention):
    r"""sum_j w_ij v_j / (1 + sum_j w_ij), w_ij an estimate of <q'_i, k'_j>^p (arXiv 2310.01655, Thm. 1.1, Algorithm 1).

    q' and k' are q and k after layer normalisation over the head, times head_dim^(-1/4). With r columns to each G,

        P_1(x) = x,    P_t(x) = (P_{t/2}(x) G_1) * (P'_{t/2}(x) G_2) / sqrt(r),    phi(x) = P_{p/2}(x) (x) P_{p/2}(x),

    all G independent and normal, P' an independent copy of P, * elementwise. <P_t(x), P_t(y)> is <x, y>^t on average;
    its square, the weight, is not negative and too large on average by the variance, which goes with 1 / r. For p = 2
    there is nothing to sketch. This is the random form; the learned one replaces G by networks. Causal attention goes
    through the sketch everywhere, where the paper takes exact weights within a block.

    The 1 in the denominator is a key of weight 1 and value 0, so the weights sum to less than one.

    Time n r^2 d and memory n r^2 of a head, r^2 <= num_features.
    """

    @dataclass(frozen=True)
    class Config:
        """Budget and degree.

        Attributes:
            num_features: r is the largest integer whose square is at most this.
            degree: p, a power of 2.
        """

        num_features: int = 128
        degree: int = 4

        def __post_init__(self) -> None:
            check_positive(num_features=self.num_features)
            if self.degree < 2 or self.degree & (self.degree - 1):
                raise ValueError(f"degree must be a power of 2 from 2 up, not {self.degree}")

    weights_sum_to_one = False
    is_random = True
    cost = "linear"
    paper = "Kacham et al., ICML 2024, arXiv 2310.01655"

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        columns = math.isqrt(config.num_features)
        degree = config.degree // 2
        # The first products take x, the later ones sketches.
        number, width = degree, head_dim
        self.levels = degree.bit_length() - 1
        for level in range(self.levels):
            gaussian = torch.randn(number, width, columns, generator=generator)
            self.register_buffer(f"projections_{level}", gaussian)
            number, width = number // 2, columns

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        width = head_dim if self.config.degree == 2 else math.isqrt(self.config.num_features)
        return sums_bytes(width**2 + 1, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        q_features, k_features = (_squared(self.sketch(_normalised(x))) for x in (q, k))
        # The last feature is that of the key of weight 1; its token comes first, where all later ones see it.
        q_features = F.pad(q_features, (0, 1), value=1.0)
        one = torch.zeros_like(q_features[..., :1, :])
        one[..., -1] = 1.0
        k_features = torch.cat([one, F.pad(k_features, (0, 1))], -2)
        v = F.pad(v, (0, 0, 1, 0))
        mask = None if key_mask is None else F.pad(key_mask, (1, 0), value=True)
        if is_causal:
            q_features = F.pad(q_features, (0, 0, 1, 0))
            return causal_linear_attention(q_features, k_features, v, mask)[..., 1:, :]
        return linear_attention(q_features, k_features, v, mask)

    def sketch(self, x: Tensor) -> Tensor:
        """Compute P_{p/2}: [..., head_dim] to [..., r], or x itself for p = 2."""
        sketches = x[..., None, :]
        for level in range(self.levels):
            projections = getattr(self, f"projections_{level}").to(x.dtype)
            projected = (sketches[..., None, :] @ projections)[..., 0, :]
            sketches = projected[..., 0::2, :] * projected[..., 1::2, :] / math.sqrt(projections.shape[-1])
        return sketches[..., 0, :]


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * x.shape[-1] ** -0.25


def _squared(x: Tensor) -> Tensor:
    return (x[..., :, None] * x[..., None, :]).flatten(-2)
