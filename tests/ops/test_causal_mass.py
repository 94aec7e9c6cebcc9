"""In causal attention the tokens far back, estimated, keep their weight against those nearby, which are exact."""

import math

import pytest
import torch

from schoenbat import Estimate
from schoenbat.ops._bounds import lost_mass


@pytest.mark.parametrize("size", [2.0, 4.0, 6.0])
def test_what_is_far_weighs_what_it_does_exactly_though_queries_are_cooled(size: float) -> None:
    """The log odds of the first half of the keys, mean over queries and 4 draws, within 0.4 of the exact ones.

    Queries of these lengths are cooled where the features do not describe exp; the weight of the far keys is mended by
    `lost_mass`. Without it the odds are off by 0.8, 4 and 8, with its sign reversed by twice that; with it by 0.15 to
    0.3.
    """
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 1, 512, 16, generator=generator)
    query = query / query.norm(dim=-1, keepdim=True) * size
    value = torch.zeros(1, 1, 512, 1)
    value[:, :, :256] = 1.0

    def log_odds(estimate: Estimate) -> torch.Tensor:
        share = estimate.attend(query, key, value, is_causal=True, scale=1.0)[0, 0, 300:, 0]
        return share.logit(1e-4).mean()

    found = torch.stack([log_odds(Estimate(num_features=64, seed=seed)) for seed in range(4)]).mean()
    assert abs(found - log_odds(Estimate(num_features=None))) < 0.4


@pytest.mark.parametrize("spread", [1.0, 4.0, 9.0])
@pytest.mark.parametrize("factor", [0.2, 0.7, 1.0])
def test_the_lost_mass_is_that_of_the_random_energy_model(spread: float, factor: float) -> None:
    """Before, across and beyond the edge at sqrt(2 log n) = 3.3, where the largest of n terms begins to decide."""
    count = 256

    def log_mean(spread: float) -> float:
        edge = math.sqrt(2 * math.log(count))
        return spread**2 / 2 if spread < edge else spread * edge - math.log(count)

    found = lost_mass(*(torch.tensor(x, dtype=torch.float64) for x in (spread**2, factor, count)))
    assert float(found) == pytest.approx(log_mean(spread) - log_mean(factor * spread))
