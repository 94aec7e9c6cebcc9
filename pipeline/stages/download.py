"""Stage `download`: the verified raw files of one task."""

from pipeline.files import write_json
from pipeline.grid.cells import raw_folder
from pipeline.grid.params import Params, task_section
from pipeline.monitor.progress import Meter
from schoenbat.errors import DataUnavailable, UserError
from schoenbat.tasks import TASKS


def run(params: Params, task: str) -> None:
    """Put the raw files of `task` and provenance.json, which says where they came from, into data/raw/TASK.

    Raises:
        DataUnavailable: no source could be reached, or the only one is too large; the message says what to do.
        UserError: an unknown task, or a mirror that is no folder.
    """
    section = task_section(params, task)
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
    write_json(folder / "provenance.json", provenance)
    print(f"{task}: {'generated, nothing to fetch' if provenance.get('generated') else f'raw files in {folder}'}")
