"""The grid as params.yaml states it: axes, cells and their names, without anything that takes long to import.

`pipeline.grid.params` checks the rest of the file, and `pipeline.grid.cells` knows what a cell is made of.

The id of a cell joins its axes, in the order in which dvc.yaml lists them in the names of its stages.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.grid.settings import PARAMS_FILE
from pipeline.host.text import counted
from schoenbat.errors import UserError
from schoenbat.lra.config import build_config

MAX_CELLS = 20_000
"""Of one grid; every command looks at each of them."""


@dataclass(frozen=True)
class PlainAxes:
    """Mechanisms without a kernel."""

    attn: list[str]
    former: list[str]


@dataclass(frozen=True)
class KernelAxes:
    """Mechanisms that approximate or evaluate a kernel, each with each kernel."""

    attn: list[str]
    dotf: list[str]
    former: list[str]


@dataclass(frozen=True)
class GridParams:
    """The axes of the two grids."""

    tasks: list[str]
    seeds: list[int]
    plain: PlainAxes
    kernel: KernelAxes

    def components(self) -> dict[str, list[str]]:
        """Return the names of components by kind, as `pipeline.grid.numerics` calls it."""
        return {"attention": self.plain.attn + self.kernel.attn, "kernel": self.kernel.dotf, "task": self.tasks}


@dataclass(frozen=True)
class Cell:
    """One point of the grid; `dotf` is None for a mechanism without a kernel."""

    task: str
    attn: str
    dotf: str | None
    former: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.group}-{self.seed}"

    @property
    def group(self) -> str:
        """The cells that differ from this one in the seed alone, as one name: they are one stage of DVC."""
        return "-".join(axis for axis in (self.task, self.attn, self.dotf, self.former) if axis is not None)

    def arguments(self) -> list[str]:
        """Return the options that name this cell on the command line."""
        dotf = [] if self.dotf is None else ["--dotf", self.dotf]
        return ["--task", self.task, "--attn", self.attn, *dotf, "--former", self.former, "--seed", str(self.seed)]


def read_cells(settings: Mapping[str, Any]) -> list[Cell]:
    """Return the cells of the content of params.yaml; raises UserError."""
    return expand_grid(build_config(GridParams, settings.get("grid"), f"{PARAMS_FILE}: grid"))


def expand_grid(grid: GridParams) -> list[Cell]:
    """Return all cells, task by task; an empty axis of mechanisms, kernels or formers gives none of its half.

    Raises:
        UserError: there are no tasks or seeds, or more cells than MAX_CELLS; or two cells have the same id, so that
            their results would overwrite each other.
    """
    for axis, values in (("tasks", grid.tasks), ("seeds", grid.seeds)):
        if not values:
            raise UserError(f"{PARAMS_FILE}: grid.{axis} is empty")
    halves: list[tuple[list[Any], ...]] = [
        (grid.plain.attn, [None], grid.plain.former),
        (grid.kernel.attn, grid.kernel.dotf, grid.kernel.former),
    ]
    models = sum(math.prod(map(len, half)) for half in halves)
    number = len(grid.tasks) * models * len(grid.seeds)
    if number > MAX_CELLS:
        sizes = f"{counted(len(grid.tasks), 'task')}, {counted(models, 'model')}, {counted(len(grid.seeds), 'seed')}"
        raise UserError(f"{PARAMS_FILE}: grid: {sizes} make {number:,} cells; a profile has at most {MAX_CELLS:,}")
    cells = [
        Cell(task, attn, dotf, former, seed)
        for task in grid.tasks
        for half in halves
        for attn, dotf, former in itertools.product(*half)
        for seed in grid.seeds
    ]
    check_ids(cells)
    return cells


def check_ids(cells: Iterable[Cell]) -> None:
    """Raise UserError if two different cells have the same id, as hyphens in names allow."""
    by_id: dict[str, Cell] = {}
    for cell in cells:
        other = by_id.setdefault(cell.id, cell)
        if other != cell:
            raise UserError(
                f"{PARAMS_FILE}: grid: two cells have the id {cell.id}: {' '.join(other.arguments())} and "
                f"{' '.join(cell.arguments())}; leave one of them out"
            )


def stage_names(profile: str, cell: Cell) -> tuple[str, str]:
    """Return the stages of DVC that train and test a cell and those that differ from it in the seed alone."""
    kernel = "" if cell.dotf is None else "_kernel"
    return f"train{kernel}@{profile}-{cell.group}", f"evaluate{kernel}@{profile}-{cell.group}"


def replace_stage_name(profile: str, cell: str) -> str:
    """Return the stage of DVC of a cell of `trained.cells`."""
    return f"replace@{profile}-{cell}"


def data_stage_names(profile: str, task: str) -> tuple[str, str]:
    """Return the stages of DVC that fetch and prepare the data of a task."""
    return f"download@{profile}-{task}", f"preprocess@{profile}-{task}"
