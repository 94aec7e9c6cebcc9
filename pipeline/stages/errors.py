"""Stage `errors`: how much of a trained cell's attention each estimate of its kernel explains, at equal budgets.

The queries, keys and values of all layers and heads are taken from the cell's best weights on the first test examples.
Three figures compare each estimate with the exact kernel in float64. A row of the result holds their means and standard
deviations over draws of the features:

- `kernel_error`: of the matrix f(<q_i, k_j>), the norm of the difference over the norm of the exact matrix;
- `output_error`: the same of the attention output, which is what `schoenbat.ops.linear.attend` gives;
- `unexplained`: the norm of the output's error over the distance of the exact output from that of uniform weights. It
  is 1 for uniform attention; 1 - unexplained^2 is the share of the attention explained.

A cell trained through features has learned with one draw of them. That draw has a row of its own, `ATTN as trained`,
without spreads. `benchmarks/estimators.py` measures the same figures on random vectors.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.grid.cells import Cell, resolve
from pipeline.grid.params import Params
from pipeline.host.devices import prepare_host
from pipeline.host.files import git_revision, write_csv
from schoenbat.attention import Attention, scale_and_widen
from schoenbat.errors import UserError
from schoenbat.estimate import Estimate
from schoenbat.features.fourier import RandomFourier
from schoenbat.features.plan import FeatureMap
from schoenbat.features.positive import PositiveRandom
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.encoder import Classifier
from schoenbat.lra.training import load_model
from schoenbat.ops.linear import attend
from schoenbat.ops.reference import kernel_attention

MEASURES = ("kernel_error", "output_error", "unexplained")
SPREADS = ("kernel_spread", "output_spread", "unexplained_spread")
MAX_DEGREE = 20
EXAMPLES = 4
"""Test examples that vectors are taken from."""


class Vectors(NamedTuple):
    """Query and key [G, N, d], whose dot products are the argument of the kernel, and value [G, N, v]."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Truth:
    """The exact kernel matrix f [G, N, N], the exact attention output, and the output of uniform weights."""

    kernel: Tensor
    output: Tensor
    uniform: Tensor

    @staticmethod
    def of(kernel: Kernel, vectors: Vectors) -> "Truth":
        query, key, value = vectors
        output = kernel_attention(query[None], key[None], value[None], kernel)[0]
        return Truth(kernel(query @ key.mT), output, value.mean(-2, keepdim=True))

    def errors(self, weights: Tensor, output: Tensor) -> tuple[float, float, float]:
        """Return the three figures of an estimate, in the order of `MEASURES`."""
        off = (output - self.output).norm()
        known = ((weights - self.kernel).norm() / self.kernel.norm(), off / self.output.norm())
        return float(known[0]), float(known[1]), float(off / (self.output - self.uniform).norm())


Row = dict[str, Any]
Features = FeatureMap | Callable[[Tensor], Tensor]
Draw = Callable[[torch.Generator], Features]
"""Draws features from a generator."""


def run(params: Params, cell: Cell, out: Path) -> None:
    """Measure the errors of estimates of a cell's kernel, exp where it has none, on its vectors, and write `out`.

    Raises:
        UserError: the cell has not been trained, or its texts have fewer than 2 tokens.
    """
    prepare_host(params.run.threads)
    layers = _trained(params, cell)
    vectors = Vectors(*map(torch.cat, zip(*(scale_and_widen(*seen) for _, seen in layers), strict=True)))
    query, dotf = vectors.query, cell.dotf or "exp"
    units = all(bool((x.norm(dim=-1) < 1 + 1e-5).all()) for _, seen in layers for x in (seen.query, seen.key))
    kernel, sets = KERNELS.get(dotf)(), [vectors] * params.errors.draws
    rows = list(measure(dotf, kernel, sets, query.shape[-1] ** -0.5, params.errors.num_features, units))
    if isinstance(getattr(layers[0][0], "features", None), FeatureMap):
        rows.append(_measure_own(cell, kernel, layers, vectors))
    about = {"points": f"trained {cell.id}", "argument": "<q, k>/sqrt(d)"}
    setting = {
        "tokens": query.shape[-2],
        "draws": params.errors.draws,
        "head_dim": query.shape[-1],
        "torch": torch.__version__,
        "git_revision": git_revision(),
    }
    write_csv(out, [about | row | setting for row in rows])
    print(f"{len(rows)} rows: {out}")


