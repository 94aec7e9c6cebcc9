"""Skyformer: the unnormalised Gaussian kernel through landmarks of queries and keys together."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from schoenbat.attention import Attention, check_positive
from schoenbat.kernels import Kernel
from schoenbat.ops.gaussian import gaussian_exponent
from schoenbat.ops.inverse import iterated_inverse
from schoenbat.ops.places import gather_tokens, places_of, real_tokens


class Skyformer(Attention):
    """kappa(q, Z) W kappa(Z, k) v, an estimate of `gaussian` (arXiv 2111.00035, Eqs. 4-6, Lemma 3, Sec. 4.4).

    kappa(a, b) = exp(-|a - b|^2 / 2) of q and k times head_dim^(-1/4); Z are m of the 2 L real queries and keys; with
    G = kappa(Z, Z) + gamma I and D = diag(G 1), W = D^(-1/2) inv6(D^(-1/2) G D^(-1/2)) D^(-1/2). inv6 is six steps of
    `schoenbat.ops.inverse`; on short inputs they are far from the inverse, so their number is part of the mechanism.
    `solve: cholesky` takes W = G^(-1) instead, which the paper does not.

    As in the repository, half of Z are queries and half keys, drawn with replacement (hence gamma), one draw for all
    heads; the draw is that of the layer. The repository draws anew in each pass, scales by 32^(-1/4) whatever head_dim
    is, and starts the inverse from a maximum over the batch.

    Time n m d + m^3 and memory n m of a head.
    """

    @dataclass(frozen=True)
    class Config:
        """Landmarks and their inverse.

        Attributes:
            num_landmarks: m, half queries and half keys.
            gamma: added to the diagonal of the landmarks' kernel.
            solve: six steps of an iteration, as published, or by Cholesky's decomposition.
        """

        num_landmarks: int = 128
        gamma: float = 0.1
        solve: Literal["iterated", "cholesky"] = "iterated"

        def __post_init__(self) -> None:
            check_positive(num_landmarks=self.num_landmarks)
            if self.gamma < 0:
                raise ValueError(f"gamma must not be negative, not {self.gamma}")

    weights_sum_to_one = False
    ignores_key_order = False
    has_causal_form = False
    has_cross_form = False
    is_random = True
    cost = "linear"
    paper = "Chen et al., NeurIPS 2021, arXiv 2111.00035"
    uniform: Tensor

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        uniform = torch.rand(config.num_landmarks, generator=generator, dtype=torch.float64)
        # Queries stand in the lower half of [0, 1) and keys in the upper one.
        half = torch.arange(config.num_landmarks) % 2
        self.register_buffer("uniform", (uniform + half) / 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        scale = q.shape[-1] ** -0.25
        q, k = q * scale, k * scale
        real = real_tokens(key_mask, k)
        landmarks = gather_tokens(torch.cat([q, k], -2), places_of(self.uniform, torch.cat([real, real], -1)))
        summary = self._solve(gaussian_exponent(landmarks, landmarks).exp(), gaussian_exponent(landmarks, k).exp() @ v)
        return gaussian_exponent(q, landmarks).exp() @ summary

    def _solve(self, matrix: Tensor, right: Tensor) -> Tensor:
        matrix = matrix + self.config.gamma * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        if self.config.solve == "cholesky":
            return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
        root = matrix.sum(-1, keepdim=True).rsqrt()
        return root * (iterated_inverse(root * matrix * root.mT) @ (root * right))
