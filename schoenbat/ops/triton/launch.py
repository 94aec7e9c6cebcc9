"""How the kernels of `schoenbat.ops.triton.kernels` are launched: the tiles of a plan, the grids, the two operations.

`schoenbat::triton_attend` and its backward are operations of torch, so that torch.compile knows them.
G = B Hk counts the key heads of a batch, BH = B H the query heads.
"""

import functools
import math
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor

from schoenbat.errors import UserError
from schoenbat.features.plan import FeatureMap, Plan
from schoenbat.ops._bounds import FEW_KEYS
from schoenbat.ops.reference import SMALLEST
from schoenbat.ops.triton import kernels

TILE = 32
"""Features of a tile: with 64 the backward pass at head_dim 64 does not fit into registers."""
PROGRAMS_PER_PROCESSOR = 4
"""So many programs a multiprocessor of the GPU gets when a sum over tokens is split."""
MOST_SPLITS = 64


class Tiles(NamedTuple):
    """How the features of a plan are laid out, as `schoenbat.ops.triton.kernels` says.

    Attributes:
        columns: of the projection, [factors, TILE]; -1 for a column of 0.
        weights: of the features, [tiles, TILE]; 0 where there is none.
        first, degrees: of each tile, where its matrices begin, and how many it has.
    """

    columns: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    first: tuple[int, ...]
    degrees: tuple[int, ...]

    def begin(self, degree: int) -> int:
        """Return the first tile of this degree or a higher one."""
        return sum(own < degree for own in self.degrees)


@functools.lru_cache(maxsize=64)
def tiles_of(plan: Plan) -> Tiles:
    """Lay out the features of a plan, but the constant one."""
    by_degree: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    for offset in range(plan.num_linear):
        by_degree.setdefault(1, []).append(((offset,), plan.linear_weight))
    for run in plan.runs:
        own = [(tuple(offset + i for offset in run.offsets), run.weight) for i in range(run.length)]
        by_degree.setdefault(len(run.offsets), []).extend(own)
    columns: list[tuple[int, ...]] = []
    weights: list[tuple[float, ...]] = []
    first: list[int] = []
    degrees: list[int] = []
    for degree, features in sorted(by_degree.items()):
        for start in range(0, len(features), TILE):
            some = features[start : start + TILE]
            filling = TILE - len(some)
            first.append(len(columns))
            degrees.append(degree)
            weights.append((*(weight for _, weight in some), *[0.0] * filling))
            columns += [(*(own[i] for own, _ in some), *[-1] * filling) for i in range(degree)]
    return Tiles(tuple(columns), tuple(weights), tuple(first), tuple(degrees))


class Packed(NamedTuple):
    """What the kernels read of a feature map, for one scale of dot products."""

    factors: Tensor
    squares: Tensor
    first: Tensor
    degrees: Tensor
    coefficients: Tensor


_PACKED: WeakKeyDictionary[FeatureMap, tuple[Tensor, dict[Any, Packed]]] = WeakKeyDictionary()


def _packed(features: FeatureMap, scale: float, like: torch.dtype) -> Packed:
    """Pack a feature map, and keep that until its buffers are others."""
    if torch.compiler.is_compiling():
        return _pack(features, scale, like)
    bits, kept = _PACKED.get(features, (None, {}))
    if bits is not features.projection_bits:
        kept = {}
        _PACKED[features] = (features.projection_bits, kept)
    if (scale, like) not in kept:
        with torch.no_grad(), torch.inference_mode(False):
            kept[scale, like] = _pack(features, scale, like)
    return kept[scale, like]


def _pack(features: FeatureMap, scale: float, like: torch.dtype) -> Packed:
    tiles = tiles_of(features.plan)
    projection = features.projection(torch.float32) * math.sqrt(scale)
    device = projection.device
    columns = torch.tensor(tiles.columns, device=device).reshape(-1, TILE)
    factors = torch.nn.functional.pad(projection, (0, 1)).T[columns].to(like).contiguous()
    weights = torch.tensor(tiles.weights, device=device).reshape(-1, TILE)
    first, degrees = (torch.tensor(x, dtype=torch.int32, device=device) for x in (tiles.first, tiles.degrees))
    shares = features.shares
    described = [shares.get(n, 0.0) / math.factorial(n) for n in range(max(shares), -1, -1)]
    return Packed(factors, weights.square(), first, degrees, torch.tensor(described, device=device))


