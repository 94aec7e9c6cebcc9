"""params.yaml as plain values, read as DVC reads it: YAML 1.2, by the same library."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from schoenbat.errors import UserError

PARAMS_FILE = Path("params.yaml")
PROJECT_FILE = Path("dvc.yaml")
"""The file that marks the root folder of a project."""
MIRROR_VARIABLE = "SCHOENBAT_DATA_MIRROR"
PARAMS_VARIABLE = "SCHOENBAT_PARAMS"
"""Names the copy of params.yaml that a grid has made when it started."""


def enter_project() -> None:
    """Make the root of the project around the current folder the current folder; where there is none, stay."""
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / PROJECT_FILE).is_file()), here)
    if root != here and not PARAMS_FILE.exists():
        # What was typed here is meant from here.
        if mirror := os.environ.get(MIRROR_VARIABLE):
            os.environ[MIRROR_VARIABLE] = str(here / mirror)
        os.chdir(root)


def params_file() -> Path:
    """Return params.yaml, or under a grid the copy of its start."""
    return Path(os.environ.get(PARAMS_VARIABLE, PARAMS_FILE))


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; raises UserError, in one line, for whatever is not one."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.absolute().parent
        raise UserError(f"no {path.name} in {folder}; run this in the root folder of the project") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    try:
        # In Python, whose messages tell more than those of the parser in C.
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except (YAMLError, ValueError, KeyError) as error:
        # The library lets those of int(), date() and the like through for a value that is not what its tag says.
        place, problem = "", str(error)
        if isinstance(error, MarkedYAMLError):
            mark = error.problem_mark or error.context_mark
            place = f" line {mark.line + 1}" if mark else ""
            problem = error.problem or error.context or problem
        raise UserError(f"{path}{place}: not valid YAML: {' '.join(problem.split())[:200]}") from None


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings, by dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves
