"""The hashes that DVC gives to files and folders, remembered for files that have not changed since."""

import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path

from schoenbat.files import write_bytes

_MEMORY = Path("logs/hashes.json")
_IGNORED = re.compile(r"__pycache__|\.pyc$|\.tmp$")
"""As .dvcignore says."""
_RACY_SECONDS = 2.0
"""A file can change again without a change of its time while that is so young."""


class Hashes:
    """The files as they are now: each is looked at once.

    Args:
        memory: where the hashes of files are kept from one process to the next; None for nowhere.
    """

    def __init__(self, memory: Path | None = _MEMORY) -> None:
        self._memory = memory
        self._known: dict[str, list[int | str]] = {}
        if memory is not None:
            with contextlib.suppress(OSError, ValueError):
                self._known = json.loads(memory.read_text(encoding="utf-8"))
        self._seen: dict[str, str] = {}
        self._changed = False

    def of(self, path: str) -> str:
        """The hash of a file or a folder; "" if there is none."""
        if path not in self._seen:
            self._seen[path] = self._folder(path) if os.path.isdir(path) else self._file(path)
        return self._seen[path]

    def save(self) -> None:
        """Remember; where that cannot be done, hashes are computed again."""
        if not self._changed or self._memory is None:
            return
        with contextlib.suppress(OSError):
            write_bytes(self._memory, json.dumps(self._known).encode(), durable=False)
        self._changed = False

    def _file(self, path: str) -> str:
        try:
            found = os.stat(path)
            state: list[int | str] = [found.st_mtime_ns, found.st_size, found.st_ino]
            known = self._known.get(path)
            if isinstance(known, list) and known[:-1] == state:
                return str(known[-1])
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "md5").hexdigest()
        except FileNotFoundError:
            return ""
        if time.time() - found.st_mtime > _RACY_SECONDS:
            self._known[path] = [*state, digest]
            self._changed = True
        return digest

    def _folder(self, path: str) -> str:
        # The names of links to components of other distributions are no code, nor is what DVC writes beside the results
        # that it keeps: .dvcignore.
        links = ".gitignore" if path.startswith(("schoenbat", "runs")) else ""
        entries = []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not _IGNORED.search(name)]
            for name in names:
                if name != links and not _IGNORED.search(name) and (digest := self._file(os.path.join(folder, name))):
                    relative = Path(folder, name).relative_to(path)
                    entries.append({"md5": digest, "relpath": relative.as_posix()})
        # By the whole path, in which errors.csv comes before errors/, as it does not folder by folder.
        listing = sorted(entries, key=lambda entry: entry["relpath"])
        return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def hash_of(path: str) -> str:
    """The hash of a file or a folder as it is now; "" if there is none."""
    return Hashes(memory=None).of(path)
