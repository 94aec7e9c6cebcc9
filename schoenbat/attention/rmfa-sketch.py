"""Attention through the features of least expected error; `rmfa` is the published form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schoenbat.attention import FLOAT_BYTES, MAX_DEGREE, MAX_FEATURES, KernelAttention, kept_bytes, sums_bytes
from schoenbat.estimate import Estimate
from schoenbat.kernels import Kernel
from schoenbat.ops._causal import chunk_length
from schoenbat.ops.linear import attend
from schoenbat.registry import check_bounds


class RmfaSketch(KernelAttention):
    """phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1) with phi from `schoenbat.features.sketch`, made for unit vectors.

    For exp, queries and keys are first shifted to where the estimate is best (`schoenbat.ops.linear`).
    """

    @dataclass(frozen=True)
    class Config:
        """Budget and degree.

        Attributes:
            num_features: features of all degrees together.
            max_degree: the highest degree that gets features.
        """

        num_features: int = 128
        max_degree: int = 20

        def __post_init__(self) -> None:
            check_bounds(self, num_features=(1, MAX_FEATURES), max_degree=(1, MAX_DEGREE))

    is_random = True
    cost = "linear"
    paper = "this library, after arXiv 2505.12252"

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        estimate = Estimate(self.kernel, config.num_features, normalize=True, max_degree=config.max_degree)
        self.features = estimate.make(head_dim, generator=generator)

    def state_bytes(self, *, length: int, head_dim: int) -> int:
        chunk = chunk_length(self.features)
        far = sums_bytes(self.features.plan.num_features, head_dim)
        if self.kernel.is_exponential:
            far += FLOAT_BYTES * head_dim
        if self.features.is_bounded or not self.gets_units:
            far += FLOAT_BYTES * (head_dim + 1) * head_dim
        # Complete chunks are summed up; the tokens since are kept, with the 1 beside each value.
        complete = length // chunk
        most = max(length % chunk, chunk - 1 if complete > 1 else 0)
        open_chunk = kept_bytes(most, head_dim) + FLOAT_BYTES * most
        alone = chunk - 1 if complete else length
        return max(far * (complete > 0) + open_chunk, kept_bytes(alone, head_dim) + FLOAT_BYTES * alone)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        scale, itself = q.shape[-1] ** -0.5, q.shape[2] == k.shape[2]
        bounded = None if self.gets_units else True
        return attend(self.features, q, k, v, key_mask, is_causal, scale, itself, bounded=bounded)
