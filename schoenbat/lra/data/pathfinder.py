"""Draw one picture of the pathfinder problem at 32 x 32 pixels (Linsley et al. 2018; Kim et al. 2020; Tay et al. 2021).

Two contours of dashes grow from the middle, distractors beside them, and two discs mark two ends. Coordinates are
(y, x), angles are radians with the direction (sin, cos), and

    move(p, t, r) = ceil(p + r (sin t, cos t)).

A dash is known by its pivot and its angle: the pivot of the next one is move(pivot, angle, 4).
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np

SIDE = 32
MARGIN = 4
"""Half the side of the raster of a dash; the canvas has so many more pixels on each side."""
GAP_TO_PIVOT = 3
"""Radius of the candidates for a next dash around its pivot."""
PIVOT_STEP = 4
SEED_DISTANCE = 7
DASH = 2
TARGET_CONTRAST, DISTRACTOR_CONTRAST = 1.5, 2.0
CROWDED = 1.8
"""A dash is refused where occupancy and its mask add up to this."""
FREE = 0.3
FIRST_ANGLES = tuple(range(-150, -120))
"""Degrees. The published generator draws from all 360, but its check of the seed fails for every other angle, because
it meets the edge of the picture; what remains is this."""
LAST_WIDE_ANGLE = -139
"""For FIRST_ANGLES up to here that check also looks one pixel to the left."""

Point = tuple[int, int]


@dataclass(frozen=True)
class Level:
    """Dashes of a target and of a distractor, and how many distractors are tried."""

    target: int
    distractor: int
    num_distractors: int


STREAMS = {"test": 0, "dev": 1, "train": 2}
LEVELS = {"easy": Level(6, 2, 10), "intermediate": Level(9, 3, 6), "hard": Level(14, 4, 5)}


@dataclass(frozen=True)
class Dash:
    """Where a dash lies: it goes from `tail` to `head` in the direction `angle`."""

    pivot: Point
    angle: float
    tail: Point
    head: Point


@dataclass
class Picture:
    """A picture with what it was made from.

    Attributes:
        pixels: uint8 [32, 32].
        label: 1 where both discs lie on one contour, else 0.
        contours: the dashes of the two targets, in order.
        distractors: the dashes of each distractor.
        discs: their centres.
        attempts: how often a pair of contours was begun.
    """

    pixels: np.ndarray
    label: int
    contours: list[list[Dash]]
    distractors: list[list[Dash]]
    discs: tuple[Point, Point]
    attempts: int


def move(point: Point, angle: float, distance: float) -> Point:
    """Return the pixel at or beyond the point reached; only exact angles keep axis-parallel steps in place."""
    return (
        math.ceil(point[0] + distance * math.sin(angle)),
        math.ceil(point[1] + distance * math.cos(angle)),
    )


def opposite(angle: float) -> float:
    return angle - math.pi if angle > 0 else angle + math.pi


def inside(point: Point) -> bool:
    return 0 <= point[0] < SIDE and 0 <= point[1] < SIDE


@functools.cache
def lanczos(size: int, reduced: int) -> np.ndarray:
    """Compute weights, int64 [reduced, size] in units of 2^-22, of a Lanczos-3 reduction with antialiasing.

    With `reduce` the result is that of Pillow's `Image.resize` on 8-bit pictures, bit for bit.
    """
    scale = size / reduced
    support = 3 * scale
    weights = np.zeros((reduced, size))
    for row in range(reduced):
        centre = (row + 0.5) * scale
        start, end = max(0, int(centre - support + 0.5)), min(size, int(centre + support + 0.5))
        x = (np.arange(start, end) - centre + 0.5) / scale
        kernel = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
        weights[row, start:end] = kernel / kernel.sum()
    return np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int64)


def reduce(canvas: np.ndarray, side: int) -> np.ndarray:
    """Reduce an 8-bit picture [n, n] to [side, side], in 0..1: columns first, then rows, rounded each time."""
    weights = lanczos(len(canvas), side)
    for _ in range(2):
        canvas = np.clip((canvas @ weights.T + 2**21) >> 22, 0, 255).T
    return canvas / 255


@functools.cache
def rasters(end: Point) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and mask [9, 9], in 0..1, of a dash from the centre to `end`, counted in half pixels.

    The dash is a line one pixel wide on a canvas of twice the size; the mask is that line dilated by a disc of radius
    2.
    """
    side = 4 * MARGIN + 1
    line = np.zeros((side, side), np.int64)
    for y, x in line_pixels(end):
        line[y + 2 * MARGIN, x + 2 * MARGIN] = 255
    line_rows, line_columns = np.nonzero(line)
    rows, columns = np.mgrid[:side, :side]
    near = ((rows[..., None] - line_rows) ** 2 + (columns[..., None] - line_columns) ** 2 <= 4).any(-1)
    return reduce(line, 2 * MARGIN + 1), reduce(near * 255, 2 * MARGIN + 1)


