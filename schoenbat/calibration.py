r"""An estimate in a basis that fits the data: for each head the directions in which queries and keys vary most.

Attention by f(<q, k>) does not change when query and key of a head are turned alike, but an estimate with fewer
features than monomials does. `schoenbat.features.sketch` turns at random, which is all one can do where nothing is
known of the vectors. Those of a trained model vary in few directions. In coordinates in which the sum of E q q^T and
E k k^T, each divided by its trace, is diagonal, the term in f(<q, k>) of the monomial of degree n with the exponents
m_1, m_2, ... has the mean square

    (a_n n! / (m_1! m_2! ...))^2  prod_i E (q_i k_i)^(2 m_i),

where each factor of the product is ((2 m_i - 1)!!)^2 s_i^(2 m_i) for Gaussian coordinates, with s_i^2 = E q_i^2
E k_i^2. The features are the monomials up to some degree for which this is largest, with their Maclaurin coefficients.

A high degree serves arguments that are small in most directions, and a low one arguments that are large. Which degree,
and whether this is better than the random basis at all, is found on vectors that the basis was not made from; where it
is not better, the estimate stays as it is.
"""

import heapq
import itertools
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from schoenbat.errors import UserError
from schoenbat.estimate import WATCHER, Estimate
from schoenbat.features.plan import Described, FeatureMap, Plan, Run
from schoenbat.functional import check_shapes
from schoenbat.kernels import Kernel
from schoenbat.nn.mha import MultiheadKernelAttention
from schoenbat.ops._share import compare_exactly
from schoenbat.ops.linear import attend
from schoenbat.ops.reference import AttentionInputs, fill_masked

__all__ = [
    "CALIBRATOR",
    "Calibrated",
    "Calibration",
    "FittedFeatures",
    "calibrate",
    "calibrate_tensors",
    "note_settings",
]

KEPT_AS = "kernel_features"
"""The name under which a layer of a model of another library has its own features."""
KERNELS_KEPT_AS = "head_kernels"
"""The name under which a layer has the kernels of its heads."""
CALIBRATOR: ContextVar[Callable[..., None] | None] = ContextVar("calibrator", default=None)
"""Called by attention functions of other libraries' models, which are no modules, with (layer, estimate, query, key,
value, key_mask, is_causal, scale=, self_attention=) before they look at the layer's features."""
WORTHWHILE = 0.97
"""A basis is taken if it leaves less than this part of the error: less than that is chance."""
DEGREES = (1, 2, 3, 4, 6, 8, 12)
_LARGEST = 1e9
"""Spreads beyond it, which no features describe, would overflow in their highest powers."""


