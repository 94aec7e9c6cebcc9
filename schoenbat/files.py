"""Files that appear complete or not at all."""

import os
from pathlib import Path


def write_bytes(path: Path, content: bytes | memoryview, *, durable: bool = True) -> None:
    """Write `content` to `path` through a temporary file beside it, so that no reader ever sees a part of it.

    Args:
        durable: survive the end of the machine, which takes time.

    Raises:
        OSError: the disk is full or the folder cannot be written; the previous file, if any, is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
