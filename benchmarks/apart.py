"""How far off an estimate is where queries and keys vary in different directions.

    python benchmarks/apart.py [--kernels exp power2 ...] [--head-dims 8 32 64] [--decays 0 0.5 1 1.5] [--sizes 0.5 2 8]
        [--num-features 1 4 ...]

Query, key and value are random projections of the same tokens, whose i-th of 64 coordinates has the size i^-decay, or
the value is independent of them; 256 tokens, two examples, three sets of vectors, three draws of features for each. For
exp attention is computed with and without `self_attention`, its scale is 1 / sqrt(head_dim), and a query is `size`
times as long as a key; for other kernels the largest argument is 0.9 times the lesser of the radius and 1. Printed are,
for each kernel and number of features, the largest norm of the output's error over its norm for uniform weights, pooled
over draws, and how many points are above 1.05.
"""

import argparse
import itertools
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from schoenbat import Estimate, PoorEstimateWarning

LENGTH, WIDTH, SEEDS, DRAWS, LIMIT = 256, 64, 3, 3, 1.05
NUM_FEATURES = (1, 4, 8, 16, 24, 31, 33, 48, 64, 128, 256, 512, 1024)


def vectors(seed: int, head_dim: int, decay: float, size: float, is_alike: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [2, 1, N, d]; the value is of the same tokens where `is_alike`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, LENGTH, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1) ** -decay
    tokens = tokens / tokens.square().sum(-1).mean().sqrt() * math.sqrt(WIDTH)
    maps = torch.randn(3, WIDTH, head_dim, generator=generator) / math.sqrt(WIDTH)
    query, key, value = (tokens @ each for each in maps)
    if not is_alike:
        value = torch.randn(2, LENGTH, head_dim, generator=generator)
    return size * query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)


def errors(
    dotf: str, self_attention: bool, num_features: list[int], query: Tensor, key: Tensor, value: Tensor
) -> Iterator[float]:
    """For each number of features the error over that of uniform weights, pooled over draws."""
    exact = Estimate(dotf, None)
    scale = query.shape[-1] ** -0.5
    if not exact.function.is_exponential:
        scale = 0.9 * min(exact.function.radius, 1) / float(query.norm(dim=-1).max() * key.norm(dim=-1).max())
    truth = exact.attend(query, key, value, scale=scale)
    distance = (truth - value.mean(2, keepdim=True)).square().sum()
    for count in num_features:
        estimates = (Estimate(dotf, count, seed=seed) for seed in range(DRAWS))
        found = [each.attend(query, key, value, scale=scale, self_attention=self_attention) for each in estimates]
        yield math.sqrt(sum(float((out - truth).square().sum() / distance) for out in found) / DRAWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["exp"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[8, 32, 64])
    parser.add_argument("--decays", nargs="+", type=float, default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.5, 2.0, 8.0])
    parser.add_argument("--num-features", nargs="+", type=int, default=list(NUM_FEATURES))
    options = parser.parse_args()
    warnings.simplefilter("ignore", PoorEstimateWarning)
    for dotf in options.kernels:
        largest, above, points = dict.fromkeys(options.num_features, 0.0), 0, 0
        of_itself = (False, True) if Estimate(dotf, None).function.is_exponential else (False,)
        settings = (options.head_dims, options.decays, options.sizes, (False, True), of_itself, range(SEEDS))
        for head_dim, decay, size, is_alike, self_attention, seed in itertools.product(*settings):
            tensors = vectors(seed, head_dim, decay, size, is_alike)
            for count, error in zip(
                options.num_features, errors(dotf, self_attention, options.num_features, *tensors), strict=True
            ):
                largest[count] = max(largest[count], error)
                above, points = above + (error > LIMIT), points + 1
        print(dotf, ", ".join(f"{count}: {error:.2f}" for count, error in largest.items()))
        print(f"{above} of {points} above {LIMIT}")


if __name__ == "__main__":
    main()
