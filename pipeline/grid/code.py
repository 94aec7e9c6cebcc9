"""The code that runs is the code of this checkout, or it is an error."""

import sys
from pathlib import Path

from pipeline.grid.numerics import PACKAGES, package_folder
from schoenbat.errors import UserError


def check_code() -> None:
    """Raise UserError if an imported module is not that of this checkout; called before anything is computed."""
    packages = PACKAGES if Path("schoenbat").is_dir() else ()
    for name, module in list(sys.modules.items()):
        package, file = name.partition(".")[0], Path(getattr(module, "__file__", None) or "")
        if package not in packages or not file.is_file():
            continue
        root = Path(package_folder(package)).parent
        ours = file.relative_to(root)
        if ours.absolute() != file and (not ours.is_file() or ours.read_bytes() != file.read_bytes()):
            raise UserError(
                f"the code that runs is that of {root}, and its {ours} is not the one of this checkout; use the "
                f"environment of this checkout (make setup), or set PYTHONPATH={Path.cwd()}"
            )
