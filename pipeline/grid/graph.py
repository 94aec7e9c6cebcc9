"""The stages of dvc.yaml for the settings of params.yaml: what each runs, reads and makes, and who comes first.

dvc.yaml is the one statement of stages. DVC itself would need seconds to say the same, so the file is read here, as far
as this project uses DVC's language: matrix stages whose texts name `${item.AXIS}`, `${item}` and keys of params.yaml.
Anything else in it is refused, and a test compares what is read with what DVC reads.
"""

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.grid.axes import Cell
from pipeline.grid.settings import PARAMS_FILE, read_yaml
from schoenbat.errors import UserError

PIPELINE_FILE = Path("dvc.yaml")
_REFERENCE = re.compile(r"\$\{\s*([^}]+?)\s*\}")
_KEYS = ("matrix", "cmd", "deps", "params", "outs", "metrics", "plots", "desc", "meta")
_CELL_AXES = ("task", "attn", "dotf", "former", "seed")


@dataclass(frozen=True)
class Stage:
    """One stage of DVC.

    Attributes:
        name: as DVC calls it, such as "train@quick-lra-text-mean-transformer-42".
        command: a line of shell.
        axes: its place in the matrix.
        deps: files and folders that it reads.
        params: keys of params.yaml that it depends on.
        outs: what it makes.
        cached: those of `outs` that DVC keeps a copy of.
        persistent: those of `outs` that are not deleted before it runs.
    """

    name: str
    command: str
    axes: Mapping[str, Any]
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]
    cached: frozenset[str]
    persistent: frozenset[str]

    @property
    def cell(self) -> str | None:
        """The id of the cell that it belongs to; None if it belongs to none."""
        if not {"task", "attn", "former", "seed"} <= self.axes.keys():
            return None
        return "-".join(str(self.axes[axis]) for axis in _CELL_AXES if axis in self.axes)


