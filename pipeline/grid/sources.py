"""Where the raw data of a task came from, and whether it would come out the same today."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.files import read_json
from pipeline.hashes import Hashes
from schoenbat.errors import UserError

PROVENANCE = "provenance.json"


def named_files(settings: Any) -> Iterator[str]:
    """The files of this machine that a task's settings name, such as a table of one's own."""
    if isinstance(settings, str):
        # What is too long for a path is none.
        if len(settings) < 1000 and "\0" not in settings and Path(settings).is_file():
            yield settings
    elif isinstance(settings, dict | list | tuple):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from named_files(value)


def read_record(raw: Path) -> dict[str, Any]:
    """What provenance.json says; nothing where it is not there or cut short, and then the download writes it anew."""
    with contextlib.suppress(FileNotFoundError, UserError):
        return dict(read_json(raw / PROVENANCE))
    return {}


def is_outdated(raw: Path, hashes: Hashes) -> bool:
    """Whether a file that the raw data in a folder was taken from has changed since; one that is gone has not."""
    sources: dict[str, str] = read_record(raw).get("sources", {})
    return any(hashes.of(path) not in ("", digest) for path, digest in sources.items())
