"""What has to run, told in a fraction of a second from files alone: code, settings, results, and what is on record.

A stage is on record when dvc.lock holds it as it is now. It is made when its receipt does: who runs a stage leaves one
beside the checkpoints, with the hashes of what it was made from and of what it made. What is made but not on record, as
after a grid that was killed, only has to be told to DVC.
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

State = Literal["recorded", "made", "due"]
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
    states: dict[str, State] = {}
    for name, stage in graph.stages.items():
        if wanted is not None and name not in wanted:
            continue
        if any(states[need] == "due" for need in graph.needs[name]) or any(
            is_outdated(Path(out), hashes) for out in stage.persistent
        ):
            states[name] = "due"
        elif name in blocks and is_current(stage, found := parse_block(blocks[name]), settings, hashes):
            lost = any(not _is_cached(cache, found.outs[out]) for out in stage.cached)
            states[name] = "made" if lost else "recorded"
        else:
            receipt = read_receipt(name)
            made = receipt is not None and is_current(stage, receipt, settings, hashes)
            states[name] = "made" if made else "due"
    hashes.save()
    return states


def is_current(stage: Stage, entry: Entry, settings: Mapping[str, Any], hashes: Hashes) -> bool:
    """Whether `entry` says of the stage what is there now."""
    return (
        entry.command == " ".join(stage.command.split())
        and entry.deps.keys() == set(stage.deps)
        and entry.outs.keys() == set(stage.outs)
        and entry.params == {key: lookup(settings, key) for key in stage.params}
        and all(md5 != "" and md5 == hashes.of(path) for path, md5 in {**entry.deps, **entry.outs}.items())
    )


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


def _is_cached(cache: Path | None, md5: str) -> bool:
    return cache is None or (cache / md5[:2] / md5[2:]).exists()
