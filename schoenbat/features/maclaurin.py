r"""Random Maclaurin features as SchoenbAt uses them (Kar & Karnick 2012, Algorithm 1; arXiv 2505.12252).

The constant term a_0 is one deterministic feature. Each of the D' = D - 1 others draws a degree n from 1..max_degree
with probability p(n) proportional to 2^-n and n Rademacher vectors w_1..w_n in {-1, 1}^d, and is

    phi_i(x) = sqrt(a_n / (p(n) D')) prod_j <w_j, x>.

Then E <phi(x), phi(y)> = a_0 + sum_{n=1}^{max_degree} a_n <x, y>^n, because E <w, x><w, y> = <x, y>.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from schoenbat.kernels import Kernel


class RandomMaclaurin(nn.Module):
    """phi: [..., N, head_dim] to [..., N, num_features], the same draw for every head and batch entry.

    Args:
        kernel: gives the coefficients a_n.
        num_features: D, at least 1.
        max_degree: highest degree that is drawn; the series beyond it is left out.
        generator: the source of the draw.
    """

    degrees: Tensor
    signs: Tensor
    projection: Tensor

    def __init__(
        self, kernel: Kernel, *, head_dim: int, num_features: int, max_degree: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, not {num_features}")
        if max_degree < 1:
            raise ValueError(f"max_degree must be at least 1, not {max_degree}")
        self.coefficients = [kernel.coefficient(degree) for degree in range(max_degree + 1)]
        probabilities = torch.tensor([2.0**-degree for degree in range(1, max_degree + 1)], dtype=torch.float64)
        self.probabilities = probabilities / probabilities.sum()
        # The shapes do not depend on the draw, so that any state_dict of this configuration can be loaded; what the
        # forward pass uses is packed from them.
        drawn = num_features - 1
        self.register_buffer("degrees", torch.ones(drawn, dtype=torch.int64))
        self.register_buffer("signs", torch.ones(drawn, max_degree, head_dim, dtype=torch.int8))
        self.register_load_state_dict_post_hook(lambda module, _: module._pack())
        self.resample(generator)

    def resample(self, generator: torch.Generator) -> None:
        """Draw degrees and vectors anew; the degrees are kept in ascending order."""
        drawn = len(self.degrees)
        if drawn:
            degrees = torch.multinomial(self.probabilities, drawn, replacement=True, generator=generator) + 1
            self.degrees.copy_(degrees.sort().values)
        self.signs.copy_(torch.randint(0, 2, self.signs.shape, generator=generator, dtype=torch.int8) * 2 - 1)
        self._pack()

    def _pack(self) -> None:
        """Lay the vectors out by degree: first all first factors of a degree, then all its second factors, ..."""
        degrees = self.degrees.cpu()
        drawn = len(degrees)
        rows, groups = [], []
        for degree in range(1, self.signs.shape[1] + 1):
            members = (degrees == degree).nonzero().flatten().to(self.signs.device)
            if len(members):
                groups.append((degree, len(members)))
                factors = self.signs[members, :degree].to(torch.float32)
                # The amplitude goes into the first factor, which saves a pass over all features.
                variance = self.coefficients[degree] / (float(self.probabilities[degree - 1]) * drawn)
                factors[:, 0] *= math.sqrt(variance)
                rows.append(factors.transpose(0, 1).flatten(0, 1))
        self.groups = groups
        empty = self.signs.new_zeros(0, self.signs.shape[2], dtype=torch.float32)
        self.register_buffer("projection", torch.cat(rows) if rows else empty, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features in float32 or wider, whatever the dtype of x: sums over many tokens come next."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        constant = math.sqrt(self.coefficients[0])
        with torch.autocast(x.device.type, enabled=False):
            x, projection = x.to(dtype), self.projection.to(dtype)
            if torch.compiler.is_compiling():
                return _multiply_out(x, projection, self.groups, constant)
            return _Products.apply(x, projection, self.groups, constant)


def _chunk(device: torch.device) -> int:
    """Tokens whose projections are held at a time.

    On a CPU what stays in a core's cache, 1 MB at 250 projections in float32; elsewhere enough to fill the device.
    """
    return 1024 if device.type == "cpu" else 65536


class _Products(torch.autograd.Function):
    """[constant, products of the projections by degree], with the projections recomputed in the backward pass.

    Only x is kept for the backward pass, so that memory is that of input and output; composed from separate
    operations, every projection and every partial product would be kept as well, about four times the output.
    """

    @staticmethod
    def forward(x: Tensor, projection: Tensor, groups: list[tuple[int, int]], constant: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        features = rows.new_empty(len(rows), 1 + sum(count for _, count in groups))
        features[:, 0] = constant
        chunk = _chunk(x.device)
        for start in range(0, len(rows), chunk):
            projected = rows[start : start + chunk] @ projection.T
            out = features[start : start + chunk]
            column = 1
            for factors in _factors(projected, groups):
                count = factors[0].shape[1]
                product = out[:, column : column + count]
                product.copy_(factors[0])
                for factor in factors[1:]:
                    product.mul_(factor)
                column += count
        return features.view(*x.shape[:-1], -1)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, projection, groups, _ = inputs
        ctx.save_for_backward(x, projection)
        ctx.groups = groups  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, projection = ctx.saved_tensors  # type: ignore[attr-defined]
        groups = ctx.groups  # type: ignore[attr-defined]
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted, so that it has to be made of operations that have one.
            return _pull_back(x, projection, grad, groups), None, None, None
        return _pull_back_in_chunks(x, projection, grad, groups), None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Sequence[Any],
        x: Tensor,
        projection: Tensor,
        groups: list[tuple[int, int]],
        constant: float,
    ) -> tuple[Tensor, int]:
        x_dim, projection_dim = in_dims[:2]
        x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        if projection_dim is None:
            return _Products.apply(x, projection, groups, constant), 0
        pairs = zip(x, projection.movedim(projection_dim, 0), strict=True)
        return torch.stack([_Products.apply(*pair, groups, constant) for pair in pairs]), 0


def _pull_back_in_chunks(x: Tensor, projection: Tensor, grad: Tensor, groups: list[tuple[int, int]]) -> Tensor:
    """The gradient with respect to x, a chunk at a time."""
    rows = x.reshape(-1, x.shape[-1])
    grad_rows = grad.reshape(len(rows), -1)
    out = torch.empty_like(rows)
    chunk = _chunk(x.device)
    for start in range(0, len(rows), chunk):
        projected = rows[start : start + chunk] @ projection.T
        grad_projected = torch.empty_like(projected)
        column = 1
        for factors, grads in zip(_factors(projected, groups), _factors(grad_projected, groups), strict=True):
            count = factors[0].shape[1]
            # The gradient of a factor is grad times all factors before it times all factors after it.
            grads[0].copy_(grad_rows[start : start + chunk, column : column + count])
            for i in range(1, len(factors)):
                torch.mul(grads[i - 1], factors[i - 1], out=grads[i])
            after = factors[-1]
            for i in range(len(factors) - 2, -1, -1):
                grads[i].mul_(after)
                if i:
                    after = after * factors[i]
            column += count
        torch.mm(grad_projected, projection, out=out[start : start + chunk])
    return out.view(x.shape)


def _multiply_out(x: Tensor, projection: Tensor, groups: list[tuple[int, int]], constant: float) -> Tensor:
    """What `_Products` computes, of operations that a compiler can fuse."""
    projected = x @ projection.T
    products = [functools.reduce(torch.mul, factors) for factors in _factors(projected, groups)]
    return F.pad(torch.cat([projected[..., :0], *products], -1), (1, 0), value=constant)


def _pull_back(x: Tensor, projection: Tensor, grad: Tensor, groups: list[tuple[int, int]]) -> Tensor:
    """What `_pull_back_in_chunks` computes, of operations that have gradients themselves."""
    projected = x @ projection.T
    grads = [projected[..., :0]]
    column = 1
    for factors in _factors(projected, groups):
        count = factors[0].shape[-1]
        before = list(itertools.accumulate(factors[:-1], torch.mul, initial=grad[..., column : column + count]))
        after = list(itertools.accumulate(factors[:0:-1], torch.mul))[::-1]
        grads += [b * a for b, a in zip(before, after, strict=False)] + [before[-1]]
        column += count
    return torch.cat(grads, -1) @ projection


def _factors(projected: Tensor, groups: list[tuple[int, int]]) -> Iterator[list[Tensor]]:
    """For each degree, its factors: views [..., features of that degree] of `projected`."""
    start = 0
    for degree, count in groups:
        block = projected[..., start : start + degree * count]
        yield list(block.split(count, dim=-1))
        start += degree * count
