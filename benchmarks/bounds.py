"""Whether the estimate of a kernel is ever worse than uniform weights, or gets worse with more features.

    python benchmarks/bounds.py [--kernels 200] [--points 3] [--draws 3] [--jobs 1] [--vectors FILE] [--out bounds.csv]

For each random kernel with non-negative coefficients and weights (tests/random_kernels.py), at `--points` random pairs
of head_dim and length, over numbers of features from 1 to 1,024: the norm of the output's error over the norm of the
distance of the exact output from the mean value, pooled over draws of the features. 1 is uniform attention. Vectors are
of unit length, or gathered: of unequal lengths, with a shared mean and few directions, as trained ones are; or the
queries, keys and values [B, H, N, d] of a torch file. A row is flagged above 1.05, and where the error rises by more
than 5 % and three standard deviations of its draws from one number of features to the next.
"""

import argparse
import csv
import functools
import math
import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schoenbat import Estimate, Kernel, PoorEstimateWarning
from schoenbat.ops.reference import kernel_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from random_kernels import unsigned_kernels

HEAD_DIMS = (1, 2, 3, 8, 32, 64, 128)
LENGTHS = (2, 3, 7, 33, 256, 2048)
NUM_FEATURES = (1, 4, 16, 64, 256, 1024)
LIMIT = 1.05


class Row(NamedTuple):
    kernel: str
    vectors: str
    head_dim: int
    length: int
    num_features: int
    error: float
    spread: float
    is_bad: bool


def made_up(kind: str, head_dim: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [1, 2, N, d], with vectors of at most unit length."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 2, length, head_dim, generator=generator, dtype=torch.float64).unbind(0)
    if kind == "gathered":
        scales = 0.7 ** torch.arange(head_dim, dtype=torch.float64)
        centre = torch.randn(2, 1, 2, 1, head_dim, generator=generator, dtype=torch.float64)
        query, key = query * scales + 0.5 * centre[0], key * scales + 0.5 * centre[1]
        return query / query.norm(dim=-1).amax(), key / key.norm(dim=-1).amax(), value
    return query / query.norm(dim=-1, keepdim=True), key / key.norm(dim=-1, keepdim=True), value


def measure(name: str, kernel: Kernel, kind: str, tensors: tuple[Tensor, Tensor, Tensor], draws: int) -> Iterator[Row]:
    """One row for each number of features; none where exact attention is uniform."""
    query, key, value = tensors
    # The largest argument lies inside the radius.
    scale = min(1.0, 0.9 * kernel.radius)
    exact = kernel_attention(scale * query, key, value, kernel)
    distance = float((exact - value.mean(-2, keepdim=True)).norm())
    if distance < 1e-6 * float(exact.norm()):
        return
    before: tuple[float, float] | None = None
    for num_features in NUM_FEATURES:
        errors = []
        for seed in range(draws):
            estimate = Estimate(kernel, num_features, seed=seed, max_degree=12)
            # Not the cached draw: there are too many of them.
            features = estimate.make(query.shape[-1], scale)
            found = estimate.attend(query, key, value, scale=scale, features=features)
            errors.append(float((found - exact).norm()) / distance)
        error = math.sqrt(sum(e**2 for e in errors) / draws)
        spread = float(torch.tensor(errors).std()) if draws > 1 else 0.0
        rises = before is not None and error > before[0] * 1.05 + 3 * max(spread, before[1]) + 1e-3
        yield Row(name, kind, query.shape[-1], query.shape[-2], num_features, error, spread, error > LIMIT or rises)
        before = error, spread


def points(seed: int, count: int) -> Iterator[tuple[str, int, int]]:
    """Seeded choices of vectors, head_dim and length."""
    generator = torch.Generator().manual_seed(seed)

    def choose(choices: tuple[Any, ...]) -> Any:
        return choices[int(torch.randint(0, len(choices), (1,), generator=generator))]

    for _ in range(count):
        yield choose(("unit", "gathered")), choose(HEAD_DIMS), choose(LENGTHS)


def rows_of(index: int, points_each: int, draws: int, vectors: Path | None) -> list[Row]:
    """All rows of one of the kernels."""
    name, kernel = list(unsigned_kernels(0).items())[index]
    rows: list[Row] = []
    if vectors is not None:
        query, key, value = torch.load(vectors)
        size = math.sqrt(float(query.norm(dim=-1).amax() * key.norm(dim=-1).amax()))
        return list(measure(name, kernel, vectors.stem, (query / size, key / size, value), draws))
    for point, (kind, head_dim, length) in enumerate(points(index, points_each)):
        rows += measure(name, kernel, kind, made_up(kind, head_dim, length, 1000 * index + point), draws)
    return rows


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PoorEstimateWarning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=int, default=200)
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bounds.csv"))
    options = parser.parse_args()
    measure_kernel = functools.partial(
        rows_of, points_each=options.points, draws=options.draws, vectors=options.vectors
    )
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), _prepare) as pool:
        rows = [row for found in pool.map(measure_kernel, range(options.kernels)) for row in found]
    with options.out.open("w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *rows])
    bad = [row for row in rows if row.is_bad]
    for row in bad:
        print(*row)
    print(f"{len(rows)} rows, {len(bad)} bad; largest error {max(row.error for row in rows):.3f}")


if __name__ == "__main__":
    main()
