"""dvc.lock as text: one block per stage, read and replaced without touching the others. Knows nothing of DVC's code.

DVC itself parses and writes the whole file for every stage it runs, which takes seconds with some tens of cells and
grows with their number, and it writes in place, so that a process killed at the wrong moment leaves half a file.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from schoenbat.errors import UserError
from schoenbat.files import write_bytes

LOCK_FILE = Path("dvc.lock")
HEAD = "schema: '2.0'\nstages:\n"
_NAME = re.compile(r"^  ([^\s'\"#?&*!|>%@`{\[][^\s:]*):\n", re.MULTILINE)
_FOREIGN = re.compile(r"^(?! {4}|  [^\s'\"#?&*!|>%@`{\[][^\s:]*:\n)[^\n]*\S", re.MULTILINE)
"""A line that is neither the name of a stage nor inside one."""


class Blocks(Mapping[str, str]):
    """The text of each stage in a lock file.

    Args:
        text: all of the file; "" for none.

    Raises:
        ValueError: the file is not laid out as DVC writes it.
    """

    def __init__(self, text: str) -> None:
        body = text.removeprefix(HEAD)
        if (text and body == text) or _FOREIGN.search(body):
            raise ValueError(f"{LOCK_FILE} is not laid out as DVC writes it")
        starts = [*_NAME.finditer(body)]
        ends = [*(match.start() for match in starts), len(body)][1:]
        self._blocks = {match[1]: body[match.end() : end] for match, end in zip(starts, ends, strict=True)}

    def __getitem__(self, stage: str) -> str:
        return self._blocks[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def replace(self, stage: str, block: str) -> None:
        self._blocks[stage] = block

    def write(self, path: Path) -> None:
        """The whole file, complete or not at all."""
        body = "".join(f"  {stage}:\n{block}" for stage, block in self._blocks.items())
        write_bytes(path, (HEAD + body).encode())


def read_blocks(path: Path = LOCK_FILE) -> Blocks:
    """The blocks of a lock file, none if it does not exist.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return Blocks(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Blocks("")
    except ValueError as error:
        raise UserError(f"{error}; restore it, for example with: git checkout {path}") from error


class Entries(Mapping[str, dict[str, Any]]):
    """The stages of a lock file as values, each parsed when it is asked for."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def __getitem__(self, stage: str) -> dict[str, Any]:
        return yaml.load(self._blocks[stage], Loader)

    def __contains__(self, stage: object) -> bool:
        return stage in self._blocks

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The scalars of YAML 1.2, which DVC writes, by the parser of libyaml where it is there."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
