"""Skyformer's unnormalised Gaussian kernel; `kernelized` is another mechanism, with a denominator."""

import torch
from torch import Tensor

from schoenbat.attention import Attention
from schoenbat.ops.gaussian import gaussian_exponent
from schoenbat.ops.places import allowed_pairs


class Gaussian(Attention):
    """sum_j exp(-|q_i - k_j|^2 / (2 sqrt(head_dim))) v_j, which nothing divides (arXiv 2111.00035, Eq. 3).

    It is D_Q^(-1/2) A D_K^(-1/2) V with A = exp(Q K^T / sqrt(head_dim)) and D of exp(|q|^2), exp(|k|^2). As there is no
    denominator, the output grows with the number of keys that are near, and is no mean of values. A query far from all
    keys gets exactly 0, and no gradient.

    Time n^2 d and memory n^2 of a head.
    """

    weights_sum_to_one = False
    cost = "quadratic"
    paper = "Chen et al., NeurIPS 2021, arXiv 2111.00035"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        scale = q.shape[-1] ** -0.25
        exponent = gaussian_exponent(q * scale, k * scale)
        if key_mask is not None or is_causal:
            allowed = allowed_pairs(key_mask, is_causal, q.shape[-2], k.shape[-2], q.device)
            exponent = exponent.masked_fill(~allowed, -torch.inf)
        return exponent.exp() @ v
