"""Find components by exact name.

A component of this project is one file: the file's stem is its name, and the file defines exactly one class derived
from the registry's base. A component of another distribution is an entry point, NAME = "module:Class", in the group
of the registry, such as "schoenbat.kernels". Names are listed without importing any
component, so a broken one breaks only itself.

A variant, NAME+VARIANT, is the component NAME under settings of its own.
"""

import importlib
import importlib.util
import inspect
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from schoenbat.errors import UserError, shorten, unknown_name

T = TypeVar("T")


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
VARIANT_MARK = "+"


def base_name(name: str) -> str:
    """Return what NAME+VARIANT is a variant of; any other name as it is.

    Raises:
        UserError: what follows the + is not made of letters, digits, - and _.
    """
    base, mark, variant = name.partition(VARIANT_MARK)
    if mark and not _NAME.fullmatch(variant):
        raise UserError(f"{shorten(name)}: a variant is NAME+VARIANT, VARIANT of letters, digits, - and _")
    return base


class Registry(Generic[T]):
    """The components of one folder and of one group of entry points.

    Args:
        kind: what an unknown name is called in an error, such as "task".
        package: the package whose files are the components; files that begin with an underscore are not.
        base: the class that each component derives from.
        has_variants: `get` takes names of variants, too, as the components have settings.
        group: of the entry points; called like the package where it is None.
    """

    def __init__(
        self, kind: str, package: str, base: type[T], *, has_variants: bool = False, group: str | None = None
    ) -> None:
        self.kind = kind
        self.package = package
        self.base = base
        self.has_variants = has_variants
        self.group = package if group is None else group

    def names(self) -> list[str]:
        """Return all names, sorted; raises UserError as `external` does."""
        return sorted([*self._files(), *self.external()])

    def external(self) -> dict[str, EntryPoint]:
        """Return the components of other distributions by name, sorted.

        Raises:
            UserError: an entry point whose name is taken, or is not made of letters, digits, - and _.
        """
        found: dict[str, EntryPoint] = {}
        files = self._files() if _entry_points(self.group) else {}
        for entry in sorted(_entry_points(self.group), key=lambda entry: (entry.name, entry.value)):
            if not _NAME.fullmatch(entry.name):
                raise UserError(
                    f"{describe_entry(entry)}: a {self.kind} is named by letters, digits, - and _, not {entry.name!r}"
                )
            taken = files.get(entry.name) or (entry.name in found and describe_entry(found[entry.name]))
            if taken:
                raise UserError(f"{self.kind} {entry.name!r} exists twice: {taken} and {describe_entry(entry)}")
            found[entry.name] = entry
        return found

    def get(self, name: str) -> type[T]:
        """Return the class called `name`, or that `name` is a variant of.

        Raises:
            UserError: there is none (the choices are listed), or the entry point of this name does not lead to one.
        """
        if self.has_variants:
            name = base_name(name)
        external = self.external()
        if name in external:
            return self._load(external[name])
        if name not in self._files():
            raise unknown_name(self.kind, name, self.names())
        module = importlib.import_module(f"{self.package}.{name}")
        found = [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, self.base) and value.__module__ == module.__name__
        ]
        assert len(found) == 1, f"{module.__file__} must define exactly one {self.base.__name__}, found {found}"
        return found[0]

    def _files(self) -> dict[str, Path]:
        # Looked up and not imported: the package may import torch, which takes seconds, and names do not need it.
        spec = importlib.util.find_spec(self.package)
        assert spec is not None
        assert spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0])
        return {path.stem: path for path in folder.glob("*.py") if _NAME.fullmatch(path.stem)}

    def _load(self, entry: EntryPoint) -> type[T]:
        where = f"{self.kind} {entry.name!r} ({describe_entry(entry)})"
        try:
            module = importlib.import_module(entry.module)
        except ModuleNotFoundError as error:
            raise UserError(f"{where} cannot be loaded: {error}") from error
        value = getattr(module, entry.attr or "", None)
        if not (inspect.isclass(value) and issubclass(value, self.base)):
            raise UserError(f"{where} must lead to a class derived from {self.base.__name__}")
        return value


@cache
def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Look up what the installed distributions offer, once, as it reads the metadata of each of them."""
    return tuple(entry_points(group=group))


def describe_entry(entry: EntryPoint) -> str:
    """Return where a component comes from, such as "my_kernels:Cosh of my-kernels 0.1"."""
    return f"{entry.value} of {entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def check_bounds(config: Any, **bounds: tuple[int, int]) -> None:
    """Raise ValueError unless each named attribute of `config`, or each item of it, lies within its two bounds.

    They are far beyond what is of use: a number that was meant otherwise is named before it hangs or crashes a run.
    """
    for name, (lowest, highest) in bounds.items():
        values = getattr(config, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, not {value}")
            if value is not None and value > highest:
                raise ValueError(f"{name} must be at most {highest}, not {value}")