class FittedFeatures(FeatureMap):
    """phi of vectors whose coordinates are ordered by how much they vary: the monomials that matter most.

    Args:
        kernel: f.
        num_features: the budget, at least 1.
        max_degree: of the monomials.
        spread: s_1 >= s_2 >= ... >= 0 of the module, one for each coordinate.
    """

    spread_bits: Tensor
    degree: Tensor
    near = True
    is_bounded = True

    def __init__(self, kernel: Kernel, *, num_features: int, max_degree: int, spread: Sequence[float]) -> None:
        super().__init__(kernel, torch.Generator())
        self.num_features = num_features
        self.centres = kernel.is_exponential
        with torch.device("cpu"):
            self.register_buffer("degree", torch.tensor(max_degree))
            self.register_buffer("spread_bits", torch.tensor(spread, dtype=torch.float64).view(torch.int64))
        self._store()

    @property
    def max_degree(self) -> int:
        """Kept as a buffer, so that a state_dict brings it along."""
        return int(self.degree)

    @property
    def spread(self) -> list[float]:
        """s_1, s_2, ... of the module."""
        return self.spread_bits.view(torch.float64).tolist()

    def resized(self, num_features: int) -> "FittedFeatures":
        """Make features of another number in the same basis, on the same device."""
        other = FittedFeatures(self.kernel, num_features=num_features, max_degree=self.max_degree, spread=self.spread)
        return other.to(self.spread_bits.device)

    def resample(self, generator: torch.Generator) -> None:
        """Draw nothing: nothing of this map is random."""

    def _pack(self) -> Tensor:
        """Return the coordinates in the order of the runs, and set the plan, which follows from the spread."""
        spread = self.spread
        factors = [self.kernel.relative_coefficient(n) * math.factorial(n) for n in range(self.max_degree + 1)]
        chosen = list(itertools.islice(_by_size(factors, spread), self.num_features))
        base = self.kernel.unit_argument**-0.5
        columns = [i for (i,) in (term.monomial for term in chosen if len(term.monomial) == 1)]
        num_linear = len(columns)
        alike: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
        for term in chosen:
            if len(term.monomial) > 1:
                alike[tuple(sorted(Counter(term.monomial).values()))].append(term.monomial)
        runs = []
        for exponents, monomials in sorted(alike.items()):
            degree = sum(exponents)
            offsets = tuple(len(columns) + place * len(monomials) for place in range(degree))
            columns += [i for place in zip(*monomials, strict=True) for i in place]
            weight = math.sqrt(factors[degree] / math.prod(map(math.factorial, exponents))) / base**degree
            runs.append(Run(offsets, len(monomials), weight))
        has_constant = any(not term.monomial for term in chosen)
        unit = self._describe(factors, spread, chosen)
        linear_weight = math.sqrt(factors[1]) / base if num_linear else 1.0
        self.plan = Plan(math.sqrt(factors[0]) if has_constant else 0.0, num_linear, tuple(runs), unit, linear_weight)
        projection = torch.zeros(len(spread), len(columns), device=self.spread_bits.device)
        projection[columns, torch.arange(len(columns), device=projection.device)] = base
        return projection

    def _describe(self, factors: list[float], spread: list[float], chosen: "list[_Term]") -> float:
        """Set `shares`, `unexplained` and `error`; return the root mean square of f."""
        described: dict[int, float] = defaultdict(float)
        for term in chosen:
            described[len(term.monomial)] += term.size
        totals = [factor**2 * total for factor, total in zip(factors, _totals(spread, len(factors) - 1), strict=True)]
        self.shares = {n: min(1.0, part / totals[n]) for n, part in described.items() if totals[n]}
        self.described = {}
        for n, share in self.shares.items():
            coefficient = share * factors[n] / math.factorial(n)
            noise = share * (1 - share) * factors[n] ** 2 / math.factorial(n)
            self.described[n] = Described(coefficient, noise, True)
        varying = sum(totals[1:])
        left = max(0.0, varying - sum(part for n, part in described.items() if n))
        self.unexplained = left / varying if varying else 0.0
        self.error = math.sqrt(left / (varying + totals[0])) if left else 0.0
        return math.sqrt(varying + totals[0])


class _Term(NamedTuple):
    """A monomial by its coordinates in ascending order, and the mean square of its term in f."""

    monomial: tuple[int, ...]
    size: float


def _by_size(factors: list[float], spread: list[float]) -> Iterator[_Term]:
    """Yield all monomials that have a term in f, the largest first."""

    def size(monomial: tuple[int, ...]) -> float:
        parts = (_moment(count) * spread[i] ** (2 * count) for i, count in Counter(monomial).items())
        return factors[len(monomial)] ** 2 * math.prod(parts)

    # With coordinates in order no monomial is larger than one that it follows from.
    first = [(0,) * degree for degree, factor in enumerate(factors) if factor]
    heap = [(-size(monomial), monomial) for monomial in first]
    heapq.heapify(heap)
    seen = set(first)
    while heap:
        negative, monomial = heapq.heappop(heap)
        yield _Term(monomial, -negative)
        for place, coordinate in enumerate(monomial):
            if coordinate + 1 < len(spread):
                other = tuple(sorted((*monomial[:place], coordinate + 1, *monomial[place + 1 :])))
                if other not in seen:
                    seen.add(other)
                    heapq.heappush(heap, (-size(other), other))


def _moment(exponent: int) -> float:
    """Return ((2 m - 1)!! / m!)^2."""
    return (math.prod(range(1, 2 * exponent, 2)) / math.factorial(exponent)) ** 2


def _totals(spread: list[float], max_degree: int) -> list[float]:
    """Sum prod_i ((2 m_i - 1)!! / m_i!)^2 s_i^(2 m_i) over all monomials, for each degree."""
    totals = [1.0] + [0.0] * max_degree
    for s in spread:
        own = [_moment(m) * s ** (2 * m) for m in range(max_degree + 1)]
        totals = [sum(totals[n - m] * own[m] for m in range(n + 1)) for n in range(max_degree + 1)]
    return totals


