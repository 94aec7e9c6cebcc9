"""The grid as params.yaml states it: axes, cells and their names, without anything that takes long to import.

`pipeline.grid.params` checks the rest of the file, and `pipeline.grid.cells` knows what a cell is made of.

The id of a cell joins its axes in the order in which dvc.yaml lists them, so that a stage can be named without asking
DVC; a test compares these names with `dvc stage list`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from pipeline.grid.settings import PARAMS_FILE
from schoenbat.errors import UserError

SHARED_SOURCES = (
    Path("schoenbat/training.py"),
    Path("schoenbat/norm.py"),
    Path("schoenbat/nn"),
    Path("schoenbat/features"),
    Path("schoenbat/ops"),
    Path("schoenbat/data/arrays.py"),
    Path("schoenbat/attention/__init__.py"),
)
"""The numerics that every cell goes through."""


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
    """The axes of the two grids; an empty axis means no cells."""

    tasks: list[str]
    seeds: list[int]
    plain: PlainAxes
    kernel: KernelAxes


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
        return "-".join(str(value) for value in dataclasses.astuple(self) if value is not None)

    def stage(self, verb: str, profile: str) -> str:
        """The DVC stage of this cell that does `verb`: "train" or "evaluate"."""
        return f"{verb}{'' if self.dotf is None else '_kernel'}@{profile}-{self.id}"

    def run_folder(self, profile: str) -> Path:
        return Path("runs", profile, self.id)

    def checkpoint_folder(self, profile: str) -> Path:
        return Path("checkpoints", profile, self.id)

    def arguments(self) -> list[str]:
        """This cell on the command line."""
        dotf = [] if self.dotf is None else ["--dotf", self.dotf]
        return ["--task", self.task, "--attn", self.attn, *dotf, "--former", self.former, "--seed", str(self.seed)]


def expand_grid(grid: GridParams) -> list[Cell]:
    """All cells of the grid, task by task; an empty axis gives none of its half.

    Raises:
        UserError: two cells have the same id: their results would overwrite each other.
    """
    cells = [
        Cell(task, attn, dotf, former, seed)
        for task in grid.tasks
        for attns, dotfs, formers in (
            (grid.plain.attn, [None], grid.plain.former),
            (grid.kernel.attn, grid.kernel.dotf, grid.kernel.former),
        )
        for attn in attns
        for dotf in dotfs
        for former in formers
        for seed in grid.seeds
    ]
    by_id: dict[str, Cell] = {}
    for cell in cells:
        check_id(cell, by_id.setdefault(cell.id, cell))
    return cells


def check_id(cell: Cell, other: Cell) -> None:
    """Raise UserError if two different cells have the same id, as hyphens in names allow."""
    if cell.id == other.id and cell != other:
        raise UserError(
            f"{PARAMS_FILE}: grid: two cells have the id {cell.id}: {' '.join(other.arguments())} and "
            f"{' '.join(cell.arguments())}; leave one of them out"
        )


def download_stage(task: str) -> str:
    return f"download@{task}"


def preprocess_stage(profile: str, task: str) -> str:
    return f"preprocess@{profile}-{task}"


def sources(cell: Cell) -> list[Path]:
    """Files and folders of code that decide the cell's numbers; dvc.yaml lists the same.

    Those of other distributions are there as links (see `pipeline.grid.components`).
    """
    kernel = [] if cell.dotf is None else ["__init__.py", "_series.py", f"{cell.dotf}.py"]
    return [
        *SHARED_SOURCES,
        Path(f"schoenbat/attention/{cell.attn}.py"),
        *(Path("schoenbat/kernels", file) for file in kernel),
    ]
