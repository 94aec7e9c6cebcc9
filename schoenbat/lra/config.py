"""Build options strictly: frozen dataclasses from parsed YAML or JSON."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from schoenbat.errors import UserError, list_choices, shorten

T = TypeVar("T")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""A key that needs no quotes in the name of a place."""


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


def _describe(value: Any) -> str:
    return f"{shorten(value)} ({type(value).__name__})"


def _place(where: str, key: str) -> str:
    return f"{where}.{key}" if _PLAIN.fullmatch(key) else f"{where}[{shorten(key)}]"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
