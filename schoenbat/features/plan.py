r"""Features that are products of projections: what every estimate of a kernel here consists of.

A plan says which products. A row x becomes the projected row z = x P; the features are, in order, a constant, the first
coordinates of z (the linear features), and runs. A run with the offsets (a, b, ...) and length n is the n features

    weight * z_{a+i} z_{b+i} ...,    i = 0 .. n - 1,

a product of a few contiguous slices, one for each offset. Sums over keys take the squares of the weights instead
(`schoenbat.ops._planned`), which saves a pass over all features of queries and one over those of keys.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from schoenbat.kernels import Kernel


class Run(NamedTuple):
    """`length` products of as many coordinates as there are offsets."""

    offsets: tuple[int, ...]
    length: int
    weight: float


class Plan(NamedTuple):
    """The features in order: the constant (0 for none), the linear ones with a weight, the runs.

    `unit` is the size of a kernel value, by which a sum of estimates is judged to be close to 0.
    """

    constant: float
    num_linear: int
    runs: tuple[Run, ...]
    unit: float = 1.0
    linear_weight: float = 1.0

    @property
    def num_features(self) -> int:
        return bool(self.constant) + self.num_linear + sum(run.length for run in self.runs)

    @property
    def weights(self) -> list[float]:
        """The factors of the products of coordinates."""
        low = [1.0] * bool(self.constant) + [self.linear_weight] * self.num_linear
        return low + [run.weight for run in self.runs for _ in range(run.length)]

    def split(self, degree: int) -> tuple["Plan", "Plan"]:
        """Split into the features below `degree`, which come first, and the others."""
        low = tuple(run for run in self.runs if len(run.offsets) < degree)
        linear = self.num_linear if degree > 1 else 0
        rest = self._replace(constant=0.0, num_linear=self.num_linear - linear, runs=self.runs[len(low) :])
        return self._replace(num_linear=linear, runs=low), rest


class Products(NamedTuple):
    """Features of vectors whose dot products get a factor, apart from their weights.

    Attributes:
        projection: P times the root of the factor.
        squares: [D, 1], the squares of the weights.
    """

    projection: Tensor
    squares: Tensor
    plan: Plan

    def split(self, degree: int) -> tuple["Products", "Products"]:
        """Split as `Plan.split` does."""
        low, rest = self.plan.split(degree)
        cut = low.num_features
        return Products(self.projection, self.squares[:cut], low), Products(self.projection, self.squares[cut:], rest)


class Described(NamedTuple):
    """What features of one degree say of f over its magnitude, on average.

    Attributes:
        coefficient: of x^n; or, where not all of a degree is described, of |x|^n |y|^n P_n of the cosine, with P_n the
            Gegenbauer polynomial that is 1 at 1.
        noise: the variance of what they say, over the n-th power of the mean square argument.
        is_power: which of the two the coefficient belongs to.
    """

    coefficient: float
    noise: float
    is_power: bool


class FeatureMap(nn.Module):
    """phi: [..., N, head_dim] to [..., N, D] with <phi(x), phi(y)> close to f(<x, y>), the same draw for every head.

    The plan, and everything in attention, is for f over `Kernel.magnitude`: f times a constant is the same attention.

    A subclass fills `projection_bits` in `_pack` from buffers of its own that hold the draw. Whatever holds it is made
    of integers, so that a module that is cast to another dtype keeps the draw that it was made with.

    Args:
        kernel: f.
        generator: the source of the draw; its state is kept, so that `reset_parameters` can draw the same again.

    Attributes:
        plan: which products the features are.
        centres: whether f is exp and attention shifts queries and keys to where the estimate is best.
        near: whether causal attention evaluates f itself within a chunk of tokens.
        sketched: the lowest degree of which a random part is described; None where there is no such degree.
        is_bounded: whether the output is kept from being further off than that of uniform weights.
        error: expected relative error of the kernel on isotropic vectors, from 0 to 1.
        unexplained: the part of the variance of f over isotropic vectors that is not described, from 0 to 1.
        shares: the share of each degree that is described, by degree.
        described: what is said of each degree, by degree.
        linear_share: the share of the linear degree where no other is described, else 1.
    """

    plan: Plan
    projection_bits: Tensor
    weight_bits: Tensor
    centres = False
    near = False
    sketched: int | None = None
    is_bounded = False
    error = 1.0
    unexplained = 1.0
    shares: Mapping[int, float] = MappingProxyType({0: 1.0})
    described: Mapping[int, Described] = MappingProxyType({})
    linear_share = 1.0

    def __init__(self, kernel: Kernel, generator: torch.Generator) -> None:
        super().__init__()
        self.kernel = kernel
        with torch.device("cpu"):
            _ = kernel.is_signed  # kept by the kernel; while a graph is exported there are no values to look at
        self._origin = generator.get_state()
        self._packed: list[Tensor] = []
        self._constants: tuple[Tensor, Tensor] | None = None
        self.register_buffer("projection_bits", None, persistent=False)
        self.register_buffer("weight_bits", None, persistent=False)
        self.register_load_state_dict_post_hook(_pack_again)

    @property
    def reach(self) -> float:
        """Up to which degree f is described, counting incomplete degrees by their shares."""
        return sum(share for degree, share in self.shares.items() if degree)

    @property
    def largest_coordinate(self) -> float:
        """A vector's coordinates up to which sums of its features, and fourth powers of it, are float32."""
        degree = max([4, *(len(run.offsets) for run in self.plan.runs)])
        return float(10 ** (30 / degree))

    def reset_parameters(self) -> None:
        """Draw again what was drawn at construction, as after `to_empty`, which leaves buffers without a value."""
        generator = torch.Generator()
        generator.set_state(self._origin)
        self.resample(generator)

    def resample(self, generator: torch.Generator) -> None:
        """Draw anew."""
        raise NotImplementedError

    def _pack(self) -> Tensor:
        """Return P [head_dim, ...] in float32, from the draw."""
        raise NotImplementedError

    def _store(self) -> None:
        if any(buffer.is_meta for buffer in self.buffers() if buffer is not None):
            return
        self.projection_bits = self._pack().contiguous().view(torch.int32)
        weights = torch.tensor(self.plan.weights, dtype=torch.float32, device=self.projection_bits.device)
        self.weight_bits = weights.view(torch.int32)
        self._packed = self._drawn()
        self._view()

    def _drawn(self) -> list[Tensor]:
        """Return the buffers that hold the draw."""
        skipped = self._non_persistent_buffers_set
        return [buffer for name, buffer in self.named_buffers(recurse=False) if name not in skipped]

    def follow_buffers(self) -> None:
        """Pack again if buffers were exchanged without `load_state_dict`, as loaders of other libraries do."""
        drawn = self._drawn()
        if len(drawn) != len(self._packed) or any(x is not y for x, y in zip(drawn, self._packed, strict=True)):
            self._store()

    def projection(self, dtype: torch.dtype) -> Tensor:
        """Return P in `dtype`."""
        return self._floats()[0].to(dtype)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Return W [D] in `dtype`."""
        return self._floats()[1].to(dtype)

    def _floats(self) -> tuple[Tensor, Tensor]:
        # ONNX has no way to read integers as floats, so an exported graph has the floats as constants.
        if torch.compiler.is_exporting() and self._constants is not None:
            return self._constants
        return self.projection_bits.view(torch.float32), self.weight_bits.view(torch.float32)

    def _view(self) -> None:
        self._constants = self.projection_bits.view(torch.float32), self.weight_bits.view(torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FeatureMap":
        super()._apply(fn, recurse)
        self._view()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # torch.save refuses two tensors of different types on the same memory.
        return {**self.__dict__, "_constants": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.projection_bits is not None:
            self._view()

    def products(self, dtype: torch.dtype, scale: float) -> Products:
        """Prepare the products for vectors whose dot products get the factor `scale`."""
        squares = self.weights(dtype).square().unsqueeze(-1)
        return Products(self.projection(dtype) * math.sqrt(scale), squares, self.plan)

    def forward(self, x: Tensor) -> Tensor:
        """Compute features in float32 or wider, whatever the dtype of x: sums over many tokens come next."""
        return self.relative(x) * math.sqrt(self.kernel.magnitude)

    def relative(self, x: Tensor) -> Tensor:
        """Compute features of f over its magnitude."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return expand(x.to(dtype) @ self.projection(dtype), self.plan) * self.weights(dtype)