def line_pixels(end: Point) -> list[Point]:
    """Draw Bresenham's line from (0, 0) to `end`."""
    (dy, dx), pixels = (abs(end[0]), abs(end[1])), []
    step_y, step_x = int(math.copysign(1, end[0])), int(math.copysign(1, end[1]))
    y = x = 0
    if dx >= dy:
        error = 2 * dy - dx
        for _ in range(dx + 1):
            pixels.append((y, x))
            if error >= 0:
                y, error = y + step_y, error - 2 * dx
            error += 2 * dy
            x += step_x
    else:
        error = 2 * dx - dy
        for _ in range(dy + 1):
            pixels.append((y, x))
            if error >= 0:
                x, error = x + step_x, error - 2 * dy
            error += 2 * dx
            y += step_y
    return pixels


@functools.cache
def dash_rasters(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return `rasters` of a dash in the direction `angle`."""
    y, x = move((2 * MARGIN, 2 * MARGIN), angle, 2 * DASH)
    return rasters((y - 2 * MARGIN, x - 2 * MARGIN))


def _candidate_offsets() -> tuple[list[Point], list[float]]:
    """Return pixels at the distance GAP_TO_PIVOT of a pivot, and their angles from it."""
    steps = np.radians(np.arange(0, 360, 360 / (2 * math.pi * GAP_TO_PIVOT)))
    offsets = [(math.floor(GAP_TO_PIVOT * math.sin(step)), math.floor(GAP_TO_PIVOT * math.cos(step))) for step in steps]
    offsets = list(dict.fromkeys(offsets))
    return offsets, [math.atan2(y, x) for y, x in offsets]


OFFSETS, ANGLES = _candidate_offsets()
_OFFSET_ROWS, _OFFSET_COLUMNS = (np.array(axis) for axis in zip(*OFFSETS, strict=True))
_BACKWARDS = [dash_rasters(opposite(angle)) for angle in ANGLES]


@functools.cache
def _straightness(angle: float) -> np.ndarray:
    """Return cos^2 of the turn from `angle` to each candidate, 0 from a right angle on."""
    turn = np.abs(np.array(ANGLES) - angle) % (2 * math.pi)
    turn = np.minimum(turn, 2 * math.pi - turn)
    return np.cos(np.minimum(turn, math.pi / 2)) ** 2


class _Canvas:
    """Pixels and occupancy, both with MARGIN more pixels on each side, which count for nothing."""

    def __init__(self) -> None:
        self.pixels = np.zeros((SIDE + 2 * MARGIN, SIDE + 2 * MARGIN))
        self.occupancy = np.zeros_like(self.pixels)
        self._inner(self.occupancy)[[0, -1], :] = 1
        self._inner(self.occupancy)[:, [0, -1]] = 1

    @staticmethod
    def _inner(canvas: np.ndarray) -> np.ndarray:
        return canvas[MARGIN:-MARGIN, MARGIN:-MARGIN]

    @staticmethod
    def _window(canvas: np.ndarray, centre: Point) -> np.ndarray:
        y, x = centre
        return canvas[y : y + 2 * MARGIN + 1, x : x + 2 * MARGIN + 1]

    def occupy(self, centre: Point, mask: np.ndarray) -> None:
        window = self._window(self.occupancy, centre)
        np.maximum(window, mask, out=window)

    def draw(self, centre: Point, raster: np.ndarray) -> None:
        window = self._window(self.pixels, centre)
        np.maximum(window, raster, out=window)

    def crowded(self, centre: Point, mask: np.ndarray) -> bool:
        y, x = centre
        top, left = max(0, MARGIN - y), max(0, MARGIN - x)
        bottom, right = min(2 * MARGIN + 1, SIDE + MARGIN - y), min(2 * MARGIN + 1, SIDE + MARGIN - x)
        both = self._window(self.occupancy, centre)[top:bottom, left:right] + mask[top:bottom, left:right]
        return bool(both.max() >= CROWDED)

    def openness(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return 1 - the largest occupancy of a pixel and its four neighbours, for pixels inside."""
        y, x = rows + MARGIN, columns + MARGIN
        around = [self.occupancy[y + dy, x + dx] for dy, dx in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))]
        return 1 - np.max(around, axis=0)