class Settings(NamedTuple):
    """The numbers of an attention.

    Attributes:
        quadratic, higher, cut: the first tile of the second degree, of the third, and of what is described in part.
        half: half the highest degree, where that is even.
        centres: 0 where keys are as they are, 1 where their mean is taken off, 2 where it is the one that the mean
            query sees.
        bounded: 1 for bounds.
        constant: the square of the constant feature.
        limit, excess, share: see `schoenbat.ops._bounds`; the excess is that of a mean square of 1.
        few_keys: what is added to the number of keys in the denominator of the trust.
        smallest: where denominators without bounds are moved from 0.
    """

    quadratic: int
    higher: int
    cut: int
    half: int
    centres: int
    bounded: int
    scale: float
    constant: float
    limit: float
    excess: float
    share: float
    few_keys: float
    smallest: float


def settings_of(features: FeatureMap, scale: float, self_attention: bool, bounded: bool) -> Settings:
    """Collect the numbers of an attention through `features`."""
    tiles, shares, sketched = tiles_of(features.plan), features.shares, features.sketched
    highest = max(shares)
    half = highest // 2 if bounded and highest and highest % 2 == 0 else 0
    return Settings(
        quadratic=tiles.begin(2),
        higher=tiles.begin(3),
        cut=len(tiles.degrees) if sketched is None or not bounded else tiles.begin(sketched),
        half=half,
        centres=2 if features.centres and self_attention else int(features.centres),
        bounded=int(bounded),
        scale=scale,
        constant=features.plan.constant**2,
        limit=max(1.0, features.reach),
        excess=shares[highest] / 2**half / math.factorial(half) if half else 0.0,
        share=1.0 if sketched is None else shares[sketched],
        few_keys=FEW_KEYS * features.unexplained,
        smallest=SMALLEST * features.plan.unit,
    )


def attend(
    features: FeatureMap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    self_attention: bool,
    bounded: bool,
) -> Tensor:
    """Attend; see `schoenbat.ops.triton.attend`."""
    like = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32
    if features.near:
        # As `schoenbat.ops.linear` does: beyond it features would overflow.
        largest = min(features.largest_coordinate, torch.finfo(query.dtype).max)
        query, key = query.clamp(-largest, largest), key.clamp(-largest, largest)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    settings = settings_of(features, scale, self_attention, bounded)
    numbers = settings[: Settings._fields.index("scale")], settings[Settings._fields.index("scale") :]
    return _attend(query, key, value, mask, *_packed(features, scale, like), *map(list, numbers))[0]


