"""What the code behind a component computes, as digests that text does not change.

A cell is out of date when what its code computes has changed, not when its text has. The digest of a definition (a
function, a class, a constant of a module) is that of its syntax tree without docstrings, annotations of functions, what
is raised, and the names of local variables; a definition that names a C++ file beside its module has the content of
that file in its digest, but for comments and layout. Those that count for a component are found from its own file and
the entry points of its kind, by the names that each of them uses, within the modules that they import. So a comment, a
renamed local variable and a function that moves to another place or module change nothing, and a change inside one
mechanism concerns that mechanism alone.

The stage `numerics` writes them as numerics/KIND/NAME.json, on which the stages that run this code depend.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.host.files import write_json
from schoenbat.registry import VARIANT_MARK, Registry, base_name

FOLDER = Path("numerics")
PACKAGES = ("schoenbat", "pipeline")
REPLACING = ("linear", "mean", "nystromformer", "performer", "rfa", "window")
"""Mechanisms that can replace the attention of a trained model."""
_ENTRY_POINTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "attention": {
        "schoenbat.lra.training": ("fit", "predict", "save_model", "load_model"),
        "schoenbat.lra.encoder": ("build_model",),
        "schoenbat.lra.data.arrays": ("Dataset",),
    },
    "kernel": {},
    "task": {"schoenbat.lra.data.arrays": ("write_dataset",)},
}
"""What is called for a component of a kind, besides its own file."""
# The registries of the library import torch, which takes seconds; names do not need it.
_REGISTRIES: Mapping[str, Registry[Any]] = {
    "attention": Registry("attn", "schoenbat.attention", object),
    "kernel": Registry("dotf", "schoenbat.kernels", object),
    "task": Registry("task", "schoenbat.lra.tasks", object, group="schoenbat.tasks"),
}
_STAGES: Mapping[str, tuple[str, ...]] = {
    "bench": ("pipeline.stages.bench",),
    "errors": ("pipeline.stages.errors",),
    "replace": ("pipeline.stages.replace", *(f"schoenbat.attention.{name}" for name in REPLACING)),
    "report": ("pipeline.reporting",),
}
_NO_NUMERICS = (
    "schoenbat.errors",
    "schoenbat.files",
    "schoenbat.registry",
    "schoenbat.lra.config",
    "schoenbat.lra.data.fetch",
    "pipeline.host",
    "pipeline.grid",
)
"""Prefixes of modules: errors, files, the look-up of names, downloads, which are verified, and the grid compute nothing
that a result is made of."""


def component_digests(kind: str, name: str) -> dict[str, str]:
    """Return the digests of the definitions that decide what a component computes, by their names.

    Args:
        kind: "attention", "kernel", "task" or "stage".
        name: of the component, variants included, or of the stage.
    """
    if kind == "stage":
        return _reachable(dict.fromkeys(_STAGES[name]))
    registry = _REGISTRIES[kind]
    entry = registry.external().get(base_name(name))
    own = f"{registry.package}.{base_name(name)}" if entry is None else entry.module
    return _reachable({own: None, **_ENTRY_POINTS[kind]})


def write_numerics(named: Mapping[str, Iterable[str]]) -> None:
    """Write one file for each component of this project, each name given, and each file that is there already.

    Args:
        named: names by kind that are needed besides, such as variants and components of other distributions.
    """
    known = {kind: set(named.get(kind, ())) | set(registry.names()) for kind, registry in _REGISTRIES.items()}
    known["stage"] = set(_STAGES)
    for path in FOLDER.glob("*/*.json"):
        if path.parent.name not in known or base_name(path.stem) not in known[path.parent.name]:
            path.unlink()
        elif VARIANT_MARK in path.stem:
            known[path.parent.name].add(path.stem)
    for kind, names in known.items():
        for name in sorted(names):
            path, digests = numerics_file(kind, name), component_digests(kind, name)
            if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != digests:
                write_json(path, digests)


def numerics_file(kind: str, name: str) -> Path:
    """Return where the digests of a component are written."""
    return FOLDER / kind / f"{name}.json"


def digest(value: Any) -> str:
    """Return a short digest of plain values, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class _Definition(NamedTuple):
    """A statement of a module: its digest, and the names that it uses as the modules that define them know them."""

    name: str
    digest: str
    uses: frozenset[str]


class _Module(NamedTuple):
    """A module of this project: its definitions by name, "" for what only runs on import, and what it imports."""

    definitions: Mapping[str, Sequence[_Definition]]
    imports: Sequence[str]


def _reachable(roots: Mapping[str, Iterable[str] | None]) -> dict[str, str]:
    """Return the digests of `roots`, modules with the names that count (None for all), and of whatever they use."""
    modules: dict[str, _Module] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in modules and not name.startswith(_NO_NUMERICS):
            modules[name] = _read(_source(name), name)
            waiting += modules[name].imports
    by_name: dict[str, list[_Definition]] = {}
    for module in modules.values():
        for name, definitions in module.definitions.items():
            by_name.setdefault(name, []).extend(definitions)
    found: set[_Definition] = set()
    new = set(by_name.get("", ()))
    for name, chosen in roots.items():
        known = modules[name].definitions
        new.update(*(known[each] for each in (known if chosen is None else chosen)))
    while new:
        found |= new
        uses = {name for definition in new for name in definition.uses}
        new = {definition for name in uses for definition in by_name.get(name, ())} - found
    grouped: dict[str, list[str]] = {}
    for definition in found:
        grouped.setdefault(definition.name or "on import", []).append(definition.digest)
    return {name: "+".join(sorted(digests)) for name, digests in grouped.items()}


