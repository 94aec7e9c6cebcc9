"""Informer's ProbSparse attention: softmax for the queries that need it, the mean of the values for the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schoenbat.attention import Attention, check_positive
from schoenbat.kernels import Kernel
from schoenbat.ops.places import gather_tokens, masked_softmax, places_of, real_tokens


class Informer(Attention):
    """Exact softmax attention for the u queries of largest max_j s_ij - mean_j s_ij over u sampled keys, else mean(v).

    s = q k^T / sqrt(head_dim); arXiv 2012.07436, Eqs. 3-4 and Algorithm 1. The sample, uniform with replacement among
    the real keys, is that of the layer and the same for all queries; the authors draw one for each query. A masked
    query is not chosen, and a masked key is neither sampled nor averaged nor attended to. Published code divides the
    sampled sum by the number of all keys, and the one behind Skyformer's figures ignores the mask altogether.

    No gradient goes through the choice. There is no causal form: the measure of a query looks at all keys.

    Time n u d and memory n u of a head.
    """

    @dataclass(frozen=True)
    class Config:
        """The size of the sample.

        Attributes:
            num_samples: u, the sampled keys and the chosen queries.
        """

        num_samples: int = 128

        def __post_init__(self) -> None:
            check_positive(num_samples=self.num_samples)

    ignores_key_order = False
    has_causal_form = False
    has_cross_form = False
    is_random = True
    cost = "linear"
    paper = "Zhou et al., AAAI 2021, arXiv 2012.07436"
    uniform: Tensor

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        self.register_buffer("uniform", torch.rand(config.num_samples, generator=generator, dtype=torch.float64))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        real = real_tokens(key_mask, k)
        q = q * q.shape[-1] ** -0.5
        with torch.no_grad():
            scores = q @ gather_tokens(k, places_of(self.uniform, real)).mT
            measure = (scores.amax(-1) - scores.mean(-1)).masked_fill(~real[:, None], -torch.inf)
            chosen = measure.topk(min(self.config.num_samples, q.shape[-2]), -1).indices[..., None]
        queries = q.gather(-2, chosen.expand(-1, -1, -1, q.shape[-1]))
        attended = masked_softmax(queries @ k.mT, real[:, None, None]) @ v
        mean = v.sum(-2, keepdim=True) / real.sum(-1).clamp_min(1)[:, None, None, None]
        return mean.expand(*q.shape[:-1], -1).scatter(-2, chosen.expand_as(attended), attended)