class _Launch:
    """Sizes of an attention, and the arguments that all its kernels share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed, settings: Settings) -> None:
        self.batch, self.heads, self.queries, self.dim = query.shape
        self.key_heads, self.keys, self.width = value.shape[1:]
        self.groups = self.heads // self.key_heads
        self.total = self.batch * self.heads
        self.key_total = self.batch * self.key_heads
        self.tiles, self.settings, self.device = len(packed.degrees), settings, query.device
        self.packed = packed
        # float16 is rounded like that, but must not overflow.
        self.precision = "tf32x3" if query.dtype == torch.float32 else "tf32"
        self.sizes = {"dim": self.dim, "width": self.width, "DIM": _padded(self.dim), "WIDTH": _padded(self.width)}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def splits(self, tokens: int, programs: int, rows: int) -> tuple[int, int]:
        """Return into how many parts to split a sum over tokens that takes `programs` programs, and their length."""
        wanted = max(1, PROGRAMS_PER_PROCESSOR * _processors(self.device) // programs)
        blocks = triton.cdiv(tokens, rows)
        length = triton.cdiv(blocks, min(blocks, wanted, MOST_SPLITS)) * rows
        return triton.cdiv(tokens, length), length

    @property
    def kinds(self) -> int:
        """1 for linear features only, 2 with quadratic ones, 3 with higher ones."""
        return 3 if self.settings.higher < self.tiles else 2

    def sum_up(
        self, x: Tensor, shift: Tensor, value: Tensor, average: Tensor, logits: Tensor, stats: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum over keys, or over queries where `rows` has values for them: `sums`, `ones` and `second`."""
        of_keys = rows.dim() == 1
        heads, tokens = x.shape[1:3]
        groups = heads // self.key_heads
        total = self.batch * heads
        programs = self.tiles + self.settings.bounded
        meta = meta_of("sum_kernel", self.dim, self.width, x.dtype)
        splits, length = self.splits(tokens, programs * total, meta["ROWS"])
        sums = self.empty(splits, self.key_total, groups, self.tiles * TILE, self.width)
        ones = self.empty(splits, self.key_total, groups, self.tiles * TILE)
        second = self.empty(splits, self.key_total, groups, self.dim, self.dim)
        kernels.sum_kernel[total, splits, programs](
            x, shift, value, average, logits, stats, rows, *self.packed[:1], *self.packed[2:4], sums, ones, second,
            tokens, length, total * tokens, self.tiles, self.settings.cut, heads, groups,
            *x.stride()[:3], *value.stride()[:3],
            OF_KEYS=of_keys, TILE=TILE, PRECISION=self.precision, **self.sizes, **meta,
        )  # fmt: skip
        squares = self.packed.squares.flatten()
        moments = second.sum((0, 2)) * self.settings.scale**2 if self.settings.bounded else sums.new_zeros(1)
        return sums.sum((0, 2)) * squares[:, None], ones.sum((0, 2)) * squares, moments


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def meta_of(kernel: str, dim: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the rows of a program, its warps and its stages: what compiles without spills (docs/gpu.md)."""
    is_wide, is_gradient = _padded(max(dim, width)) > 32, kernel in ("query_grad_kernel", "key_grad_kernel")
    rows = 32 if is_wide and is_gradient and dtype != torch.bfloat16 else 64
    return {"ROWS": rows, "num_warps": 8 if is_wide else 4, "num_stages": 2}


def _mean_query(query: Tensor, mask: Tensor | None, key_heads: int) -> tuple[Tensor, Tensor]:
    """Return the mean query of each key head [G, d], and over how many queries it is taken, [B]."""
    groups = query.shape[1] // key_heads
    if mask is None:
        number = query.new_full((query.shape[0],), groups * query.shape[2], dtype=torch.float32)
    else:
        query = query.masked_fill(mask[:, None, :, None] == 0, 0.0)
        number = (groups * mask.sum(-1, dtype=torch.float32)).clamp_min(1)
    total = query.sum(2, dtype=torch.float32).unflatten(1, (key_heads, groups)).sum(2)
    return (total / number[:, None, None]).flatten(0, 1), number


@torch.library.custom_op("schoenbat::triton_attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    factors: Tensor, squares: Tensor, first: Tensor, degrees: Tensor, coefficients: Tensor,
    integers: list[int], floats: list[float],
) -> list[Tensor]:  # fmt: skip
    """Return the output, and what the backward pass needs."""
    packed, settings = Packed(factors, squares, first, degrees, coefficients), Settings(*integers, *floats)
    go = _Launch(query, key, value, packed, settings)
    strides = (*key.stride()[:3], *value.stride()[:3])

    if settings.centres == 2:
        mean, number = _mean_query(query, mask, go.key_heads)
    else:
        mean, number = torch.zeros_like(go.empty(go.key_total, go.dim)), torch.ones_like(go.empty(1))
    meta = meta_of("centre_kernel", go.dim, go.width, query.dtype)
    splits, length = go.splits(go.keys, go.key_total, meta["ROWS"])
    logits, part_stats = go.empty(go.key_total, go.keys), go.empty(splits, go.key_total, 3)
    part_sums = go.empty(splits, go.key_total, go.dim + go.width)
    kernels.centre_kernel[go.key_total, splits](
        key, value, mask, mean, logits, part_stats, part_sums,
        go.keys, length, settings.scale, go.key_heads, *strides,
        MASKED=mask is not None, **go.sizes, **meta,
    )  # fmt: skip
    centre, average, stats = go.empty(go.key_total, go.dim), go.empty(go.key_total, go.width), go.empty(go.key_total, 4)
    kernels.combine_kernel[go.key_total,](
        part_stats, part_sums, centre, average, stats,
        splits, go.key_total, settings.few_keys, settings.smallest,
        COUNTED=settings.centres < 2, SPLITS=triton.next_power_of_2(splits), **go.sizes,
    )  # fmt: skip
    if not settings.centres:
        centre = torch.zeros_like(centre)

    sums, ones, second = go.sum_up(key, centre, value, average, logits, stats, logits.new_empty(0))

    out = go.empty(go.batch, go.heads, go.queries, go.width, dtype=query.dtype)
    denominators = go.empty(go.total, go.queries)
    meta = meta_of("look_up_kernel", go.dim, go.width, query.dtype)
    kernels.look_up_kernel[go.total, triton.cdiv(go.queries, meta["ROWS"])](
        query, mean, average, stats, sums, ones, second, factors, first, degrees, coefficients, out, denominators,
        go.queries, go.tiles, settings.quadratic, settings.higher, settings.cut, len(coefficients), settings.constant,
        settings.limit, settings.excess, settings.half, settings.share, go.heads, go.groups,
        *query.stride()[:3],
        BOUNDED=bool(settings.bounded), IN_PART=settings.cut < go.tiles, KINDS=go.kinds, TILE=TILE,
        PRECISION=go.precision, **go.sizes, **meta,
    )  # fmt: skip
    return [out, mean, number, logits, centre, average, stats, sums, ones, second, denominators]


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    factors: Tensor, squares: Tensor, first: Tensor, degrees: Tensor, coefficients: Tensor,
    integers: list[int], floats: list[float],
) -> list[Tensor]:  # fmt: skip
    (batch, heads, queries, dim), (_, key_heads, keys, width) = query.shape, value.shape
    settings, total, features = Settings(*integers, *floats), batch * key_heads, squares.numel()

    def wide(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    return [
        query.new_empty(batch, heads, queries, width),
        wide(total, dim),
        wide(batch if settings.centres == 2 else 1),
        wide(total, keys),
        wide(total, dim),
        wide(total, width),
        wide(total, 4),
        wide(total, features, width),
        wide(total, features),
        wide(total, dim, dim) if settings.bounded else wide(1),
        wide(batch * heads, queries),
    ]


@torch.library.custom_op("schoenbat::triton_attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    factors: Tensor, squares: Tensor, first: Tensor, degrees: Tensor, coefficients: Tensor,
    kept: list[Tensor], integers: list[int], floats: list[float],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of query, key and value."""
    packed, settings = Packed(factors, squares, first, degrees, coefficients), Settings(*integers, *floats)
    go = _Launch(query, key, value, packed, settings)
    out, mean, number, logits, centre, average, stats, sums, ones, second, denominators = kept
    bounded, shifted = bool(settings.bounded), settings.centres == 2
    parts = (go.tiles, settings.quadratic, settings.higher)

    meta = meta_of("query_grad_kernel", go.dim, go.width, query.dtype)
    blocks = triton.cdiv(go.queries, meta["ROWS"])
    grad_query, rows = go.empty(go.total, go.queries, go.dim), go.empty(5, go.total, go.queries)
    part_query, part_average = go.empty(blocks, go.total, go.dim), go.empty(blocks, go.total, go.width)
    part_stats = go.empty(blocks, go.total, 3)
    kernels.query_grad_kernel[go.total, blocks](
        query, mean, average, stats, sums, ones, second, factors, first, degrees, coefficients, out, denominators, grad,
        grad_query, rows, part_query, part_average, part_stats,
        go.queries, go.total * go.queries, *parts, settings.cut, len(coefficients),
        settings.limit, settings.excess, settings.half, settings.share, go.heads, go.groups,
        *query.stride()[:3], *grad.stride()[:3],
        BOUNDED=bounded, IN_PART=settings.cut < go.tiles, KINDS=go.kinds, TILE=TILE, PRECISION=go.precision,
        **go.sizes, **meta,
    )  # fmt: skip
    grad_sums, grad_ones, grad_second = go.sum_up(query, mean, grad, average, logits, stats, rows)

    def of_keys(x: Tensor) -> Tensor:
        """Add up [blocks, BH, n] to [G, n]."""
        return x.unflatten(1, (go.key_total, go.groups)).sum((0, 2))

    # The average takes v off in the sums, too.
    unweighted = ones / torch.where(squares > 0, squares, 1.0).flatten()
    grad_average = of_keys(part_average) - (unweighted.unsqueeze(1) @ grad_sums).squeeze(1)
    grad_squares = logits.new_empty(0)
    if bounded:
        of_number, along, of_size = of_keys(part_stats).unbind(-1)
        grad_second.diagonal(dim1=-2, dim2=-1).add_(settings.scale**2 / go.dim * of_size[:, None])
        effective = stats[:, kernels.NUMBER.value]
        of_number = of_number + along / effective * (1 - stats[:, kernels.TRUST.value])
        # 1 / number is the sum of the squares of weights.
        grad_squares = -2 * effective.square() * of_number

    meta = meta_of("key_grad_kernel", go.dim, go.width, query.dtype)
    blocks = triton.cdiv(go.keys, meta["ROWS"])
    grad_y, grad_weight = go.empty(go.key_total, go.keys, go.dim), go.empty(go.key_total, go.keys)
    grad_value = go.empty(*value.shape, dtype=value.dtype)
    part_key, part_weight = go.empty(blocks, go.key_total, go.dim), go.empty(blocks, go.key_total)
    kernels.key_grad_kernel[go.key_total, blocks](
        key, centre, value, average, logits, stats, factors, first, degrees,
        grad_sums, grad_ones, grad_second, grad_average, grad_squares,
        grad_y, grad_value, grad_weight, part_key, part_weight,
        go.keys, *parts, go.key_heads, *key.stride()[:3], *value.stride()[:3],
        BOUNDED=bounded, KINDS=go.kinds, TILE=TILE, PRECISION=go.precision, **go.sizes, **meta,
    )  # fmt: skip
    if not settings.centres:
        return [grad_query.view(query.shape).to(query.dtype), grad_y.view(key.shape).to(key.dtype), grad_value]

    grad_key, part_mean = go.empty(*key.shape, dtype=key.dtype), go.empty(blocks, go.key_total, go.dim)
    kernels.centre_grad_kernel[go.key_total, blocks](
        key, centre, mean, logits, stats, -part_key.sum(0), part_weight.sum(0),
        grad_y, grad_weight, grad_key, part_mean,
        go.keys, settings.scale, go.key_heads, *key.stride()[:3],
        SHIFTED=shifted, dim=go.dim, DIM=go.sizes["DIM"], **meta,
    )  # fmt: skip
    if not shifted:
        return [grad_query.view(query.shape).to(query.dtype), grad_key, grad_value]

    grad_mean = part_mean.sum(0) - of_keys(part_query)
    grad_shifted = go.empty(*query.shape, dtype=query.dtype)
    blocks = triton.cdiv(go.queries, meta["ROWS"])
    kernels.mean_grad_kernel[go.total, blocks](
        grad_query, grad_mean, mask, number, grad_shifted, go.queries, go.heads, go.groups,
        MASKED=mask is not None, dim=go.dim, DIM=go.sizes["DIM"], **meta,
    )  # fmt: skip
    return [grad_shifted, grad_key, grad_value]


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (query, key, value)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.integers, ctx.floats = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    tensors, kept = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    grad = grads[0]
    assert grad is not None
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    found = _attend_backward(grad, *tensors, list(kept), ctx.integers, ctx.floats)
    return (*found, *[None] * 8)


def _refuse(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise UserError("the kernels have no gradients of gradients; leave the environment variable SCHOENBAT_TRITON unset")


_attend.register_autograd(_differentiate, setup_context=_keep)
_attend_backward.register_autograd(_refuse)
