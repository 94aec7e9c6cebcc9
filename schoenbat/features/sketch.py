r"""The features of least expected error: low degrees exactly, the rest of the budget to a sketch of the next degree.

`schoenbat.features.allocation` says how many features each degree gets, and why they are products of different
coordinates of z = R x in an orthonormal basis. R is drawn from all rotations alike, so that over the draw

    E prod_{j in J} z_j z'_j = a multiple of the harmonic P_l(<x, y> / (|x| |y|)),

for every set J of l coordinates: an unbiased estimate of it up to the factor that the allocation chooses. Constant and
linear terms do not depend on R when they are complete, and neither does a degree that has all its monomials.

Sets of coordinates come in orbits under cyclic shifts, {i, i + s, ...} for i = 0 .. d - 1, because those are products
of contiguous slices (`schoenbat.features.plan`), and because every coordinate takes part in equally many of them.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from schoenbat.features.allocation import Share, allocate
from schoenbat.features.plan import Described, FeatureMap, Plan, Run
from schoenbat.kernels import Kernel


class Sketch(FeatureMap):
    """phi: [..., N, head_dim] to [..., N, D], the same draw for every head and batch entry.

    D is `num_features`, or less where the kernel's series is exhausted before.

    Args:
        kernel: gives f and its coefficients.
        num_features: the budget, at least 1.
        max_degree: the highest degree that may get features.
        scale: |x| |y| of the vectors that the allocation is made for.
        fixed_norm: whether all vectors have the length sqrt(scale).
        bounded: whether attention bounds its output; where the linear degree is incomplete it always does.
        generator: the source of the draw.
    """

    rotation_bits: Tensor
    near = True

    def __init__(
        self,
        kernel: Kernel,
        *,
        head_dim: int,
        num_features: int,
        max_degree: int,
        scale: float,
        fixed_norm: bool,
        bounded: bool = True,
        generator: torch.Generator,
    ) -> None:
        super().__init__(kernel, generator)
        self.allocation = allocate(
            kernel,
            head_dim=head_dim,
            num_features=num_features,
            scale=scale,
            max_degree=max_degree,
            fixed_norm=fixed_norm,
        )
        self.centres = kernel.is_exponential and not fixed_norm
        shares = {share.degree: share for share in self.allocation.shares}
        linear = shares.get(1)
        higher = [share for share in self.allocation.shares if share.degree >= 2]
        # Coordinates of vectors of the usual size are of the size of a unit vector's.
        self.base_weight = kernel.unit_argument**-0.5
        root = math.sqrt(kernel.magnitude)
        self.plan = Plan(
            constant=shares[0].weight / root if 0 in shares else 0.0,
            num_linear=linear.num_features if linear else 0,
            runs=tuple(run for share in higher for run in _runs(share, head_dim, self.base_weight, root)),
            unit=self.allocation.root_mean_square / kernel.magnitude,
            linear_weight=_rounded(linear.weight / root / self.base_weight) if linear else 1.0,
        )
        self.error = self.allocation.expected_error
        self.unexplained = self.allocation.unexplained
        self.shares = {0: 1.0, **{share.degree: share.num_features / share.of for share in self.allocation.shares}}
        self.sketched = min((degree for degree, share in self.shares.items() if share < 1), default=None)
        self.described = {
            share.degree: Described(share.coefficient, share.noise, share.exact) for share in self.allocation.shares
        }
        if self.sketched == 1:
            assert linear is not None
            self.described[1] = Described(linear.weight**2 / kernel.magnitude, 0.0, True)
            self.linear_share = self.shares[1]
        self.is_bounded = bounded or self.sketched == 1
        with torch.device("cpu"):
            self.register_buffer("rotation_bits", torch.zeros(head_dim, head_dim, dtype=torch.int32))
        self.resample(generator)

    def resample(self, generator: torch.Generator) -> None:
        """Draw the basis anew, from all orthonormal ones alike."""
        with torch.device("cpu"):
            gaussian = torch.randn(self.rotation_bits.shape, generator=generator, dtype=torch.float64)
            basis, triangle = torch.linalg.qr(gaussian)
            # With the signs of the diagonal the distribution is the uniform one (Mezzadri 2007).
            rotation = (basis * triangle.diagonal().sign()).to(torch.float32)
            self.rotation_bits.copy_(rotation.contiguous().view(torch.int32))
        self._store()

    def _pack(self) -> Tensor:
        """Return the coordinates as far as the linear features and the runs go."""
        rotation = self.rotation_bits.view(torch.float32)
        ends = [run.offsets[-1] + run.length for run in self.plan.runs]
        columns = torch.arange(max([self.plan.num_linear, *ends]), device=rotation.device) % len(rotation)
        return self.base_weight * rotation[:, columns]


def _rounded(weight: float) -> float:
    """Round a weight that is 1 up to rounding."""
    return 1.0 if math.isclose(weight, 1, rel_tol=1e-12) else weight


def _runs(share: Share, head_dim: int, base_weight: float, root: float) -> Iterator[Run]:
    """Yield the features of one degree, orbit by orbit; their weights are over the root of the kernel's magnitude."""
    left = share.num_features
    for offsets, length in _orbits(head_dim, share.degree, share.exact):
        repeated = math.prod(math.factorial(count) for count in Counter(offsets).values())
        weight = share.weight / root / math.sqrt(repeated) / base_weight**share.degree
        length = min(length, left)
        yield Run(offsets, length, _rounded(weight))
        left -= length
        if not left:
            return
    assert not left


def _orbits(head_dim: int, degree: int, repeated: bool) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield each orbit of `degree` coordinates under cyclic shifts once: offsets from the first, and its size.

    Args:
        repeated: whether a coordinate may occur more than once.
    """
    choose = itertools.combinations_with_replacement if repeated else itertools.combinations
    for rest in choose(range(0 if repeated else 1, head_dim), degree - 1):
        offsets = (0, *rest)
        gaps = [b - a for a, b in itertools.pairwise((*offsets, head_dim))]
        # The same orbit is met once for each rotation of its gaps.
        rotations = {tuple(gaps[i:] + gaps[:i]) for i in range(degree)}
        if tuple(gaps) == min(rotations):
            yield offsets, head_dim * len(rotations) // degree
