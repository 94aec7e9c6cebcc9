"""The code that runs is the code of this checkout, and in a grid the code of its start; or it is an error."""

import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.hashes import hash_of
from schoenbat.errors import UserError

_PACKAGES = ("schoenbat", "pipeline")
_fixed: dict[str, str] = {}


def fix(hashes: Mapping[str, str]) -> None:
    """Demand from now on that these files and folders have these hashes; the start of a grid has fixed them."""
    _fixed.clear()
    _fixed.update(hashes)


def check_code() -> None:
    """To be called when everything that computes has been imported, before it computes.

    Raises:
        UserError: a module that was imported has other contents than the file of this checkout, or a file is not as
            the start of the grid has fixed it.
    """
    if Path("schoenbat").is_dir():
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name.partition(".")[0] in _PACKAGES and file is not None:
                _compare(Path(file), name)
    for path, digest in _fixed.items():
        if hash_of(path) != digest:
            raise UserError(f"{path} has changed since the grid started; run again to use it as it is")


def _compare(file: Path, name: str) -> None:
    parts = name.split(".")
    # The folder above the package: a module of depth n lies n folders below, and a package's file one deeper.
    root = file.parents[len(parts) - (file.name != "__init__.py")]
    ours = file.relative_to(root)
    if ours.absolute() == file or not file.is_file():
        return
    if not ours.is_file() or ours.read_bytes() != file.read_bytes():
        raise UserError(
            f"the code that runs is that of {root}, and its {ours} is not the one of this checkout; use the "
            f"environment of this checkout (make setup), or set PYTHONPATH={Path.cwd()}"
        )
