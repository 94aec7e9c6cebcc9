"""The code that runs is the code of this checkout, or it is an error."""

import sys
from pathlib import Path

from schoenbat.errors import UserError

_PACKAGES = ("schoenbat", "pipeline")


def check_code() -> None:
    """Compare the modules that were imported with this checkout; to be called before anything is computed.

    Raises:
        UserError: a module that was imported has other contents than the file of this checkout.
    """
    if Path("schoenbat").is_dir():
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name.partition(".")[0] in _PACKAGES and file is not None:
                _compare(Path(file), name)


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
