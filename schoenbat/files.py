"""Files that appear complete or not at all."""

import os
from pathlib import Path


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path` through a temporary file beside it, so that no reader ever sees a part of it.

    Raises:
        OSError: the disk is full or the folder cannot be written; the previous file, if any, is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
