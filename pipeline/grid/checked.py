"""Check params.yaml, without importing torch as long as nothing has changed; and that the code is this checkout's.

The whole check builds every model of the grid, so it needs torch, whose import takes longer than all that `status`
does. What was found right is therefore remembered as a digest in logs/params-checked: of the file, and of what decides
the check, which is the code of this project and what is installed. A checkout that may only be read is checked anew.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.grid.numerics import PACKAGES, package_folder
from pipeline.grid.settings import PARAMS_FILE, read_yaml
from schoenbat.errors import UserError, list_choices
from schoenbat.files import write_bytes

if TYPE_CHECKING:
    from pipeline.grid.params import Params

_RECORD = Path("logs", "params-checked")
_METADATA = ("*.dist-info", "*.egg-info")
"""The folders that say which distributions are installed."""


def load_checked(path: Path = PARAMS_FILE) -> "Params":
    """Return all of a params file; raises UserError in one line that names the key."""
    from pipeline.grid.cells import check_models, expand
    from pipeline.grid.freshness import PAPERS, REVIEWS
    from pipeline.grid.params import load_params

    digest = _digest(path)
    params = load_params(path)
    if not _is_recorded(digest):
        cells = expand(params)
        groups = list(dict.fromkeys(cell.group for cell in cells))
        for name in params.errors.trained:
            if name not in groups:
                choices = list_choices(name, groups)
                raise UserError(f"{path}: errors.trained: the grid has no {name!r}; choose from: {choices}")
        if params.trained.cells and not {REVIEWS, PAPERS} <= {*params.grid.tasks}:
            raise UserError(f"{path}: trained.cells read the texts of {REVIEWS} and {PAPERS}; list them in grid.tasks")
        check_models(params, cells)
        # Where the checkout may only be read, the next command checks it anew.
        if path == PARAMS_FILE and os.access(_RECORD.parent if _RECORD.parent.exists() else ".", os.W_OK):
            write_bytes(_RECORD, digest.encode())
    return params


def ensure_checked() -> None:
    """Raise UserError as `load_checked` does for params.yaml."""
    # For the line that it raises where there is no such file, or no YAML in it.
    read_yaml(PARAMS_FILE)
    if not _is_recorded(_digest(PARAMS_FILE)):
        load_checked()


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


def _is_recorded(digest: str) -> bool:
    return _RECORD.is_file() and _RECORD.read_text(encoding="utf-8", errors="replace") == digest


def _digest(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes() if path.is_file() else b"")
    code = [file for name in PACKAGES for file in Path(package_folder(name)).rglob("*.py")]
    installed = [file for folder in map(Path, sys.path) for kind in _METADATA for file in folder.glob(kind)]
    for file in sorted({*code, *installed}):
        if file.exists():
            known = file.stat()
            digest.update(f"{file} {known.st_mtime_ns} {known.st_size}\n".encode())
    return digest.hexdigest()
