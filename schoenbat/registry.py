"""Find components by exact name, and build their options strictly.

A component of this project is one file: the file's stem is its name, and the file defines exactly one class derived
from the registry's base. A component of another distribution is an entry point, NAME = "module:Class", in the group
of the registry, such as "schoenbat.kernels". Names are listed without importing any
component, so a broken one breaks only itself.

A variant, NAME+VARIANT, is the component NAME under settings of its own.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from schoenbat.errors import UserError, list_choices, shorten, unknown_name

T = TypeVar("T")


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
VARIANT_MARK = "+"


def base_name(name: str) -> str:
    """What NAME+VARIANT is a variant of; any other name as it is.

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
        """All names, sorted; raises UserError as `external` does."""
        return sorted([*self._files(), *self.external()])

    def external(self) -> dict[str, EntryPoint]:
        """The components of other distributions by name, sorted.

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
        """The class called `name`, or that `name` is a variant of.

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
    """What the installed distributions offer; looked up once, as it reads the metadata of each of them."""
    return tuple(entry_points(group=group))


def describe_entry(entry: EntryPoint) -> str:
    """Where a component comes from, such as "my_kernels:Cosh of my-kernels 0.1"."""
    return f"{entry.value} of {entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def build_config(config_class: type[T], values: Mapping[str, Any] | None, where: str) -> T:
    """Build a frozen dataclass from parsed YAML, refusing what does not fit.

    Nested dataclasses, `X | None`, `list[X]` and `dict[str, X]` are followed. An int is taken for a float; nothing else
    is converted. Numbers are finite, integers fit into 64 bits, and text can be written as UTF-8. A ValueError raised
    by the dataclass itself (`__post_init__`) is reported with its place.

    Args:
        config_class: a dataclass type.
        values: a mapping, or None for an empty one.
        where: the place of `values` for error messages, such as "params.yaml: attention.rmfa".

    Raises:
        UserError: a key that is unknown or missing, or a value of the wrong type.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a mapping, not {_describe(values)}")
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {shorten(key)}; known keys: {list_choices(key, fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _checked(values[name], hints[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: missing key {name!r}")
    try:
        return config_class(**arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parameters:
            return None
        (inner,) = [parameter for parameter in parameters if parameter is not type(None)]
        return _checked(value, inner, where)
    if origin is typing.Literal:
        if value not in parameters:
            raise UserError(f"{where} must be one of: {', '.join(map(str, parameters))}; not {_describe(value)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, not {_describe(value)}")
        return [_checked(item, parameters[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping, not {_describe(value)}")
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{where}: a key must be a str, not {_describe(key)}")
        return {key: _checked(item, parameters[1], _place(where, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build_config(hint, value, where)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where} must fit into 64 bits, which {shorten(value)} does not")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} must be {_article(hint.__name__)}, not {_describe(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, not {value}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{where} has half a character in it, which cannot be written: {shorten(value)}")
    return value


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


def _describe(value: Any) -> str:
    return f"{shorten(value)} ({type(value).__name__})"


def _place(where: str, key: str) -> str:
    return f"{where}.{key}" if _NAME.fullmatch(key) else f"{where}[{shorten(key)}]"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
