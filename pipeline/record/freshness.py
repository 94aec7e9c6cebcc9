"""Which cells are finished and up to date, told in milliseconds from dvc.lock, params.yaml and the code.

`dvc status` is the exact answer, but it takes seconds and waits for stages that run. Here prepared data and results
count as what dvc.lock says of them as long as they are there: only who edits those by hand sees a difference.
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.grid.axes import Cell, preprocess_stage, sources
from pipeline.record.dvc_lock import Loader, read_blocks

_HASHED = re.compile(r"^    - path: (.+)\n      hash: md5\n      md5: (\S+)$", re.MULTILINE)
_PARAMS = re.compile(r"^    params:\n      params\.yaml:\n((?: {8}.*\n)+)", re.MULTILINE)
_IGNORED = re.compile(r"__pycache__|\.pyc$|\.tmp$")


def finished_cells(cells: Sequence[Cell], profile: str, settings: dict[str, Any]) -> set[Cell]:
    """Those of `cells` that need not be run.

    Args:
        settings: the content of params.yaml.
    """
    blocks = read_blocks()
    md5_of = functools.cache(_md5)

    def is_fresh(stage: str, inputs: dict[str, str]) -> bool:
        block = blocks.get(stage)
        if block is None:
            return False
        needs, _, makes = block.partition("    outs:\n")
        known = dict(_HASHED.findall(needs))
        found = _PARAMS.search(needs)
        params = {} if found is None else _parsed(found[1])
        return (
            all(known.get(path) == md5 for path, md5 in inputs.items())
            and all(md5 == md5_of(Path(path)) for path, md5 in known.items() if path.startswith("schoenbat/"))
            and all(_value(settings, key) == value for key, value in params.items())
            and all(Path(path).exists() for path, _ in _HASHED.findall(makes))
        )

    def made(stage: str) -> dict[str, str]:
        return dict(_HASHED.findall(blocks.get(stage, "").partition("    outs:\n")[2]))

    data: dict[str, dict[str, str] | None] = {}
    for task in {cell.task for cell in cells}:
        stage = preprocess_stage(profile, task)
        outs = {path: md5 for path, md5 in made(stage).items() if path.startswith("data/")}
        data[task] = outs if is_fresh(stage, {}) else None
    finished = set()
    for cell in cells:
        arrays, train = data[cell.task], cell.stage("train", profile)
        if arrays is None or not is_fresh(train, arrays | {path.as_posix(): md5_of(path) for path in sources(cell)}):
            continue
        best = (cell.run_folder(profile) / "best.pt").as_posix()
        if is_fresh(cell.stage("evaluate", profile), arrays | {best: made(train).get(best, "")}):
            finished.add(cell)
    return finished


@functools.cache
def _parsed(block: str) -> dict[str, Any]:
    return yaml.load(block, Loader)


def _value(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _md5(path: Path) -> str:
    """The hash that DVC gives a file or a folder; "" if there is none."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _IGNORED.search(str(file)))
        entries = [{"md5": _md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
        entries.sort(key=lambda entry: tuple(entry["relpath"].split("/")))
        return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"
    try:
        return hashlib.md5(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
