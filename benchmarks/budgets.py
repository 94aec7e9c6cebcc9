"""Whether the error of softmax attention through the sketch ever rises with the number of features.

    python benchmarks/budgets.py OUT [--head-dims 32 64 128] [--arguments 1 3] [--sets 2] [--draws 2]

writes OUT/budgets.csv and OUT/budgets.svg: the norm of the output's error over the distance of the exact output from
that of uniform weights, pooled over sets of 256 vectors and draws of the features. Queries and keys are unit vectors,
`isotropic` or around 8 directions with a mean cosine of 0.6 within a cluster; dot products are multiplied by the
largest argument. Budgets are those around each complete degree, and some between.
"""

import argparse
import math
import warnings
from pathlib import Path

import pandas as pd
import torch
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from schoenbat import Estimate, PoorEstimateWarning

TOKENS = 256
LARGEST_BUDGET = 9000
KINDS = ("isotropic", "8 clusters")


def vectors(kind: str, head_dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query, key and value [1, 1, N, d]."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 1, TOKENS, head_dim, generator=generator)
    if kind == "8 clusters":
        centres = normalize(torch.randn(8, head_dim, generator=generator), dim=-1)
        chosen = centres[torch.randint(0, 8, (2, 1, 1, TOKENS), generator=generator)]
        query, key = (
            math.sqrt(0.6) * centre + math.sqrt(0.4) * normalize(x, dim=-1)
            for centre, x in zip(chosen, (query, key), strict=True)
        )
    return normalize(query, dim=-1), normalize(key, dim=-1), value


def budgets(head_dim: int) -> list[int]:
    """Return numbers of features around complete degrees and between them."""
    first, second, third = (math.comb(head_dim + degree, degree) for degree in (1, 2, 3))
    between = [first + round((second - first) * share) for share in (0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)]
    beyond = [second + 1, 2 * second, 4 * second, third, third + 1]
    found = [1, head_dim // 4, head_dim // 2, head_dim, first, first + 1, *between, second, *beyond]
    return sorted({number for number in found if number <= LARGEST_BUDGET})


def error(kind: str, head_dim: int, argument: float, num_features: int, sets: int, draws: int) -> float:
    """Measure the error over that of uniform weights."""
    wrong = distance = 0.0
    for seed in range(sets):
        query, key, value = vectors(kind, head_dim, seed)
        exact = Estimate("exp", None).attend(query, key, value, scale=argument)
        distance += float((exact - value.mean(2, keepdim=True)).square().sum())
        for draw in range(draws):
            found = Estimate("exp", num_features, seed=draw).attend(query, key, value, scale=argument)
            wrong += float((found - exact).square().sum()) / draws
    return math.sqrt(wrong / distance)


def draw_figure(table: pd.DataFrame, path: Path) -> None:
    """Draw the error over the number of features: a panel per kind and argument, a line per head_dim."""
    # The same rows give the same bytes.
    rcParams.update({"svg.hashsalt": "schoenbat", "svg.fonttype": "none"})
    groups = list(table.groupby(["largest_argument", "vectors"], sort=False))
    figure = Figure(figsize=(8, 2.6 * math.ceil(len(groups) / 2)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(math.ceil(len(groups) / 2), 2, squeeze=False, sharex=True, sharey=True).flatten()
    for ((argument, kind), own), axes in zip(groups, panels, strict=False):
        for (head_dim, rows), marker in zip(own.groupby("head_dim"), "os^Dv", strict=False):
            axes.plot(rows.num_features, rows.error, marker=marker, ms=3.5, label=f"head_dim {head_dim}")
        axes.set(xscale="log", yscale="log", title=f"{kind}, arguments up to {argument:g}", ylabel="error")
        axes.grid(color="0.9")
    for axes in panels[-2:]:
        axes.set_xlabel("features")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the table and the figure")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--arguments", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--sets", type=int, default=2)
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", PoorEstimateWarning)
    rows = [
        [kind, head_dim, argument, number, error(kind, head_dim, argument, number, options.sets, options.draws)]
        for argument in options.arguments
        for kind in KINDS
        for head_dim in options.head_dims
        for number in budgets(head_dim)
    ]
    table = pd.DataFrame(rows, columns=["vectors", "head_dim", "largest_argument", "num_features", "error"])
    path = options.out / "budgets.csv"
    table.to_csv(path, index=False, lineterminator="\n", float_format="%.4g")
    table = pd.read_csv(path)
    draw_figure(table, options.out / "budgets.svg")
    rises = table.groupby(["vectors", "head_dim", "largest_argument"]).error.diff() > 0
    print(f"{len(table)} rows: {path}; {int(rises.sum())} of them above the one before")


if __name__ == "__main__":
    main()
