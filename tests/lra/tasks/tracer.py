"""Whether two discs lie on one contour, from nothing but dashes in any order: written apart from what draws them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import ceil, cos, pi, sin
from typing import NamedTuple


class Segment(NamedTuple):
    """A dash as the tracer is given it; points are (y, x)."""

    tail: tuple[int, int]
    head: tuple[int, int]
    pivot: tuple[int, int]
    angle: float


def follow(point: tuple[int, int], angle: float, length: int) -> tuple[int, int]:
    y, x = point
    return ceil(y + length * sin(angle)), ceil(x + length * cos(angle))


def walks(segments: Iterable[Segment], start: tuple[int, int], num_dashes: int) -> Iterator[list[Segment]]:
    """Every chain of `num_dashes` dashes whose first one begins at `start`; where two have the same pivot, both.

    No contour turns by a right angle or more.
    """
    at = defaultdict(list)
    for segment in segments:
        at[segment.pivot].append(segment)
    seeds = [segment for found in at.values() for segment in found if segment.tail == start]
    # A first dash ends two pixels from where it begins, and its pivot lies three behind its end.
    seeds = [
        seed
        for seed in seeds
        if seed.head == follow(start, seed.angle, 2)
        and seed.pivot == follow(seed.head, seed.angle + (pi if seed.angle <= 0 else -pi), 3)
    ]
    chains = [[seed] for seed in seeds]
    for _ in range(num_dashes - 1):
        chains = [
            [*chain, after]
            for chain in chains
            for after in at[follow(chain[-1].pivot, chain[-1].angle, 4)]
            if cos(after.angle - chain[-1].angle) > 0
        ]
    yield from chains


def labels_of(segments: list[Segment], discs: tuple[tuple[int, int], tuple[int, int]], num_dashes: int) -> set[int]:
    """The labels that the dashes allow: 1 if a walk leads from one disc to the other, 0 if one leads elsewhere.

    Both, where the two contours meet in a pivot, so that nothing tells which goes on where. Empty, where no walk of
    that many dashes begins at a disc.
    """
    return {
        int(chain[-1].head == discs[1 - number])
        for number in (0, 1)
        for chain in walks(segments, discs[number], num_dashes)
    }