class Calibrated(nn.Module):
    """Attention through features in a basis of its own for each key head.

    Args:
        estimate: the settings that it was made for.
        features: phi of turned vectors.
        basis: [Hk, d, d], orthonormal, a coordinate a column; None leaves vectors as they are.
        before, after: the share of the attention explained by the estimate as it was and by this one, on vectors that
            the basis was not made from.
    """

    basis_bits: Tensor | None

    def __init__(
        self, estimate: Estimate, features: FeatureMap, basis: Tensor | None, before: float, after: float
    ) -> None:
        super().__init__()
        self.estimate, self.features, self.before, self.after = estimate, features, before, after
        # Integers, so that a module that is cast to another dtype keeps its basis.
        self.register_buffer("basis_bits", None if basis is None else basis.float().contiguous().view(torch.int32))

    @property
    def max_degree(self) -> int | None:
        """The highest degree of the monomials; None for the estimate as it was."""
        return self.features.max_degree if isinstance(self.features, FittedFeatures) else None

    def basis(self) -> Tensor | None:
        """Return the basis, [Hk, d, d] in float32."""
        return None if self.basis_bits is None else self.basis_bits.view(torch.float32)

    def turn(self, inputs: AttentionInputs) -> AttentionInputs:
        """Replace query and key by their coordinates in the basis, in the dtypes of these."""
        basis = self.basis()
        if basis is None:
            return inputs
        with torch.autocast(inputs.query.device.type, enabled=False):
            return inputs._replace(query=_turned(inputs.query, basis), key=_turned(inputs.key, basis))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        self_attention: bool = False,
    ) -> Tensor:
        """Attend; arguments and result are those of `schoenbat.Estimate.attend`."""
        inputs = self.estimate.prepare(
            query, key, value, key_mask, is_causal, scale=scale, self_attention=self_attention
        )
        return attend(self.features, *self.turn(inputs))


