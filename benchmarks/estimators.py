"""What estimates of a kernel are worth on random vectors: features by degree, errors to expect, errors measured.

    python benchmarks/estimators.py OUT [--tokens 256] [--draws 10] [--num-features 16 32 64 128 256 512 1024]

writes OUT/estimators-degrees.csv, the features of each degree that `rmfa-sketch` takes; OUT/estimators-expected.csv,
its expected relative error of the kernel (both computed, for unit vectors in independent directions, with dot products
divided by sqrt(d)); OUT/estimators.csv, the errors measured, as `pipeline/stages/errors.py` defines them; and
OUT/estimators.svg. The dimension d is 32. Queries and keys are unit vectors times the root of a scale, with Gaussian
values, drawn anew for each draw and the same for all estimators:

- `isotropic`: independent directions;
- `shared mean`: all around one direction, with a mean cosine of 0.6;
- `8 clusters`: around eight directions, with a mean cosine of 0.6 within a cluster.

The scale is that of attention after pre-SBN, `cos/sqrt(d)`, or one at which the kernels differ: `cos`, or `0.9 cos`
where the radius of convergence is 1, and `2.83 cos` where it is infinite. There, softmax attention is far from uniform.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from pipeline.stages.errors import MAX_DEGREE, MEASURES, SPREADS, Vectors, measure
from schoenbat.features.allocation import Allocation, allocate
from schoenbat.kernels import KERNELS, Kernel

HEAD_DIM = 32
MEAN_COSINE = 0.6
LARGE = 2.83
POINTS = ("isotropic", "shared mean", "8 clusters")
LEAST_SHARE = -0.5
"""Where the axis of the figure ends: an estimate can be further off than uniform weights without bound."""


def allocations(budgets: Sequence[int]) -> dict[str, list[Allocation]]:
    """Return the allocation of each kernel at each budget, as `rmfa-sketch` makes it."""
    return {
        dotf: [
            allocate(
                KERNELS.get(dotf)(),
                head_dim=HEAD_DIM,
                num_features=budget,
                scale=HEAD_DIM**-0.5,
                max_degree=MAX_DEGREE,
                fixed_norm=True,
            )
            for budget in budgets
        ]
        for dotf in KERNELS.names()
    }


def degrees(found: dict[str, list[Allocation]], budgets: Sequence[int]) -> pd.DataFrame:
    """Tabulate the features of each degree by budget, and where they describe the degree exactly."""
    rows = []
    for dotf, of_kernel in found.items():
        shares = [{share.degree: share for share in allocation.shares} for allocation in of_kernel]
        for degree in sorted(set().union(*shares)):
            own = [by_degree.get(degree) for by_degree in shares]
            counts = [f"{share.num_features}{' (all)' * share.exact}" if share else "0" for share in own]
            rows.append([dotf, degree, *counts])
    return pd.DataFrame(rows, columns=["kernel", "degree", *map(str, budgets)])


def expected_errors(found: dict[str, list[Allocation]], budgets: Sequence[int]) -> pd.DataFrame:
    """Tabulate the root of the expected squared error over the mean of f^2, whose root is the size of f."""
    rows = [
        [dotf, f"{own[0].root_mean_square:.2g}", *(f"{allocation.expected_error:.1e}" for allocation in own)]
        for dotf, own in found.items()
    ]
    return pd.DataFrame(rows, columns=["kernel", "size of f", *map(str, budgets)])


def random_vectors(points: str, scale: float, tokens: int, seed: int) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, tokens, HEAD_DIM, generator=generator, dtype=torch.float64)
    if points != "isotropic":
        clusters = 1 if points == "shared mean" else int(points.split()[0])
        centres = _unit(torch.randn(clusters, HEAD_DIM, generator=generator, dtype=torch.float64))
        chosen = centres[torch.randint(0, clusters, (2, 1, tokens), generator=generator)]
        query, key = (
            math.sqrt(MEAN_COSINE) * centre + math.sqrt(1 - MEAN_COSINE) * _unit(x)
            for x, centre in zip((query, key), chosen, strict=True)
        )
    return Vectors(math.sqrt(scale) * _unit(query), math.sqrt(scale) * _unit(key), value)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def arguments_of(kernel: Kernel) -> Iterator[tuple[str, float]]:
    """Yield names and scales of the arguments at which a kernel is measured."""
    if kernel.radius > HEAD_DIM**-0.5:
        yield "cos/sqrt(d)", HEAD_DIM**-0.5
    wide = 1.0 if kernel.radius > 1 else 0.9 * kernel.radius
    yield ("cos" if wide == 1 else f"{wide:g} cos"), wide
    if math.isinf(kernel.radius):
        yield f"{LARGE:g} cos", LARGE


def measured_errors(budgets: Sequence[int], tokens: int, draws: int) -> pd.DataFrame:
    """Measure all kernels, arguments and points; one row per estimator and budget."""
    rows: list[dict[str, Any]] = []
    for dotf in KERNELS.names():
        kernel = KERNELS.get(dotf)()
        for argument, scale in arguments_of(kernel):
            for points in POINTS:
                sets = [random_vectors(points, scale, tokens, seed) for seed in range(draws)]
                found = measure(dotf, kernel, sets, scale, budgets)
                rows += [{"points": points, "argument": argument, **row} for row in found]
            print(f"{dotf}, {argument}: done", flush=True)
    table = pd.DataFrame(rows)
    table["share_explained"] = 1 - table.unexplained**2
    columns = [name for pair in zip(MEASURES, SPREADS, strict=True) for name in pair]
    keys = ["points", "argument", "dotf", "estimator", "num_features"]
    return table[[*keys, *columns, "share_explained"]]


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw the share explained over the number of features, kernel exp: a row per argument, a column per points."""
    # The same rows give the same bytes.
    rcParams.update({"svg.hashsalt": "schoenbat", "svg.fonttype": "none"})
    own = table[table.dotf == "exp"]
    arguments = list(dict.fromkeys(own.argument))
    figure = Figure(figsize=(3.2 * len(POINTS) + 2, 2.4 * len(arguments)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(arguments), len(POINTS), squeeze=False, sharex=True, sharey=True)
    for argument, line in zip(arguments, panels, strict=True):
        line[0].set_ylabel("share explained")
        for points, axes in zip(POINTS, line, strict=True):
            for estimator, marker in zip(dict.fromkeys(own.estimator), "os^Dv", strict=False):
                rows = own[(own.argument == argument) & (own.points == points) & (own.estimator == estimator)]
                spread = (2 * rows.unexplained * rows.unexplained_spread).where(rows.share_explained > LEAST_SHARE)
                axes.errorbar(rows.num_features, rows.share_explained, spread, label=estimator, marker=marker, ms=4)
            axes.axhline(0, color="0.5", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set(ylim=(LEAST_SHARE, 1.05), title=f"{points}; {argument}")
            axes.grid(color="0.9")
    for axes in panels[-1]:
        axes.set_xlabel("features")
    figure.legend(*panels[-1][-1].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the tables and the figure")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--num-features", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    budgets = arguments.num_features
    found = allocations(budgets)
    table = measured_errors(budgets, arguments.tokens, arguments.draws)
    for name, written in (
        ("estimators-degrees", degrees(found, budgets)),
        ("estimators-expected", expected_errors(found, budgets)),
        ("estimators", table),
    ):
        path = arguments.out / f"{name}.csv"
        written.to_csv(path, index=False, lineterminator="\n", float_format="%.5g")
    draw(pd.read_csv(arguments.out / "estimators.csv"), arguments.out / "estimators.svg")
    print(f"{len(table)} rows: {arguments.out / 'estimators.csv'}")


if __name__ == "__main__":
    main()