def _source(module: str) -> Path:
    """Return the file of a module, without importing it."""
    package, *below = module.split(".")
    if package in PACKAGES:
        # Modules such as `rmfa-sketch` are files of this project whose names are no identifiers.
        path = Path(package_folder(package), *below)
        file = path.with_name(f"{path.name}.py")
        return file if file.is_file() else path / "__init__.py"
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


@functools.cache
def package_folder(package: str) -> str:
    """Return where the import system finds a package of this project."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return spec.submodule_search_locations[0]


def _read(path: Path, module: str) -> _Module:
    compiled = sorted([*path.parent.glob("*.cpp"), *path.parent.glob("*.h")])
    stats = [(each, each.stat()) for each in (path, *compiled)]
    return _parse(path, module, tuple((each.name, found.st_mtime_ns, found.st_size) for each, found in stats))


@functools.cache
def _parse(path: Path, module: str, _state: tuple[tuple[str, int, int], ...]) -> _Module:
    """Read a module; again only when its file has changed, or one in C++ beside it."""
    tree = ast.parse(path.read_bytes(), str(path))
    aliases: dict[str, str] = {}
    imports: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
            imports += [node.module, *_submodules(node)]
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names if alias.name.partition(".")[0] in PACKAGES]
    definitions: dict[str, list[_Definition]] = {}
    for statement in tree.body:
        names = _defined(statement)
        only_runs = not names and isinstance(statement, ast.Import | ast.ImportFrom | ast.Assert | ast.If)
        if only_runs or _is_text(statement):
            continue
        uses = frozenset(aliases.get(used, used) for used in _used(statement))
        text = _canonical(statement) + "".join(_compiled(statement, path))
        hashed = hashlib.sha256(text.encode()).hexdigest()[:12]
        for name in names or [""]:
            definitions.setdefault(name, []).append(_Definition(name, hashed, uses))
    return _Module(definitions, tuple(dict.fromkeys(imports)))


def _submodules(node: ast.ImportFrom) -> list[str]:
    """Return what `from package import name` imports that is a module itself."""
    assert node.module is not None
    if _source(node.module).name != "__init__.py":
        return []
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if _source(name).is_file()]


def _defined(statement: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines."""
    named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    if isinstance(statement, named):
        return [statement.name]
    nodes = list(ast.walk(statement))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return sorted(stored | {node.name for node in nodes if isinstance(node, named)})


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _used(tree: ast.AST) -> Iterator[str]:
    """Yield each name and attribute that occurs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def _compiled(statement: ast.stmt, path: Path) -> Iterator[str]:
    """Yield the C++ that a statement names, without comments and layout."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith((".cpp", ".h")):
            source = path.with_name(node.value).read_text(encoding="utf-8")
            yield " ".join(re.sub(r"//.*", "", source).split())


def _canonical(node: Any, local: Mapping[str, str] | None = None) -> str:
    """Return a text of a syntax tree that is the same for all ways to write it that compute the same by its form alone.

    Left out are docstrings, annotations of functions and of their variables, and what is raised; local variables are
    numbered. Empty fields are left out, as they differ between versions of Python.
    """
    if isinstance(node, list):
        items = (item for item in node if not (isinstance(item, ast.stmt) and _is_text(item)))
        return f"[{','.join(_canonical(item, local) for item in items)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise):
        return "Raise()"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and local is None:
        local = _local_names(node)
    if isinstance(node, ast.ClassDef):
        local = None
    if isinstance(node, ast.Name) and local and node.id in local:
        return local[node.id]
    skipped = {"type_comment", "type_params", "kind", "ctx", "returns"}
    if isinstance(node, ast.arg) or (isinstance(node, ast.AnnAssign) and local is not None):
        skipped.add("annotation")
    fields = (
        f"{name}={_canonical(value, local)}"
        for name, value in ast.iter_fields(node)
        if name not in skipped and value is not None and value != []
    )
    return f"{type(node).__name__}({','.join(fields)})"


def _local_names(function: ast.AST) -> dict[str, str]:
    """Return numbers for the variables of a function and those inside it, in the order in which they occur.

    A name that also stands somewhere as a string, such as that of an argument or of `except ... as`, keeps its text.
    """
    stored: dict[str, str] = {}
    kept: set[str | None] = set()
    for node in ast.walk(function):
        match node:
            case ast.ClassDef():
                return {}
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                kept.add(name)
            case ast.ExceptHandler(name=name) | ast.MatchAs(name=name) | ast.MatchStar(name=name):
                kept.add(name)
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                kept.update(names)
            case ast.alias(name=name, asname=alias):
                kept.add(alias or name.partition(".")[0])
            case ast.Name(id=name, ctx=ast.Store()):
                stored.setdefault(name, f"v{len(stored)}")
    return {name: number for name, number in stored.items() if name not in kept}
