"""Stage `download`: the verified raw files of one task."""

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.grid.freshness import PROVENANCE, hash_file, named_files, raw_folder, read_provenance
from pipeline.grid.params import Params, section_of
from pipeline.host.files import write_json
from pipeline.host.progress import Meter
from schoenbat.errors import DataUnavailable, UserError
from schoenbat.lra.tasks import TASKS


def run(params: Params, task: str) -> None:
    """Put the raw files of `task` and provenance.json, which says where they came from, into data/raw/TASK.

    Files of this machine that the task's settings name are listed there with hashes, for `sources_have_changed`.
    DataUnavailable is raised if no source could be reached, or the only one is too large.
    """
    section = section_of(params.task, "task", task)
    mirror = params.data.mirror_folder
    if mirror is not None and not mirror.is_dir():
        raise UserError(f"the data mirror {mirror} is not a folder")
    folder = raw_folder(task)
    folder.mkdir(parents=True, exist_ok=True)
    with Meter(f"{task}: MB fetched", scale=10**6) as meter:
        try:
            provenance = TASKS.get(task)(section.data).download(folder, mirror, params.data.limit_bytes, meter.update)
        except DataUnavailable as error:
            raise DataUnavailable(f"{error}; {TASKS.get(task).how_to_get}") from error
    before = read_provenance(folder)
    sources = {path: hash_file(Path(path)) for path in named_files(dataclasses.asdict(section.data))}
    write_json(folder / PROVENANCE, _as_at_first(provenance, before) | ({"sources": sources} if sources else {}))
    print(f"{task}: {'generated, nothing to fetch' if provenance.get('generated') else f'raw files in {folder}'}")


def _as_at_first(provenance: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """With the word of the first time for files that were already there, so that nothing seems to have changed."""
    files = provenance.get("files", [])
    known = [file for file in before.get("files", []) if isinstance(file, dict)]
    for index, file in enumerate(files):
        if isinstance(file, dict) and file.get("from") == "already there":
            files[index] = next((old for old in known if old | {"from": file["from"]} == file), file)
    return provenance
