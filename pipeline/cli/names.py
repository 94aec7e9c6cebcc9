"""The names that can be used, what each stands for, and where it comes from if not from this project."""

import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from pipeline.grid.settings import read_yaml
from schoenbat.errors import UserError
from schoenbat.registry import Registry, describe_entry

KINDS = ("tasks", "attn", "dotf", "former", "profiles")
_FORMERS = {
    "maclauformer": "pre-SBN and post-SBN around the mechanism, as SchoenbAt has it.",
    "transformer": "The mechanism alone.",
}
PROMISES = {
    "weights_sum_to_one": "weights sum to one",
    "sees_every_key": "sees every key",
    "ignores_key_order": "order of keys irrelevant",
    "has_causal_form": "causal form",
    "has_cross_form": "cross-attention",
    "needs_kernel": "takes a kernel",
    "is_random": "random",
    "needs_max_length": "needs a maximal length",
}
"""What each class variable of `schoenbat.attention.Attention` that is true or false says, in words."""


@dataclass(frozen=True)
class Name:
    """One name; `origin` is empty for what is part of this project."""

    name: str
    about: str
    origin: str = ""

    def lines(self) -> list[str]:
        """Return the paragraphs about it."""
        return [f"{self.about}{f' ({self.origin})' if self.origin else ''}"]


@dataclass(frozen=True)
class Mechanism(Name):
    """A name of an attention mechanism, with what its class declares.

    Attributes:
        promises: by the keys of PROMISES.
        cost: how time and memory grow with the length.
        paper: what it implements.
    """

    promises: Mapping[str, bool] = field(default_factory=dict)
    cost: str = ""
    paper: str = ""

    def lines(self) -> list[str]:
        kept = ", ".join(words for promise, words in PROMISES.items() if self.promises[promise])
        return [*super().lines(), f"{self.cost} cost; {kept}", *([f"paper: {self.paper}"] if self.paper else [])]


def names(kind: str) -> list[Name]:
    """Return all names of a kind of KINDS, sorted; one that cannot be imported says so in its text."""
    if kind == "profiles":
        return [Name(path.stem, _note(path)) for path in sorted(Path("profiles").glob("*.yaml"))]
    if kind == "former":
        return [Name(former, about) for former, about in _FORMERS.items()]
    from schoenbat.attention import ATTENTIONS
    from schoenbat.kernels import KERNELS
    from schoenbat.lra.tasks import TASKS

    registries: dict[str, Registry[Any]] = {"tasks": TASKS, "attn": ATTENTIONS, "dotf": KERNELS}
    registry = registries[kind]
    return [_registered(registry, name, registry.external().get(name)) for name in registry.names()]


def described(listed: list[Name]) -> list[str]:
    """Return each name with its paragraphs beside it, in lines of at most 80 columns as far as words allow."""
    width = max((len(each.name) for each in listed), default=0) + 4
    wrapper = textwrap.TextWrapper(80, break_long_words=False, break_on_hyphens=False, subsequent_indent=" " * width)
    lines = []
    for each in listed:
        wrapper.initial_indent = f"  {each.name}".ljust(width)
        for paragraph in each.lines():
            lines += wrapper.wrap(paragraph) or [f"  {each.name}"]
            wrapper.initial_indent = wrapper.subsequent_indent
    return lines


def _registered(registry: Registry[Any], name: str, entry: EntryPoint | None) -> Name:
    origin = describe_entry(entry) if entry else ""
    try:
        found = registry.get(name)
    except (UserError, ImportError, SyntaxError) as error:
        return Name(name, f"cannot be loaded: {' '.join(str(error).split())}", origin)
    about = (sys.modules[found.__module__].__doc__ or "").strip().partition("\n")[0]
    if registry.package != "schoenbat.attention":
        return Name(name, about, origin)
    promises = {promise: bool(getattr(found, promise)) for promise in PROMISES}
    return Mechanism(name, about, origin, promises, found.cost, found.paper)


def _note(profile: Path) -> str:
    try:
        settings = read_yaml(profile)
    except UserError as error:
        return str(error)
    note = settings.get("note") if isinstance(settings, dict) else None
    return note if isinstance(note, str) else ""