@dataclass(frozen=True)
class Graph:
    """All stages of the settings.

    Attributes:
        stages: by name, in an order in which they can run.
        needs: for each, the stages that make what it reads.
        gathers: for each, the stages that make something inside a folder that it reads. Such a stage takes what is
            there, so it comes after them, whatever becomes of them.
        given: for each, what it reads that no stage makes, such as code.
    """

    stages: Mapping[str, Stage]
    needs: Mapping[str, tuple[str, ...]]
    gathers: Mapping[str, tuple[str, ...]]
    given: Mapping[str, tuple[str, ...]]

    def cell_stages(self) -> list[str]:
        return [name for name, stage in self.stages.items() if stage.cell is not None]

    def upstream(self, names: Iterable[str]) -> set[str]:
        """`names` and all stages that they need."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.needs[name]
        return found


def read_graph(settings: Mapping[str, Any], path: Path = PIPELINE_FILE) -> Graph:
    """The stages that `path` states for these settings.

    Args:
        settings: the content of params.yaml.

    Raises:
        UserError: the file uses more of DVC's language than is read here, names a setting that is not there, or two
            stages have one name or make one file.
    """
    stages: dict[str, Stage] = {}
    for stage in itertools.chain.from_iterable(
        _expand(name, body, settings, path) for name, body in _bodies(path).items()
    ):
        if stage.name in stages:
            raise UserError(f"{path}: two stages are called {stage.name}")
        stages[stage.name] = stage
    maker: dict[str, str] = {}
    for stage in stages.values():
        for out in stage.outs:
            if out in maker:
                raise UserError(f"{path}: {maker[out]} and {stage.name} both make {out}")
            maker[out] = stage.name
    folders = {dep for stage in stages.values() for dep in stage.deps}
    inside: dict[str, list[str]] = {}
    for out, name in maker.items():
        for parent in PurePosixPath(out).parents:
            if str(parent) in folders:
                inside.setdefault(str(parent), []).append(name)
    # Most files of code are read by all cells.
    makers = {dep: _maker(dep, maker) for dep in folders}
    needs, gathers, given = {}, {}, {}
    for name, stage in stages.items():
        given[name] = tuple(dep for dep in stage.deps if dep not in inside and makers[dep] is None)
        needs[name] = tuple(dict.fromkeys(found for dep in stage.deps if (found := makers[dep]) is not None))
        gathers[name] = tuple(dict.fromkeys(other for dep in stage.deps for other in inside.get(dep, ())))
    ordered = _ordered(stages, {name: (*needs[name], *gathers[name]) for name in stages}, path)
    return Graph(ordered, needs, gathers, given)


def cell_sources(cell: Cell, command: str, profile: str, path: Path = PIPELINE_FILE) -> list[str]:
    """What the stage that does `schoenbat-exp COMMAND` for a cell, inside the grid or not, reads."""
    axes = {axis: getattr(cell, axis) for axis in _CELL_AXES if getattr(cell, axis) is not None} | {"profile": profile}
    for name, body in _bodies(path).items():
        if set(body.get("matrix") or ()) == set(axes) and body["cmd"].startswith(f"schoenbat-exp {command} "):
            return [str(_filled(dep, {}, axes, f"{path}: stage {name}")) for dep in body.get("deps") or ()]
    raise UserError(f"{path}: no stage runs schoenbat-exp {command} for a cell of {', '.join(axes)}")


def lookup(settings: Any, key: str) -> Any:
    """The value of a dotted key.

    Raises:
        KeyError: there is none.
    """
    for part in key.split("."):
        if not isinstance(settings, Mapping) or part not in settings:
            raise KeyError(key)
        settings = settings[part]
    return settings


def _bodies(path: Path) -> dict[str, dict[str, Any]]:
    document = read_yaml(path)
    bodies = document.get("stages") if isinstance(document, dict) else None
    if not isinstance(bodies, dict):
        raise UserError(f"{path}: no stages")
    for name, body in bodies.items():
        unread = sorted(body.keys() - set(_KEYS)) if isinstance(body, dict) else ["no mapping"]
        if unread or not isinstance(body.get("cmd"), str):
            raise UserError(f"{path}: stage {name}: {unread[0] if unread else 'cmd'} is not read by this program")
    return bodies


def _expand(name: str, body: dict[str, Any], settings: Mapping[str, Any], path: Path) -> Iterator[Stage]:
    matrix = body.get("matrix")
    if matrix is None:
        yield _made(name, body, {}, settings, path)
        return
    axes = {}
    for axis, written in matrix.items():
        values = _filled(written, settings, {}, f"{path}: stage {name}")
        if not isinstance(values, list):
            raise UserError(f"{path}: stage {name}: axis {axis} is no list")
        axes[axis] = [_filled(value, settings, {}, f"{path}: stage {name}") for value in values]
    for chosen in itertools.product(*axes.values()):
        yield _made(name, body, dict(zip(axes, chosen, strict=True)), settings, path)


def _made(name: str, body: dict[str, Any], axes: dict[str, Any], settings: Mapping[str, Any], path: Path) -> Stage:
    where = f"{path}: stage {name}"
    full = f"{name}@{'-'.join(str(value) for value in axes.values())}" if axes else name

    def filled(text: str) -> str:
        return str(_filled(text, settings, axes, where))

    outs: dict[str, Mapping[str, Any]] = {}
    for kind in ("outs", "metrics", "plots"):
        for entry in body.get(kind) or ():
            for written, options in entry.items() if isinstance(entry, dict) else ((entry, {}),):
                outs[filled(written)] = options or {}
    params = []
    for entry in body.get("params") or ():
        if not isinstance(entry, str):
            raise UserError(f"{where}: params of a file other than {PARAMS_FILE} are not read by this program")
        key = filled(entry)
        try:
            lookup(settings, key)
        except KeyError:
            raise UserError(f"{PARAMS_FILE}: missing key {key!r}, which stage {full} of {path} needs") from None
        params.append(key)
    return Stage(
        name=full,
        command=filled(body["cmd"]),
        axes=axes,
        deps=tuple(filled(dep) for dep in body.get("deps") or ()),
        params=tuple(params),
        outs=tuple(outs),
        cached=frozenset(out for out, options in outs.items() if options.get("cache", True)),
        persistent=frozenset(out for out, options in outs.items() if options.get("persist", False)),
    )


def _filled(text: Any, settings: Mapping[str, Any], axes: Mapping[str, Any], where: str) -> Any:
    """A text with its references replaced; the value itself where the text is one reference."""
    if not isinstance(text, str) or "${" not in text:
        return text

    def value(match: re.Match[str]) -> Any:
        key = match[1]
        if key == "item":
            # All axes as options, as DVC writes a mapping into a command.
            return " ".join(f"--{axis} {shlex.quote(str(chosen))}" for axis, chosen in axes.items())
        try:
            return axes[key[5:]] if key.startswith("item.") else lookup(settings, key)
        except KeyError:
            raise UserError(f"{PARAMS_FILE}: missing key {key!r}, which {where} names") from None

    whole = _REFERENCE.fullmatch(text)
    return value(whole) if whole else _REFERENCE.sub(lambda match: str(value(match)), text)


def _maker(dep: str, maker: Mapping[str, str]) -> str | None:
    """The stage that makes `dep`, or what it lies in."""
    return next((maker[path] for path in (dep, *map(str, PurePosixPath(dep).parents)) if path in maker), None)


def _ordered(stages: Mapping[str, Stage], before: Mapping[str, tuple[str, ...]], path: Path) -> dict[str, Stage]:
    ordered: dict[str, Stage] = {}
    left = dict(stages)
    while left:
        ready = [name for name in left if all(other in ordered for other in before[name])]
        if not ready:
            raise UserError(f"{path}: these stages wait for each other: {', '.join(left)}")
        for name in ready:
            ordered[name] = left.pop(name)
    return ordered
