"""The features for exp that the method is compared with estimate it without bias."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from schoenbat.features.fourier import RandomFourier
from schoenbat.features.positive import PositiveRandom

BOTH = pytest.mark.parametrize("rival", [PositiveRandom, RandomFourier])


@BOTH
@pytest.mark.parametrize("cosine", [-0.5, 0.9])
def test_the_estimate_is_unbiased(rival: Callable[..., nn.Module], cosine: float) -> None:
    # A z test at 5 standard errors over 2,000 draws, four of them: a false-alarm rate below 3e-6, with a fixed seed.
    x = torch.zeros(2, 4)
    x[:, 0] = torch.tensor([1, cosine])
    x[1, 1] = math.sqrt(1 - cosine**2)
    generator = torch.Generator().manual_seed(0)
    features = rival(head_dim=4, num_features=6, generator=generator)
    estimates = []
    for _ in range(2000):
        features.resample(generator)
        first, second = features(x)
        estimates.append(float(first @ second))
    found = torch.tensor(estimates)
    assert abs(float(found.mean()) - math.exp(cosine)) < 5 * float(found.std()) / math.sqrt(len(found))


@BOTH
def test_sizes_that_cannot_be_are_refused(rival: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"num_features must be .*, not 0"):
        rival(head_dim=4, num_features=0, generator=torch.Generator())


def test_positive_features_are_positive_and_their_vectors_orthogonal() -> None:
    features = PositiveRandom(head_dim=8, num_features=20, generator=torch.Generator().manual_seed(0))
    assert features(torch.randn(50, 8, generator=torch.Generator().manual_seed(1))).min() > 0
    products = features.vectors[:8] @ features.vectors[:8].T
    torch.testing.assert_close(products, torch.diag(products.diagonal()), rtol=0, atol=1e-4)
