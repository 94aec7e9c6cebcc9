"""Components of other distributions, and variants, made visible to DVC.

dvc.yaml names the file of a component as `schoenbat/kernels/NAME.py`, and likewise for attention and tasks. A component
from an entry point has its file elsewhere, and a variant that of the component it is one of, so a link of that name
leads to it: DVC then sees each change of the file, while the name on record is the same on every machine. The links
list themselves in a .gitignore beside them, which is also the record of which links were made here.
"""

import importlib.util
import os
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from pathlib import Path

from schoenbat.attention import ATTENTIONS
from schoenbat.errors import UserError
from schoenbat.files import write_bytes
from schoenbat.kernels import KERNELS
from schoenbat.lra.tasks import TASKS
from schoenbat.registry import VARIANT_MARK, Registry, base_name

_HEADER = "# Links made by schoenbat-exp.\n/.gitignore\n"


def link_components(attns: Iterable[str] = (), tasks: Iterable[str] = (), *, keep_others: bool = False) -> None:
    """Make the links of all installed components, and of variants, in this checkout, and remove those of others.

    A component whose module cannot be found gets none: it is reported where it is used.

    Args:
        attns, tasks: names of mechanisms and tasks, variants among them.
        keep_others: leave links of other variants where they are.

    Raises:
        UserError: a file that is no link is in the way.
    """
    registries: list[tuple[Registry, Iterable[str]]] = [(ATTENTIONS, attns), (KERNELS, ()), (TASKS, tasks)]
    for registry, named in registries:
        _link(registry, [name for name in named if VARIANT_MARK in name], keep_others)


def _link(registry: Registry, variants: Iterable[str], keep_others: bool) -> None:
    folder = Path(*registry.package.split("."))
    if not folder.is_dir():
        return
    record = folder / ".gitignore"
    listed = record.read_text(encoding="utf-8") if record.is_file() else ""
    found = {f"{name}.py": _file_of(entry) for name, entry in registry.external().items()}
    targets = {name: file for name, file in found.items() if file is not None}
    targets |= {f"{name}.py": Path(f"{base_name(name)}.py") for name in variants}
    if keep_others:
        others = (folder / line.removeprefix("/") for line in listed.splitlines() if VARIANT_MARK in line)
        targets |= {link.name: link.readlink() for link in others if link.is_symlink()}
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
