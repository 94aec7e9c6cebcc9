"""dvc.lock, read stage by stage without DVC, which parses all of it for seconds. Only DVC writes it."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from schoenbat.errors import UserError

LOCK_FILE = Path("dvc.lock")
_HEAD = "schema: '2.0'\nstages:\n"
_NAME = re.compile(r"^  ([^\s'\"#?&*!|>%@`{\[][^\s:]*):\n", re.MULTILINE)
_FOREIGN = re.compile(r"^(?! {4}|  [^\s'\"#?&*!|>%@`{\[][^\s:]*:\n)[^\n]*\S", re.MULTILINE)
"""A line that is neither the name of a stage nor inside one."""
_COMMAND = re.compile(r"    cmd: (.+(?:\n {6}.+)*)\n")
_HASHED = re.compile(r"^    - path: (.*(?:\n {8}.+)*)\n      hash: md5\n      md5: (\S+)$", re.MULTILINE)
_PARAMS = re.compile(r"^    params:\n      params\.yaml:\n((?: {8}.*\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """What a stage was made from and what it made: hashes by path, and values by key of params.yaml."""

    command: str
    deps: Mapping[str, str]
    params: Mapping[str, Any]
    outs: Mapping[str, str]


def read_blocks(path: Path = LOCK_FILE) -> dict[str, str]:
    """The text of each stage in the lock file, none if there is no file.

    Raises:
        UserError: the file is not laid out as DVC writes it.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    body = text.removeprefix(_HEAD)
    if (text and body == text) or _FOREIGN.search(body):
        raise UserError(
            f"{path} is not as DVC writes it (a merge conflict, or cut short); settle it, or move it away: what was "
            "computed in this checkout is put on record again by the next run, without computing it"
        )
    starts = [*_NAME.finditer(body)]
    ends = [*(match.start() for match in starts), len(body)][1:]
    return {match[1]: body[match.end() : end] for match, end in zip(starts, ends, strict=True)}


def parse_block(block: str) -> Entry:
    """The values of one stage's text."""
    needs, _, makes = block.partition("    outs:\n")
    command, params = _COMMAND.match(needs), _PARAMS.search(needs)
    return Entry(
        command=" ".join(command[1].split()) if command else "",
        deps=_hashes(needs),
        params=_parsed(params[1]) if params else {},
        outs=_hashes(makes),
    )


def _hashes(block: str) -> dict[str, str]:
    # DVC folds what is too long for a line.
    return {" ".join(path.split()): md5 for path, md5 in _HASHED.findall(block)}


@functools.cache
def _parsed(block: str) -> dict[str, Any]:
    try:
        found = yaml.load(block, _Loader)
    except yaml.YAMLError:
        # The end of a file that was cut short.
        return {}
    return found if isinstance(found, dict) else {}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The scalars of YAML 1.2, which DVC writes, by the parser of libyaml where it is there."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
