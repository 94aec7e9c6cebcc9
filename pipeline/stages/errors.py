"""Stage `errors`: how far each estimate of a kernel is from it, at equal numbers of features.

Two errors are measured against the exact kernel in float64, each as the norm of the difference over the norm of the
truth: of the matrix f(<q_i, k_j>), and of the attention output that its rows give with the values. A row of the result
holds the mean and the standard deviation over draws of the features.

Made-up queries and keys are unit vectors times the root of a scale, with Gaussian values, drawn anew for each draw and
the same for all estimators:

- `isotropic`: independent directions;
- `shared mean`: all around one direction, with a mean cosine of 0.6;
- `8 clusters`: around eight directions, with a mean cosine of 0.6 within a cluster.

The scale is that of attention after pre-SBN, `cos/sqrt(d)`, or one for which the kernels differ: `cos`, and `0.9 cos`
where the radius of convergence is 1. Of a trained cell, the queries, keys and values of all layers and heads are taken
from its best weights on the first test examples.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.devices import prepare_host
from pipeline.files import git_revision, write_csv
from pipeline.grid.cells import Cell, data_folder, data_meta
from pipeline.grid.params import ErrorsParams, Params
from pipeline.stages.train import model_of
from schoenbat.attention import Attention, scale_and_widen
from schoenbat.data.arrays import Dataset
from schoenbat.errors import UserError
from schoenbat.features.fourier import RandomFourier
from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.features.positive import PositiveRandom
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.ops.reference import divide
from schoenbat.training import load_model

COLUMNS = (
    "points",
    "argument",
    "dotf",
    "estimator",
    "num_features",
    "kernel_error",
    "kernel_spread",
    "output_error",
    "output_spread",
    "tokens",
    "draws",
    "head_dim",
    "torch",
    "git_revision",
)
HEAD_DIM = 32
MAX_DEGREE = 20
MEAN_COSINE = 0.6
EXAMPLES = 4
"""Test examples of a trained cell."""

Vectors = tuple[Tensor, Tensor, Tensor]
"""Query and key [G, N, d], whose dot products are the argument of the kernel, and value [G, N, v]."""
Weigh = Callable[[Tensor, Tensor], Tensor]
"""Estimated kernel values [G, N, N] from query and key."""
Draw = Callable[[torch.Generator], Weigh]
"""An estimate with the features that the generator gives."""


def run(params: Params, out: Path) -> None:
    """Measure the errors on made-up vectors and write `out`."""
    prepare_host(params.run.threads)
    rows: list[dict[str, Any]] = []
    for dotf in KERNELS.names():
        kernel = KERNELS.get(dotf)()
        wide = 0.9 if kernel.radius <= 1 else 1.0
        for argument, scale in (("cos/sqrt(d)", HEAD_DIM**-0.5), (f"{'' if wide == 1 else f'{wide:g} '}cos", wide)):
            for points in ("isotropic", "shared mean", "8 clusters"):
                sets = [_made_up(points, scale, params.errors.tokens, seed) for seed in range(params.errors.draws)]
                found = _measure(dotf, kernel, sets, scale, params.errors)
                rows += [{"points": points, "argument": argument, **row} for row in found]
            print(f"{dotf}, {argument}: done", flush=True)
    _write(out, rows, params)


def run_trained(params: Params, cell: Cell, out: Path) -> None:
    """Measure the errors on the queries, keys and values of a trained cell and write `out`.

    A kernel that is not defined for all of their products is left out.

    Raises:
        UserError: the cell has not been trained, or its texts have fewer than 2 tokens.
    """
    prepare_host(params.run.threads)
    vectors = _trained(params, cell)
    query, key, _ = vectors
    largest = float((query @ key.transpose(-1, -2)).abs().max())
    rows = []
    for dotf in KERNELS.names():
        kernel = KERNELS.get(dotf)()
        if largest >= kernel.radius:
            continue
        sets = [vectors] * params.errors.draws
        found = _measure(dotf, kernel, sets, query.shape[-1] ** -0.5, params.errors)
        rows += [{"points": f"trained {cell.id}", "argument": "<q, k>/sqrt(d)", **row} for row in found]
        print(f"{dotf}: done", flush=True)
    _write(out, [row | {"tokens": query.shape[-2], "head_dim": query.shape[-1]} for row in rows], params)


def _write(out: Path, rows: list[dict[str, Any]], params: Params) -> None:
    setting = {
        "tokens": params.errors.tokens,
        "draws": params.errors.draws,
        "head_dim": HEAD_DIM,
        "torch": torch.__version__,
        "git_revision": git_revision(),
    }
    write_csv(out, COLUMNS, [[(setting | row)[name] for name in COLUMNS] for row in rows])
    print(f"{len(rows)} rows: {out}")


def _made_up(points: str, scale: float, tokens: int, seed: int) -> Vectors:
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
    return math.sqrt(scale) * _unit(query), math.sqrt(scale) * _unit(key), value


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _trained(params: Params, cell: Cell) -> Vectors:
    """What the mechanisms of the trained model are given, all layers, examples and heads as one batch."""
    best = cell.run_folder(params.profile) / "best.pt"
    if not best.is_file():
        raise UserError(f"no {best}; train first: schoenbat-exp train {' '.join(cell.arguments())}")
    model = model_of(cell, params, data_meta(cell, params))
    model.load_state_dict(load_model(best)[0])
    dataset = Dataset(data_folder(params.profile, cell.task))
    batch = dataset.batch("test", torch.arange(EXAMPLES).numpy())
    tokens = min(params.errors.tokens, int(batch.key_mask.sum(-1).min()))
    if tokens < 2:
        raise UserError(f"the first test examples of {cell.task} are too short to measure errors on")
    seen: list[Vectors] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        query, key, value = (x[..., :tokens, :].flatten(0, 1).double() for x in arguments[:3])
        seen.append(scale_and_widen(query, key, value))

    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model.eval()(batch.tokens, batch.key_mask)
    query, key, value = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return query, key, value


def _measure(
    dotf: str, kernel: Kernel, sets: list[Vectors], scale: float, params: ErrorsParams
) -> Iterator[dict[str, Any]]:
    """One row per estimator and number of features; set i is for draw i."""
    head_dim = sets[0][0].shape[-1]
    truths = [kernel(query @ key.transpose(-1, -2)) for query, key, _ in sets]
    outputs = [_attend(truth, value) for truth, (_, _, value) in zip(truths, sets, strict=True)]
    for num_features in params.num_features:
        for name, draw in _estimators(dotf, kernel, head_dim, num_features, scale).items():
            kernel_errors, output_errors = [], []
            for seed, (query, key, value) in enumerate(sets):
                estimate = draw(torch.Generator().manual_seed(seed))(query, key)
                kernel_errors.append(_relative(estimate, truths[seed]))
                output_errors.append(_relative(_attend(estimate, value), outputs[seed]))
            yield {
                "dotf": dotf,
                "estimator": name,
                "num_features": num_features,
                "kernel_error": statistics.fmean(kernel_errors),
                "kernel_spread": statistics.stdev(kernel_errors),
                "output_error": statistics.fmean(output_errors),
                "output_spread": statistics.stdev(output_errors),
            }


def _estimators(dotf: str, kernel: Kernel, head_dim: int, num_features: int, scale: float) -> Mapping[str, Draw]:
    """What there is at `num_features`: by name, a draw of the features that gives their estimate."""
    seed = torch.Generator()

    def redrawn(features: Any, estimate: Callable[[nn.Module], Weigh] = _products) -> Draw:
        def draw(generator: torch.Generator) -> Weigh:
            features.resample(generator)
            return estimate(features)

        return draw

    def sketch(fixed_norm: bool) -> Sketch:
        return Sketch(
            kernel,
            head_dim=head_dim,
            num_features=num_features,
            max_degree=MAX_DEGREE,
            scale=scale,
            fixed_norm=fixed_norm,
            generator=seed,
        )

    published = RandomMaclaurin(
        kernel, head_dim=head_dim, num_features=num_features, max_degree=MAX_DEGREE, generator=seed
    )
    found = {"rmfa": redrawn(published)}
    if kernel.is_exponential:
        found["rmfa-sketch"] = redrawn(sketch(False), _centred_products)
        found["rmfa-sketch, not centred"] = redrawn(sketch(True))
    else:
        found["rmfa-sketch"] = redrawn(sketch(True))
    if num_features > head_dim:
        found["taylor1"] = lambda _: (
            lambda q, k: kernel.coefficient(0) + kernel.coefficient(1) * q @ k.transpose(-1, -2)
        )
    if dotf == "exp":
        found["FAVOR+"] = redrawn(PositiveRandom(head_dim=head_dim, num_features=num_features, generator=seed))
        if num_features % 2 == 0:
            found["random Fourier"] = redrawn(
                RandomFourier(head_dim=head_dim, num_features=num_features, generator=seed)
            )
    return found


def _products(features: nn.Module) -> Weigh:
    return lambda query, key: features(query) @ features(key).transpose(-1, -2)


def _centred_products(features: nn.Module) -> Weigh:
    """exp(<q, k>) = exp(<q, c>) exp(<m, k - c>) exp(<q - m, k - c>), with the last factor estimated."""

    def weigh(query: Tensor, key: Tensor) -> Tensor:
        mean, centre = query.mean(-2, keepdim=True), key.mean(-2, keepdim=True)
        exact = query @ centre.transpose(-1, -2) + mean @ (key - centre).transpose(-1, -2)
        return torch.exp(exact) * _products(features)(query - mean, key - centre)

    return weigh


def _attend(weights: Tensor, value: Tensor) -> Tensor:
    return divide(weights @ value, weights.sum(-1, keepdim=True))


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())
