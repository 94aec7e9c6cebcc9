"""What has to run, told in a fraction of a second from files alone: code, settings, results, and what is on record.

A stage is on record when dvc.lock holds it as it is now. It is made when its receipt does: who runs a stage leaves one
beside the checkpoints, with the hashes of what it was made from and of what it made. What is made but not on record, as
after a grid that was killed, only has to be told to DVC. A stage is absent when it is on record but what it makes is
not here, nor kept by DVC, as downloads in a clone: it has to run only if something that needs it does.
"""

import configparser
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pipeline.files import write_json
from pipeline.grid.graph import Graph, Stage, lookup
from pipeline.grid.sources import is_outdated
from pipeline.hashes import Hashes
from pipeline.record.lock_file import Entry, parse_block, read_blocks

State = Literal["recorded", "absent", "made", "due"]
_RECEIPTS = Path("checkpoints/made")


def stage_states(
    graph: Graph, settings: Mapping[str, Any], hashes: Hashes, names: Iterable[str] | None = None
) -> dict[str, State]:
    """How each stage stands.

    Args:
        graph: all stages.
        settings: the content of params.yaml.
        hashes: of the files now.
        names: the stages in question; all by default. What one of them needs must be among them.

    Raises:
        UserError: dvc.lock is damaged.
    """
    blocks = read_blocks()
    cache = _cache_folder()
    wanted = None if names is None else set(names)
    chosen = [stage for name, stage in graph.stages.items() if wanted is None or name in wanted]
    states: dict[str, State] = {}
    on_record: dict[str, str] = {}
    for stage in chosen:
        name = stage.name
        outdated = any(is_outdated(Path(out), hashes) for out in stage.persistent)
        if outdated or any(states[need] == "due" for need in graph.needs[name]):
            states[name] = "due"
            continue
        entry = parse_block(blocks[name]) if name in blocks else None
        states[name] = "due" if entry is None else _state(stage, entry, settings, hashes, on_record, cache)
        if states[name] == "absent" and graph.gathers[name]:
            states[name] = "due"
        elif states[name] == "absent" and entry is not None:
            on_record |= entry.outs
        if states[name] == "due":
            receipt = read_receipt(name)
            if receipt is not None and _state(stage, receipt, settings, hashes, on_record, None) == "recorded":
                states[name] = "made"
    for stage in reversed(chosen):
        if states[stage.name] == "due":
            states |= {need: "due" for need in graph.needs[stage.name] if states[need] == "absent"}
    hashes.save()
    return states


def _state(
    stage: Stage,
    entry: Entry,
    settings: Mapping[str, Any],
    hashes: Hashes,
    on_record: Mapping[str, str],
    cache: Path | None,
) -> State:
    """How a stage stands by what `entry` says of it; `on_record` has the hashes of what is absent."""
    if (
        entry.command != " ".join(stage.command.split())
        or entry.deps.keys() != set(stage.deps)
        or entry.outs.keys() != set(stage.outs)
        or entry.params != {key: lookup(settings, key) for key in stage.params}
        or any(md5 != (hashes.of(path) or on_record.get(path)) for path, md5 in entry.deps.items())
    ):
        return "due"
    found = {out: hashes.of(out) for out in stage.outs}
    if any(found[out] != md5 and (found[out] or out not in stage.persistent) for out, md5 in entry.outs.items()):
        return "due"
    if not all(found.values()):
        return "absent"
    kept = cache is None or all((cache / entry.outs[out][:2] / entry.outs[out][2:]).exists() for out in stage.cached)
    return "recorded" if kept else "made"


def write_receipt(name: str, entry: Entry) -> None:
    write_json(receipt_file(name), asdict(entry))


def receipt_file(name: str) -> Path:
    return _RECEIPTS / f"{name}.json"


def read_receipt(name: str) -> Entry | None:
    """What the last run of a stage says that it made; None if there is none, or only a part of one."""
    try:
        return Entry(**json.loads(receipt_file(name).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _cache_folder() -> Path | None:
    """Where DVC keeps copies of outs; None where the project's configuration says another place."""
    config = configparser.ConfigParser()
    config.read([".dvc/config", ".dvc/config.local"], encoding="utf-8")
    return None if config.has_option("cache", "dir") else Path(".dvc/cache/files/md5")