@dataclass
class _Contour:
    """A contour while it grows; the mask of its last dash is not in the occupancy yet."""

    dashes: list[Dash]
    last_mask: tuple[Point, np.ndarray]
    drawn: list[tuple[Point, np.ndarray]] = field(default_factory=list)


def draw(level: str, seed: int, split: str, index: int) -> Picture:
    """Draw picture number `index` of a split: a function of the arguments, whatever else is drawn."""
    return draw_picture(np.random.default_rng([seed, STREAMS[split], index]), LEVELS[level])


def draw_picture(generator: np.random.Generator, level: Level) -> Picture:
    """Return a picture and its label, each label with probability 1/2."""
    label = int(generator.integers(2))
    attempts = 0
    while True:
        attempts += 1
        canvas = _Canvas()
        contours = _grow_pair(generator, canvas, level.target)
        if contours is not None:
            break
    # As in the published generator only the second contour's last dash is taken into account from here on.
    canvas.occupy(*contours[1].last_mask)
    distractors = []
    for _ in range(level.num_distractors):
        for _ in range(5):
            grown = _try_distractor(generator, canvas, level.distractor)
            if grown is not None:
                distractors.append(grown)
                break
    for contrast, group in ((TARGET_CONTRAST, contours), (DISTRACTOR_CONTRAST, distractors)):
        for contour in group:
            for centre, raster in contour.drawn:
                canvas.draw(centre, contrast * raster)
    start = int(generator.integers(2))
    end = start if label else 1 - start
    discs = contours[start].dashes[0].tail, contours[end].dashes[-1].head
    pixels = canvas.pixels[MARGIN:-MARGIN, MARGIN:-MARGIN]
    for disc in discs:
        pixels = np.maximum(pixels, disc_raster(disc))
    return Picture(
        pixels=np.rint(pixels / pixels.max() * 255).astype(np.uint8),
        label=label,
        contours=[contour.dashes for contour in contours],
        distractors=[contour.dashes for contour in distractors],
        discs=discs,
        attempts=attempts,
    )


def disc_raster(centre: Point) -> np.ndarray:
    """Draw a disc of radius 1.5 at twice the size: [32, 32] in 0..1."""
    y, x = np.ogrid[: 2 * SIDE, : 2 * SIDE]
    disc = (y - 2 * centre[0]) ** 2 + (x - 2 * centre[1]) ** 2 <= 9
    return reduce(disc * 255, SIDE)


