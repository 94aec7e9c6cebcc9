"""What the shell completes: names that would be accepted at that place, read from files alone, without torch."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.grid.axes import Cell, read_cells
from pipeline.grid.settings import PARAMS_FILE, enter_project, read_yaml
from schoenbat.errors import UserError
from schoenbat.registry import Registry

Complete = Callable[[str], list[str]]


def _quietly(names: Callable[[], Iterable[object]]) -> Complete:
    """Names that begin with what has been typed; none where the project's files cannot be read."""

    def complete(incomplete: str) -> list[str]:
        try:
            enter_project()
            found = dict.fromkeys(str(name) for name in names())
        except UserError:
            return []
        return [name for name in found if name.startswith(incomplete)]

    return complete


def _settings() -> dict[str, Any]:
    settings = read_yaml(PARAMS_FILE)
    return settings if isinstance(settings, dict) else {}


def _section(name: str) -> Complete:
    return _quietly(lambda: _settings().get(name) or {})


def _cells() -> list[Cell]:
    return read_cells(_settings())


def _axis(name: str) -> Complete:
    return _quietly(lambda: (value for cell in _cells() if (value := getattr(cell, name)) is not None))


task, attn, former = _section("task"), _section("attention"), _section("former")
"""Those that have settings, for one cell."""
kernel = _quietly(lambda: Registry("dotf", "schoenbat.kernels", object).names())
grid_task, grid_attn, grid_dotf, grid_former, grid_seed, cell, group = map(
    _axis, ("task", "attn", "dotf", "former", "seed", "id", "group")
)
"""Those of the grid, for filters."""
replaced = _quietly(lambda: _settings()["trained"]["cells"])
profile = _quietly(lambda: sorted(path.stem for path in Path("profiles").glob("*.yaml")))
log = _quietly(lambda: sorted(path.stem for path in Path("logs").glob("*/*.log")))
trained = _quietly(lambda: sorted(cell for cells in _trained().values() for cell in cells))
comparable = _quietly(lambda: sorted({name for profile, cells in _trained().items() for name in (profile, *cells)}))


def _trained() -> dict[str, list[str]]:
    # It imports numpy, which other names do not need.
    from pipeline.grid.results import trained_cells

    return {path.name: trained_cells(path.name) for path in Path("runs").glob("*")}