def _trained(params: Params, cell: Cell) -> list[tuple[Attention, Vectors]]:
    """Return the mechanism of each layer of the trained model and its inputs for all examples and heads, not scaled."""
    setup = resolve(params, cell)
    best = setup.results.best
    if not best.is_file():
        raise UserError(f"no {best}; train first: schoenbat-exp train {' '.join(cell.arguments())}")
    data: Dataset = setup.data
    model: Classifier = setup.build_model(data.meta)
    model.load_state_dict(load_model(best)[0])
    batch = data.batch("test", torch.arange(EXAMPLES).numpy())
    tokens = min(params.errors.tokens, int(batch.key_mask.sum(-1).min()))
    if tokens < 2:
        raise UserError(f"the first test examples of {cell.task} are too short to measure errors on")
    seen: list[tuple[Attention, Vectors]] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        seen.append((module, Vectors(*(x[..., :tokens, :].flatten(0, 1).double() for x in arguments[:3]))))

    hooks = [module.register_forward_pre_hook(keep) for module in model.modules() if isinstance(module, Attention)]
    with torch.no_grad():
        model.eval()(batch.tokens, batch.key_mask)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def measure(
    dotf: str, kernel: Kernel, sets: list[Vectors], scale: float, budgets: Sequence[int], units: bool = True
) -> Iterator[Row]:
    """Yield one row per estimator and number of features; set i is for draw i.

    Args:
        scale: the largest argument of the kernel, if all vectors are `units` times its root.
        budgets: numbers of features.
    """
    truths = [Truth.of(kernel, vectors) for vectors in sets]
    for num_features in budgets:
        for name, draw in _estimators(dotf, kernel, sets[0].query.shape[-1], num_features, scale).items():
            found = []
            for seed, (vectors, truth) in enumerate(zip(sets, truths, strict=True)):
                features = draw(torch.Generator().manual_seed(seed))
                found.append(truth.errors(_weights(features, vectors), _output(features, vectors, units)))
            columns = list(zip(*found, strict=True))
            yield _row(dotf, name, num_features, map(statistics.fmean, columns), map(statistics.stdev, columns))


@torch.no_grad()
def _measure_own(cell: Cell, kernel: Kernel, layers: list[tuple[Attention, Vectors]], vectors: Vectors) -> Row:
    """Return the row of the draw that the cell was trained with, by its own mechanisms on their own vectors."""
    weights, outputs, num_features = [], [], 0
    for module, (query, key, value) in layers:
        features = module.features
        assert isinstance(features, FeatureMap)
        num_features = features.plan.num_features
        weights.append(_weights(features, Vectors(*scale_and_widen(query, key, value))))
        outputs.append(module(query[None], key[None], value[None])[0])
    errors = Truth.of(kernel, vectors).errors(torch.cat(weights), torch.cat(outputs))
    return _row(str(cell.dotf), f"{cell.attn} as trained", num_features, errors, [None] * len(errors))


def _row(dotf: str, estimator: str, num_features: int, errors: Iterable[float], spreads: Iterable[float | None]) -> Row:
    """Return a row with each error before its spread."""
    named = zip(zip(MEASURES, errors, strict=True), zip(SPREADS, spreads, strict=True), strict=True)
    return {
        **{"dotf": dotf, "estimator": estimator, "num_features": num_features},
        **{name: value for pair in named for name, value in pair},
    }


def _estimators(dotf: str, kernel: Kernel, head_dim: int, num_features: int, scale: float) -> Mapping[str, Draw]:
    """Return the estimators that exist at `num_features`, by name."""
    seed = torch.Generator()
    found: dict[str, Draw] = {}
    for name, estimator in (("rmfa", "maclaurin"), ("rmfa-sketch", "sketch")):
        settings = Estimate(kernel, num_features, estimator, normalize=True, max_degree=MAX_DEGREE)
        found[name] = _redrawn(settings.make(head_dim, scale, seed))
    if num_features > head_dim and kernel.coefficient(0) > 0:
        found["taylor1"] = lambda _: _linear_features(kernel)
    if dotf == "exp":
        found["FAVOR+"] = _redrawn(PositiveRandom(head_dim=head_dim, num_features=num_features, generator=seed))
        if num_features % 2 == 0:
            fourier = RandomFourier(head_dim=head_dim, num_features=num_features, generator=seed)
            found["random Fourier"] = _redrawn(fourier)
    return found


def _redrawn(features: Any) -> Draw:
    def draw(generator: torch.Generator) -> Features:
        features.resample(generator)
        return features

    return draw


def _linear_features(kernel: Kernel) -> Features:
    """Return the d + 1 features of a_0 + a_1 x."""
    constant, slope = (math.sqrt(kernel.coefficient(degree)) for degree in (0, 1))
    return lambda x: F.pad(slope * x, (0, 1), value=constant)


def _output(features: Features, vectors: Vectors, units: bool) -> Tensor:
    query, key, value = (x[None] for x in vectors)
    bounded = True if isinstance(features, Sketch) and not units else None
    return attend(features, query, key, value, self_attention=True, bounded=bounded)[0]


def _weights(features: Features, vectors: Vectors) -> Tensor:
    """Return the estimated kernel matrix, <phi(q), phi(k)>; where features shift the vectors, with the shift undone.

    exp(<q, k>) = exp(<q, c>) exp(<m, k - c>) exp(<q - m, k - c>), with the last factor estimated, m the mean query and
    c the mean of the keys under the weights that m gives them (`schoenbat.ops.linear`).
    """
    query, key, _ = vectors
    if not isinstance(features, FeatureMap) or not features.centres:
        return features(query) @ features(key).mT
    mean = query.mean(-2, keepdim=True)
    centre = torch.softmax(mean @ key.mT, -1) @ key
    exact = query @ centre.mT + mean @ (key - centre).mT
    return torch.exp(exact) * (features(query - mean) @ features(key - centre).mT)