def _begin(tail: Point, degrees: int) -> _Contour | None:
    """Return a first dash, or None where it would leave the picture."""
    angle = math.radians(degrees)
    head = move(tail, angle, DASH)
    pivot = move(head, opposite(angle), GAP_TO_PIVOT)
    if not (inside(head) and inside(pivot)):
        return None
    raster, mask = dash_rasters(angle)
    return _Contour([Dash(pivot, angle, tail, head)], (tail, mask), [(tail, raster)])


def _grow_pair(generator: np.random.Generator, canvas: _Canvas, num_dashes: int) -> list[_Contour] | None:
    degrees = int(generator.choice(FIRST_ANGLES))
    tail = int(generator.integers(14, 17)), int(generator.integers(15 if degrees <= LAST_WIDE_ANGLE else 14, 17))
    first = _begin(tail, degrees)
    second = None
    for _ in range(3):
        towards = math.radians(int(generator.integers(360)))
        beside = (
            round(tail[0] + SEED_DISTANCE * math.sin(towards)),
            round(tail[1] + SEED_DISTANCE * math.cos(towards)),
        )
        second = _begin(beside, int(generator.integers(-180, 180)))
        if second is not None:
            break
    if first is None or second is None:
        return None
    for _ in range(num_dashes - 1):
        if not (_grow(generator, canvas, first) and _grow(generator, canvas, second)):
            return None
    # The published generator lets such a pair pass (1 in some hundreds); then the discs of label 0 lie on one contour.
    if first.dashes[-1].head == second.dashes[-1].head:
        return None
    return [first, second]


def _grow(generator: np.random.Generator, canvas: _Canvas, contour: _Contour) -> bool:
    """Add one dash; False where there is no room for it."""
    last = contour.dashes[-1]
    pivot = move(last.pivot, last.angle, PIVOT_STEP)
    rows, columns = _OFFSET_ROWS + pivot[0], _OFFSET_COLUMNS + pivot[1]
    (candidates,) = np.nonzero((rows >= 0) & (rows < SIDE) & (columns >= 0) & (columns < SIDE))
    weights = _straightness(last.angle)[candidates] * canvas.openness(rows[candidates], columns[candidates])
    cumulated = np.cumsum(weights)
    if not len(candidates) or cumulated[-1] < 1e-4:
        return False
    for _ in range(3):
        drawn = int(np.searchsorted(cumulated, generator.random() * cumulated[-1], side="right"))
        chosen = int(candidates[min(drawn, len(candidates) - 1)])
        head = pivot[0] + OFFSETS[chosen][0], pivot[1] + OFFSETS[chosen][1]
        raster, mask = _BACKWARDS[chosen]
        if not canvas.crowded(head, mask):
            canvas.occupy(*contour.last_mask)
            contour.last_mask = head, mask
            contour.drawn.append((head, raster))
            tail = move(head, opposite(ANGLES[chosen]), DASH)
            contour.dashes.append(Dash(pivot, ANGLES[chosen], tail, head))
            return True
    return False


def _try_distractor(generator: np.random.Generator, canvas: _Canvas, num_dashes: int) -> _Contour | None:
    """Return a distractor, which then occupies its place, or None and no trace of it."""
    free = canvas._inner(canvas.occupancy) <= FREE
    if free.mean() < 0.01:
        return None
    degrees = int(generator.integers(-180, 180))
    if degrees not in FIRST_ANGLES:
        return None
    allowed = free.copy()
    allowed[:-1, :-1] &= free[1:, 1:]
    if degrees <= LAST_WIDE_ANGLE:
        allowed[:, 1:] &= free[:, :-1]
    tails = np.argwhere(allowed)
    if not len(tails):
        return None
    contour = None
    for _ in range(3):
        y, x = tails[generator.integers(len(tails))]
        contour = _begin((int(y), int(x)), degrees)
        if contour is not None:
            break
    if contour is None:
        return None
    before = canvas.occupancy.copy()
    for _ in range(num_dashes - 1):
        if not _grow(generator, canvas, contour):
            canvas.occupancy = before
            return None
    canvas.occupy(*contour.last_mask)
    return contour