def _pack_again(module: nn.Module, _: Any) -> None:
    assert isinstance(module, FeatureMap)
    module._store()


def expand(projected: Tensor, plan: Plan) -> Tensor:
    """Compute the features [..., D] of projected rows [..., P], without their weights."""
    parts = [projected.new_full((*projected.shape[:-1], 1), plan.constant)] if plan.constant else []
    if plan.num_linear or not plan.runs:
        parts.append(projected[..., : plan.num_linear])
    parts += [functools.reduce(torch.mul, _factors(projected, run)) for run in plan.runs]
    return torch.cat(parts, -1)


def push_forward(projected: Tensor, plan: Plan, tangent: Tensor) -> Tensor:
    """Compute the directional derivative [..., D] of `expand` at projected rows, along `tangent` [..., P]."""
    parts = [projected.new_zeros((*projected.shape[:-1], 1))] if plan.constant else []
    if plan.num_linear or not plan.runs:
        parts.append(tangent[..., : plan.num_linear])
    for run in plan.runs:
        tangents = _factors(tangent, run)
        terms = [
            own if others is None else own * others
            for own, others in zip(tangents, _others(_factors(projected, run)), strict=True)
        ]
        parts.append(functools.reduce(torch.add, terms))
    return torch.cat(parts, -1)


def pull_back(projected: Tensor, plan: Plan, grad: Tensor) -> Tensor:
    """Compute the gradient [..., P] of the projected rows, from `grad` [..., D] of what `expand` made of them."""
    width = projected.shape[-1]
    column = 1 if plan.constant else 0
    linear = grad[..., column : column + plan.num_linear]
    column += plan.num_linear
    # Under vmap, what is added to in place must have all batch dimensions from the start, and every term of a run has.
    out = None
    for run in plan.runs:
        own = grad[..., column : column + run.length]
        for offset, others in zip(run.offsets, _others(_factors(projected, run)), strict=True):
            term = own if others is None else own * others
            if out is None:
                out = nn.functional.pad(term, (offset, width - offset - run.length))
            else:
                out.narrow(-1, offset, run.length).add_(term)
        column += run.length
    if out is None:
        return nn.functional.pad(linear, (0, width - plan.num_linear))
    out.narrow(-1, 0, plan.num_linear).add_(linear)
    return out


def _factors(projected: Tensor, run: Run) -> list[Tensor]:
    return [projected[..., offset : offset + run.length] for offset in run.offsets]


def _others(factors: list[Tensor]) -> Iterator[Tensor | None]:
    """Yield for each factor the product of all others; None where there are none."""
    before = [None, *itertools.accumulate(factors[:-1], torch.mul)]
    after = [*list(itertools.accumulate(factors[:0:-1], torch.mul))[::-1], None]
    for left, right in zip(before, after, strict=True):
        yield right if left is None else left if right is None else left * right
