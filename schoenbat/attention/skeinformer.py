"""Skeinformer: softmax attention to the columns that matter, the others filled in by a geometric mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schoenbat.attention import Attention, check_positive
from schoenbat.kernels import Kernel
from schoenbat.ops.places import draw_seed, gather_tokens, hashed_uniform, masked_softmax, places_of, real_tokens
from schoenbat.ops.reference import divide


class Skeinformer(Attention):
    """Column sampling with adaptive row normalisation and pilot sampling (arXiv 2112.05359, Algorithm 1).

    1. m pilot rows J, uniform with replacement among the real queries: B_J, exact softmax rows.
    2. Column j has the score p_j = sqrt(sum_J B_Jj^2) |v_j|; m columns C are drawn without replacement in proportion.
    3. With A = exp(q k_C^T / sqrt(head_dim)) and g_i the geometric mean of row i of A,
       out_i = (A_i v_C + g_i sum over the other columns of v_j) / (sum A_i + (L - m) g_i).
    4. The rows J are replaced by B_J v.

    L and m are those of each example; published code takes m from the shortest of the batch. The draw without
    replacement takes the m largest log p_j + Gumbel noise; the noise of a token depends on the layer and on how many
    real tokens stand before it, so that padding changes nothing. No gradient goes through the draw. With m >= L it is
    softmax attention.

    Time n m d and memory n m of a head.
    """

    @dataclass(frozen=True)
    class Config:
        """The size of the samples.

        Attributes:
            num_samples: m, the pilot rows, and the columns.
        """

        num_samples: int = 128

        def __post_init__(self) -> None:
            check_positive(num_samples=self.num_samples)

    ignores_key_order = False
    has_causal_form = False
    has_cross_form = False
    is_random = True
    cost = "linear"
    paper = "Chen et al., NAACL 2022, arXiv 2112.05359"
    uniform: Tensor
    seed: Tensor

    def __init__(self, config: Config, *, head_dim: int, kernel: Kernel | None, generator: torch.Generator) -> None:
        super().__init__(config, head_dim=head_dim, kernel=kernel, generator=generator)
        self.register_buffer("uniform", torch.rand(config.num_samples, generator=generator, dtype=torch.float64))
        self.register_buffer("seed", draw_seed(generator))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        real = real_tokens(key_mask, k)
        places = places_of(self.uniform, real)
        pilot = masked_softmax(gather_tokens(q, places) @ k.mT, real[:, None, None])
        columns = self.columns(pilot.detach(), v.detach(), real)
        there = real[:, None].expand(-1, v.shape[1], -1).gather(-1, columns)[:, :, None]
        k_chosen, v_chosen = (x.gather(-2, columns[..., None].expand(*columns.shape, x.shape[-1])) for x in (k, v))

        scores = q @ k_chosen.mT
        number = there.sum(-1, keepdim=True)
        mean = scores.masked_fill(~there, 0.0).sum(-1, keepdim=True) / number.clamp_min(1)
        scores = scores.masked_fill(~there, torch.finfo(q.dtype).min)
        # A factor common to a row of A cancels.
        largest = scores.detach().amax(-1, keepdim=True)
        weights = (scores - largest).exp().masked_fill(~there, 0.0)
        filling = (mean - largest).exp().masked_fill(number == 0, 0.0)
        others = real.sum(-1)[:, None, None, None] - number
        rest = (v.sum(-2, keepdim=True) - v_chosen.sum(-2, keepdim=True)) * (others > 0)
        out = divide(weights @ v_chosen + filling * rest, weights.sum(-1, keepdim=True) + filling * others)
        return _replaced(out, places, pilot @ v)

    def columns(self, pilot: Tensor, v: Tensor, real: Tensor) -> Tensor:
        """Draw the columns [B, H, m]; masked ones only where fewer are real.

        Args:
            pilot: rows of softmax attention [B, H, m, M].
            v: [B, H, M, d].
            real: bool [B, M].
        """
        score = torch.linalg.vector_norm(pilot, dim=-2) * torch.linalg.vector_norm(v, dim=-1)
        gumbel = -(-hashed_uniform(self.seed, real.cumsum(-1)).log()).log()
        keys = score.clamp_min(torch.finfo(score.dtype).tiny).log() + gumbel[:, None]
        keys = keys.masked_fill(~real[:, None], -torch.inf)
        return keys.topk(min(self.config.num_samples, v.shape[-2]), -1).indices


def _replaced(out: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """Put `rows` [B, H, m, d] into `out` [B, H, N, d] at `places` [B, m], where the same place has the same row."""
    # Gathered, not scattered: the gradient of a row that was written twice would count twice.
    slots = torch.arange(places.shape[-1], device=out.device).expand_as(places)
    slot = torch.full((len(out), out.shape[-2]), -1, device=out.device).scatter_reduce(1, places, slots, "amax")
    return torch.where((slot >= 0)[:, None, :, None], gather_tokens(rows, slot.clamp_min(0)), out)
