"""Components of other distributions, made visible to DVC.

dvc.yaml names the file of a component as `schoenbat/kernels/NAME.py`, and likewise for attention and tasks. A component
from an entry point has its file elsewhere, so a link of that name leads to it: DVC then sees each change of the file,
while the name on record is the same on every machine. The links list themselves in a .gitignore beside them, which is
also the record of which links were made here.
"""

import importlib.util
import os
from importlib.metadata import EntryPoint
from pathlib import Path

from schoenbat.attention import ATTENTIONS
from schoenbat.errors import UserError
from schoenbat.files import write_bytes
from schoenbat.kernels import KERNELS
from schoenbat.registry import Registry
from schoenbat.tasks import TASKS

_HEADER = "# Links to components of other distributions, made by schoenbat-exp.\n/.gitignore\n"


def link_components() -> None:
    """Make the links of all installed components in this checkout, and remove those of components that are gone.

    A component whose module cannot be found gets none: it is reported where it is used.

    Raises:
        UserError: a file that is no link is in the way.
    """
    for registry in (ATTENTIONS, KERNELS, TASKS):
        _link(registry)


def _link(registry: Registry) -> None:
    folder = Path(*registry.package.split("."))
    if not folder.is_dir():
        return
    record = folder / ".gitignore"
    listed = record.read_text(encoding="utf-8") if record.is_file() else ""
    found = {f"{name}.py": _file_of(entry) for name, entry in registry.external().items()}
    targets = {name: file for name, file in found.items() if file is not None}
    for line in listed.removeprefix(_HEADER).splitlines():
        link = folder / line.removeprefix("/")
        if link.name not in targets and link.is_symlink():
            link.unlink()
    content = "".join([_HEADER, *(f"/{name}\n" for name in targets)])
    if targets and listed != content:
        write_bytes(record, content.encode())
    elif not targets and listed:
        record.unlink()
    for name, target in targets.items():
        link = folder / name
        if link.is_symlink() and link.readlink() == target:
            continue
        if link.exists() and not link.is_symlink():
            raise UserError(f"{link} is in the way of a link to {target}")
        # Several cells may start at once: the link is complete or is not there.
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.symlink_to(target)
        temporary.replace(link)


def _file_of(entry: EntryPoint) -> Path | None:
    try:
        spec = importlib.util.find_spec(entry.module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
