"""What the shell completes: names that would be accepted at that place, read from files alone, without torch."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.grid.axes import Cell, GridParams, expand_grid
from pipeline.grid.settings import PARAMS_FILE, enter_project, read_yaml
from schoenbat.errors import UserError
from schoenbat.lra.config import build_config
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
    return expand_grid(build_config(GridParams, _settings().get("grid"), f"{PARAMS_FILE}: grid"))


def _axis(name: str) -> Complete:
    return _quietly(lambda: (value for cell in _cells() if (value := getattr(cell, name)) is not None))


task, attn, former = _section("task"), _section("attention"), _section("former")
"""Those that have settings, for one cell."""
kernel = _quietly(lambda: Registry("dotf", "schoenbat.kernels", object).names())
grid_task, grid_attn, grid_dotf, grid_former, grid_seed, cell = map(
    _axis, ("task", "attn", "dotf", "former", "seed", "id")
)
"""Those of the grid, for filters."""
profile = _quietly(lambda: sorted(path.stem for path in Path("profiles").glob("*.yaml")))
log = _quietly(lambda: sorted(path.stem for path in Path("logs").glob("*/*.log")))
trained = _quietly(lambda: sorted(path.parent.name for path in Path("runs").glob("*/*/metrics.json")))
comparable = _quietly(
    lambda: sorted({name for path in Path("runs").glob("*/*/metrics.json") for name in path.parts[1:3]})
)
