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
from pathlib import Path
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


def check_folders(graph: Graph) -> None:
    """Raise UserError if a stage writes through a link that leads out of the checkout: DVC records nothing there."""
    here = Path.cwd().resolve()
    folders = dict.fromkeys(parent for stage in graph.stages.values() for out in stage.outs for parent in _parents(out))
    for folder in map(Path, folders):
        if folder.is_symlink() and not folder.resolve().is_relative_to(here):
            raise UserError(
                f"{folder} is a link to {folder.resolve()}, out of the checkout, where DVC records nothing; "
                "make it a folder, or put the whole checkout there"
            )


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
        for parent in _parents(out):
            if parent in folders:
                inside.setdefault(parent, []).append(name)
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
            filling = _filling(axes)
            return [_form(dep, {}, axes, f"{path}: stage {name}") % filling for dep in body.get("deps") or ()]
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
    where = f"{path}: stage {name}"
    axes = {}
    for axis, written in (body.get("matrix") or {}).items():
        choices = _value(written, settings, where)
        if not isinstance(choices, list):
            raise UserError(f"{where}: axis {axis} is no list")
        axes[axis] = [_value(choice, settings, where) for choice in choices]

    def form(text: str) -> str:
        return _form(text, settings, axes, where)

    command = form(body["cmd"])
    deps = [form(dep) for dep in body.get("deps") or ()]
    outs: dict[str, Mapping[str, Any]] = {}
    for kind in ("outs", "metrics", "plots"):
        for entry in body.get(kind) or ():
            for written, options in entry.items() if isinstance(entry, dict) else ((entry, {}),):
                outs[form(written)] = options or {}
    keys = []
    for entry in body.get("params") or ():
        if not isinstance(entry, str):
            raise UserError(f"{where}: params of a file other than {PARAMS_FILE} are not read by this program")
        keys.append(form(entry))
    found: set[str] = set()
    for chosen in itertools.product(*axes.values()):
        values = dict(zip(axes, chosen, strict=True))
        filling = _filling(values)
        full = f"{name}@{'-'.join(str(value) for value in chosen)}" if axes else name
        params = tuple(key % filling for key in keys)
        for key in params:
            if key not in found:
                _setting(key, settings, f"stage {full} of {path} needs")
                found.add(key)
        yield Stage(
            name=full,
            command=command % filling,
            axes=values,
            deps=tuple(dep % filling for dep in deps),
            params=params,
            outs=tuple(out % filling for out in outs),
            cached=frozenset(out % filling for out, options in outs.items() if options.get("cache", True)),
            persistent=frozenset(out % filling for out, options in outs.items() if options.get("persist", False)),
        )


def _form(text: str, settings: Mapping[str, Any], axes: Iterable[str], where: str) -> str:
    """A text with the settings that it names filled in, and its axes as the operator % wants them.

    There are thousands of stages of one form.
    """
    of_axes = {f"item.{axis}": f"%({axis})s" for axis in axes} | {"item": "%(item)s"}
    pieces = _REFERENCE.split(text)
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            pieces[number] = piece.replace("%", "%%")
        elif piece in of_axes:
            pieces[number] = of_axes[piece]
        else:
            pieces[number] = str(_setting(piece, settings, f"{where} names")).replace("%", "%%")
    return "".join(pieces)


def _filling(axes: Mapping[str, Any]) -> dict[str, Any]:
    """What `_form` leaves open: each axis, and all of them as options, as DVC writes a mapping into a command."""
    return {**axes, "item": " ".join(f"--{axis} {shlex.quote(str(value))}" for axis, value in axes.items())}


def _value(written: Any, settings: Mapping[str, Any], where: str) -> Any:
    """What is written for an axis; the setting itself where it names one."""
    if not isinstance(written, str):
        return written
    whole = _REFERENCE.fullmatch(written)
    return _setting(whole[1], settings, f"{where} names") if whole else _form(written, settings, (), where) % {}


def _setting(key: str, settings: Mapping[str, Any], asked_by: str) -> Any:
    try:
        return lookup(settings, key)
    except KeyError:
        raise UserError(f"{PARAMS_FILE}: missing key {key!r}, which {asked_by}") from None


def _maker(dep: str, maker: Mapping[str, str]) -> str | None:
    """The stage that makes `dep`, or what it lies in."""
    return next((maker[path] for path in (dep, *_parents(dep)) if path in maker), None)


def _parents(path: str) -> Iterator[str]:
    """The folders that a path of dvc.yaml lies in."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


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