def _turned(x: Tensor, basis: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ basis.to(wide).repeat_interleave(x.shape[1] // len(basis), 0)).to(x.dtype)


def calibrate_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    self_attention: bool = False,
    estimate: Estimate | None = None,
    current: Calibrated | FeatureMap | None = None,
) -> Calibrated:
    """Choose between what is used so far and features in a basis that fits these tensors.

    Args:
        query, key, value, key_mask, is_causal, scale, self_attention: as for `Estimate.attend`. Half of the examples,
            or of the tokens where there is one example, make the basis, and the others judge it.
        estimate: the settings; the default of `Estimate` where it is None.
        current: what is used so far; the draw of `estimate` where it is None.

    Raises:
        UserError: an estimate without features, or of the published ones; too few tokens, or some that are not finite;
            shapes that do not fit together.
    """
    estimate = Estimate() if estimate is None else estimate
    _check(estimate)
    check_shapes(query, key, value)
    if min(query.shape[0] * query.shape[2], key.shape[0] * key.shape[2]) < 2:
        raise UserError("one token is too little to calibrate with")
    with torch.no_grad():
        inputs = estimate.prepare(query, key, value, key_mask, is_causal, scale=scale, self_attention=self_attention)
        # A query of 0 has uniform weights, exact and estimated: it has no part in what follows.
        of_query = key_mask if self_attention or is_causal else None
        inputs = inputs._replace(query=fill_masked(inputs.query, of_query), value=fill_masked(value, key_mask))
        making, judging = _halves(inputs)
        exact = compare_exactly(estimate.function, judging)

        def judge(candidate: Calibrated) -> float:
            found = attend(candidate.features, *candidate.turn(judging))
            (share,) = exact.share_explained(found, dim=(0, 1, 2, 3), keepdim=True)
            return share

        if not isinstance(current, Calibrated):
            drawn = current or estimate.draw(query.shape[-1], inputs.scale, query.device)
            current = Calibrated(estimate, drawn, None, 0.0, 0.0)
        before = judge(current)
        fit = _fitting(estimate, making)
        shares = {n: judge(fit(n)) for n in _degrees(estimate)}
        degree = max(shares, key=lambda n: shares[n], default=None)
        if degree is None or not 1 - shares[degree] < WORTHWHILE * (1 - before):
            return Calibrated(estimate, current.features, current.basis(), before, before)
        fitted = _fitting(estimate, inputs)(degree)
        return Calibrated(estimate, fitted.features, fitted.basis(), before, shares[degree])


def _check(estimate: Estimate) -> None:
    if estimate.num_features is None:
        raise UserError("exact attention (num_features None) has nothing to calibrate")
    if estimate.estimator != "sketch":
        raise UserError(f"calibration is for the estimator sketch, not {estimate.estimator}")
    if estimate.sparsity is not None:
        raise UserError("calibration is for features alone; set window and heavy to 0")


def _degrees(estimate: Estimate) -> list[int]:
    """Return the candidate degrees at which the truncated series changes."""
    return [
        degree
        for lower, degree in itertools.pairwise((0, *DEGREES))
        if degree <= estimate.max_degree and any(estimate.function.coefficient(n) for n in range(lower + 1, degree + 1))
    ]


def _halves(inputs: AttentionInputs) -> tuple[AttentionInputs, AttentionInputs]:
    """Split into every other example, or every other token of a single one, and the rest."""
    several = len(inputs.query) > 1

    def half(i: int) -> AttentionInputs:
        query, key, value = (x[i::2] if several else x[:, :, i::2] for x in inputs[:3])
        mask = inputs.key_mask
        if mask is not None:
            mask = mask[i::2] if several else mask[:, i::2]
        return inputs._replace(query=query, key=key, value=value, key_mask=mask)

    return half(0), half(1)


def _fitting(estimate: Estimate, inputs: AttentionInputs) -> Callable[[int], Calibrated]:
    """Return a function that builds features of a given maximal degree in the calibrated basis."""
    query, key, key_mask, scale = inputs.query, inputs.key, inputs.key_mask, inputs.scale
    kernel, num_features = estimate.function, estimate.num_features
    assert num_features is not None
    # As `schoenbat.ops.linear` shifts queries.
    shifted = kernel.is_exponential and inputs.self_attention and not inputs.is_causal
    q = _second_moments(query, key_mask if shifted else None, shifted).unflatten(0, (key.shape[1], -1)).mean(1)
    k = _second_moments(key, key_mask, kernel.is_exponential)
    if not (q.isfinite().all() and k.isfinite().all()):
        raise UserError("query or key is not finite, so there is no basis that fits")
    basis = torch.linalg.eigh(_to_unit_trace(q) + _to_unit_trace(k)).eigenvectors
    square = scale**2 * _variances(basis, q) * _variances(basis, k)
    order = square.argsort(-1, descending=True)
    basis = basis.gather(2, order[:, None].expand_as(basis))
    spread = square.gather(1, order).mean(0).sqrt().clamp_max(_LARGEST)

    def fit(max_degree: int) -> Calibrated:
        features = FittedFeatures(kernel, num_features=num_features, max_degree=max_degree, spread=spread.tolist())
        return Calibrated(estimate, features, basis, 0.0, 0.0).to(query.device)

    return fit


def _second_moments(x: Tensor, mask: Tensor | None, centred: bool) -> Tensor:
    """Average x x^T over the tokens of [B, H, N, d], less their mean where `centred`: float64 [H, d, d], on the CPU."""
    x = fill_masked(x.to(torch.promote_types(x.dtype, torch.float32)), mask)
    number = x.new_full((len(x), 1, 1, 1), x.shape[2]) if mask is None else mask.sum(-1)[:, None, None, None]
    if centred:
        x = fill_masked(x - x.sum(2, keepdim=True) / number.clamp_min(1), mask)
    return ((x.mT @ x).sum(0) / number.sum().clamp_min(1)).cpu().double()


def _to_unit_trace(x: Tensor) -> Tensor:
    trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    return x / torch.where(trace > 0, trace, 1.0)


def _variances(basis: Tensor, moments: Tensor) -> Tensor:
    """Return the variances of the coordinates in the basis, [H, d]."""
    return ((moments @ basis) * basis).sum(-2).clamp_min(0)


@dataclass(frozen=True)
class Calibration:
    """The calibration of one layer.

    Attributes:
        layer: the name of the module.
        before, after: the share of its attention explained by the estimate as it was, and by what it has now, on inputs
            that the basis was not made from.
        max_degree: of the monomials; None where the estimate stayed as it was.
    """

    layer: str
    before: float
    after: float
    max_degree: int | None

    def __str__(self) -> str:
        name = self.layer or "the layer"
        if self.max_degree is None:
            return f"{name}: left as it is, with {self.before:.2f} of the attention explained"
        return f"{name}: share explained {self.before:.2f}, now {self.after:.2f} (degree {self.max_degree})"


def calibrate(model: nn.Module, *inputs: Any, **named_inputs: Any) -> list[Calibration]:
    """Give every attention layer the basis that fits what it sees in model(*inputs, **named_inputs), layer after layer.

    Layers are `schoenbat.MultiheadKernelAttention`, whose projections of query and key are turned, so that exact
    attention stays the same; and those of models of transformers whose attn_implementation was registered by schoenbat,
    which turn queries and keys in each call. Each layer sees what the layers before it give once they are calibrated. A
    layer for which the basis does not help stays as it is. `torch.save(model)` keeps the result; a state_dict has the
    turned projections and the features, and loads into a calibrated model.

    Raises:
        UserError: the model called no such layer, or one that cannot be calibrated: twice, without features, with near
            or heavy keys, with normalize=True, after which a basis cannot be a part of the projections, or with
            projections that are computed from other parameters. No layer has changed then.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in model.modules() if isinstance(module, MultiheadKernelAttention)]
    calls: Counter[nn.Module] = Counter()
    done: list[Calibration] = []

    def check_layer(layer: nn.Module, estimate: Estimate, *_: Any, **__: Any) -> None:
        _check(estimate)
        calls[layer] += 1
        if calls[layer] > 1:
            raise UserError(f"{names.get(layer, 'a layer')} is called more than once, and one basis fits one call")

    def check_module(layer: nn.Module, *_: Any) -> None:
        assert isinstance(layer, MultiheadKernelAttention)
        check_layer(layer, layer.estimate)
        _check_projections(layer, names[layer] or "the layer")

    def note(layer: nn.Module, fitted: Calibrated) -> None:
        done.append(Calibration(names.get(layer, ""), fitted.before, fitted.after, fitted.max_degree))

    def fit_layer(layer: nn.Module, estimate: Estimate, *tensors: Any, scale: Any, self_attention: bool) -> None:
        current = getattr(layer, KEPT_AS, None)
        current = current if current is not None and layer.kernel_estimate == estimate else None
        fitted = calibrate_tensors(
            *tensors, scale=scale, self_attention=self_attention, estimate=estimate, current=current
        )
        layer.add_module(KEPT_AS, fitted)
        layer.kernel_estimate = estimate  # type: ignore[assignment]
        note(layer, fitted)

    def fit_module(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(layer, MultiheadKernelAttention)
        note(layer, _turn_projections(layer, arguments, named))

    # A first run sees to it that no layer is calibrated where another one cannot be.
    for of_module, of_layer in ((check_module, check_layer), (fit_module, fit_layer)):
        handles = [layer.register_forward_pre_hook(of_module, with_kwargs=True) for layer in layers]
        token = CALIBRATOR.set(of_layer)
        try:
            with torch.no_grad(), warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
                # How little the estimate explained before is part of the result.
                warnings.simplefilter("ignore")
                model(*inputs, **named_inputs)
        finally:
            CALIBRATOR.reset(token)
            for handle in handles:
                handle.remove()
    if not done:
        raise UserError(f"{type(model).__name__} called no attention layer that schoenbat can calibrate")
    note_settings(model)
    return done


@singledispatch
def note_settings(model: nn.Module) -> None:
    """Note what layers were given where the model saves it: each integration says how, by the type of its models."""


def _turn_projections(layer: MultiheadKernelAttention, arguments: tuple[Any, ...], named: dict[str, Any]) -> Calibrated:
    calls: list[AttentionInputs] = []
    token = WATCHER.set(lambda _estimate, inputs, _features: calls.append(inputs))
    try:
        layer.forward(*arguments, **named)
    finally:
        WATCHER.reset(token)
    (inputs,) = calls
    fitted = calibrate_tensors(
        *inputs[:5],
        scale=inputs.scale,
        self_attention=inputs.self_attention,
        estimate=layer.estimate,
        current=layer.features,
    )
    basis = fitted.basis()
    if basis is not None:
        layer.features = fitted.features
        for parameter in _query_and_key_parameters(layer):
            rows = parameter.reshape(layer.num_heads, layer.head_dim, -1)
            wide = torch.promote_types(rows.dtype, torch.float32)
            parameter.copy_((basis.mT.to(wide) @ rows.to(wide)).view_as(parameter))
    return fitted


def _check_projections(layer: MultiheadKernelAttention, name: str) -> None:
    if layer.estimate.normalize:
        raise UserError("a layer with normalize=True cannot be calibrated: pre-SBN comes after its projections")
    for parameter in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "in_proj_bias"):
        if parameter not in layer._parameters:
            raise UserError(
                f"{parameter} of {name} is computed (pruned or parametrized), so it cannot be turned; calibrate first, "
                "or make it a parameter, as by remove_parametrizations or prune.remove"
            )


def _query_and_key_parameters(layer: MultiheadKernelAttention) -> list[Tensor]:
    """Return weights and biases whose rows are the coordinates of queries and keys, head after head."""
    if layer.in_proj_weight is not None:
        found = [*layer.in_proj_weight.chunk(3)[:2]]
    else:
        found = [layer.q_proj_weight, layer.k_proj_weight]
    return found if layer.in_proj_bias is None else [*found, *layer.in_proj_bias.chunk(3)[:2]]
