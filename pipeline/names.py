"""The names that can be used, what each stands for, and where it comes from if not from this project."""

import ast
import enum
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.grid.settings import read_yaml
from schoenbat.errors import UserError

_FORMERS = {
    "maclauformer": "pre-SBN and post-SBN around the mechanism, as SchoenbAt has it.",
    "transformer": "The mechanism alone.",
}


class Kind(enum.StrEnum):
    """What has names."""

    TASKS = "tasks"
    ATTN = "attn"
    DOTF = "dotf"
    FORMER = "former"
    PROFILES = "profiles"


@dataclass(frozen=True)
class Name:
    """One name; `origin` is empty for what is part of this project."""

    name: str
    about: str
    origin: str = ""


def names(kind: Kind) -> list[Name]:
    """All names of a kind, sorted, without importing what they stand for."""
    if kind is Kind.PROFILES:
        return [Name(path.stem, _note(path)) for path in sorted(Path("profiles").glob("*.yaml"))]
    if kind is Kind.FORMER:
        from schoenbat.nn.multihead import FORMERS

        return [Name(former, _FORMERS[former]) for former in FORMERS]
    from schoenbat.attention import ATTENTIONS
    from schoenbat.kernels import KERNELS
    from schoenbat.registry import Registry, describe_entry
    from schoenbat.tasks import TASKS

    registries: dict[Kind, Registry[Any]] = {Kind.TASKS: TASKS, Kind.ATTN: ATTENTIONS, Kind.DOTF: KERNELS}
    registry = registries[kind]
    external = registry.external()
    return [
        Name(name, _first_line(external[name].module), describe_entry(external[name]))
        if name in external
        else Name(name, _first_line(f"{registry.package}.{name}"))
        for name in registry.names()
    ]


def described(listed: list[Name]) -> list[str]:
    """A line for each."""
    width = max((len(each.name) for each in listed), default=0)
    return [
        f"  {each.name:{width}}  {each.about}{f' ({each.origin})' if each.origin else ''}".rstrip() for each in listed
    ]


def _note(profile: Path) -> str:
    try:
        settings = read_yaml(profile)
    except UserError as error:
        return str(error)
    note = settings.get("note") if isinstance(settings, dict) else None
    return note if isinstance(note, str) else ""


def _first_line(module: str) -> str:
    """Of a module's docstring; empty where there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return ""
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    try:
        documented = ast.get_docstring(ast.parse(Path(spec.origin).read_bytes()))
    except SyntaxError:
        return ""
    return (documented or "").partition("\n")[0]
