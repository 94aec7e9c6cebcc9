"""The one writer of DVC's record: tells DVC what has been made, by DVC's public interface. The only importer of dvc.

A grid computes without DVC and then records: each stage is put on record as the files are, after a check that these
files are what today's code, settings and data make. DVC itself is asked what it thinks of what is not a cell.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipeline.grid.axes import data_stage_names, read_cells
from pipeline.grid.freshness import Freshness, raw_folder, sources_have_changed
from pipeline.grid.numerics import numerics_file
from pipeline.grid.settings import PARAMS_FILE, read_yaml
from pipeline.host.files import read_json
from schoenbat.errors import UserError
from schoenbat.files import write_bytes

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

LOCK_FILE = Path("dvc.lock")
_BEFORE = Path(".dvc/tmp/dvc.lock.before")
_RWLOCK = Path(".dvc/tmp/rwlock")
_PROGRAMS = ("dvc", "schoenbat-exp", "pipeline.cli", "pytest")
_PAUSE_SECONDS = 60.0
"""From one batch to the next: DVC reads and writes all of its lock file for each, and cells need the machine."""
_LOCKED_SECONDS = 60.0
"""So long another process of DVC is waited for at the end."""


def changed_stages() -> dict[str, bool]:
    """Return the stages that DVC finds changed, and of each whether more than the absence of files is why.

    Raises:
        UserError: DVC cannot read the project, such as for a conflict of a merge in its lock file, or works in it.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    drop_stale_rwlock()
    try:
        with _repo() as repo:
            changes = repo.status()
    except LockError as error:
        raise UserError(_LOCKED) from error
    except DvcException as error:
        raise UserError(
            f"DVC cannot read dvc.yaml and {LOCK_FILE} ({_reason(error)}); where a merge has left {LOCK_FILE} in two, "
            "settle it, or move it away: what is finished is put on record again by the next run, without computing it"
        ) from error
    return {name: not all(map(_is_absence, found)) for name, found in changes.items()}


def _is_absence(change: Any) -> bool:
    """Return whether one entry of DVC's status says only that files are not here, as weights in a clone."""
    return isinstance(change, dict) and all(
        how == "deleted" or (how == "not in cache" and not Path(path).exists())
        for files in change.values()
        for path, how in files.items()
    )


@contextlib.contextmanager
def _repo() -> "Iterator[Repo]":
    from dvc.config import Config
    from dvc.repo import Repo

    # What goes wrong is told by who asks; nothing else is to be seen among the lines of a grid.
    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    # What was unpacked and not cloned has no history that DVC could look at; its own commands are to know that, too.
    versioned = any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents))
    config = Config(".dvc")
    if not versioned and not config["core"].get("no_scm"):
        with config.edit("local") as local:
            local["core"] = {**local.get("core", {}), "no_scm": True}
    with Repo() as repo:
        yield repo


class Recorder:
    """Puts finished stages on record beside whatever else this process does, some at a time.

    Only the grid that owns this checkout may have one.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="record")
        self._waiting: list[str] = []
        self._batch: Future[dict[str, str]] | None = None
        self._next = 0.0
        self.failed: dict[str, str] = {}

    def add(self, names: Iterable[str]) -> None:
        """Let stages be recorded whose outputs are complete."""
        self._waiting += names

    def poll(self) -> None:
        """Begin what is due, without waiting for it."""
        if self._batch is not None and self._batch.done():
            self._take_back(self._batch.result())
        if self._waiting and self._batch is None and time.monotonic() >= self._next:
            names, self._waiting = self._waiting, []
            self._next, self._batch = time.monotonic() + _PAUSE_SECONDS, self._executor.submit(record, names)

    def is_idle(self) -> bool:
        """Return whether nothing is left to record; if something is, it is begun at the next `poll`."""
        self._next = 0.0
        return self._batch is None and not self._waiting

    def finish(self, *, patient: bool) -> list[str]:
        """Record everything that is left; return the stages that get on record. `failed` has the others, with why.

        Args:
            patient: wait for another process of DVC.
        """
        end = time.monotonic() + _LOCKED_SECONDS * patient
        done = [] if self._batch is None else self._take_back(self._batch.result())
        while self._waiting or (time.monotonic() < end and self._retry()):
            names, self._waiting = self._waiting, []
            done += self._take_back(record(names))
        return done

    def _retry(self) -> bool:
        """Take up again what only waits for another process of DVC."""
        self._waiting = [name for name, why in self.failed.items() if why == _LOCKED]
        for name in self._waiting:
            del self.failed[name]
        return bool(self._waiting)

    def _take_back(self, results: dict[str, str]) -> list[str]:
        self._batch = None
        self.failed |= {name: why for name, why in results.items() if why}
        return [name for name, why in results.items() if not why]


_LOCKED = "another process of DVC has locked the project; run again when it has ended"


def record(names: Sequence[str]) -> dict[str, str]:
    """Put stages on record as their files are, if these are what today's numerics, settings and data make.

    Returns:
        For each stage "" if it is on record, else why it is not.
    """
    from dvc.lock import LockError
    from dvc.stage import PipelineStage

    results: dict[str, str] = {}
    drop_stale_rwlock()
    try:
        with _repo() as repo, repo.lock, _whole():
            stages = {stage.name: stage for stage in repo.index.stages if isinstance(stage, PipelineStage)}
            for name in dict.fromkeys(names):
                results[name] = _told(_save, stages[name]) if name in stages else "dvc.yaml does not have it"
            # After DVC has looked at the files, so that what has changed meanwhile is noticed.
            current = _current_stages()
            for name in [name for name, why in results.items() if not why]:
                changed = "" if name in current else "code, settings or data have changed since it ran; run again"
                results[name] = changed or _told(_commit, stages[name])
            ready = [stages[name] for name, why in results.items() if not why]
            if ready:
                ready[0].dvcfile.dump_stages(ready, update_pipeline=False)
                kept = _kept_record(read_yaml(PARAMS_FILE)["profile"])
                if kept.is_file():
                    write_bytes(kept, LOCK_FILE.read_bytes())
    except LockError:
        return dict.fromkeys(names, _LOCKED)
    except Exception as error:  # noqa: BLE001 - DVC lets through what its databases raise
        return dict.fromkeys(names, _reason(error))
    return results


def _told(do: "Callable[[PipelineStage], None]", stage: "PipelineStage") -> str:
    """Let DVC do something with one stage; why it does not, or ""."""
    try:
        do(stage)
    except Exception as error:  # noqa: BLE001 - what DVC trips over at one stage is no matter of the others
        return _reason(error)
    return ""


def _save(stage: "PipelineStage") -> None:
    # Weights may be missing, as in a clone: then those on record stay there. DVC's cache of runs would hold all again.
    stage.save(allow_missing=True, run_cache=False)


def _commit(stage: "PipelineStage") -> None:
    # Relinking would take a file away for a moment, and a process can be killed at any.
    stage.commit(allow_missing=True, relink=False)


def _current_stages() -> set[str]:
    """Return the stages whose outputs are what params.yaml, the numerics and the data make as they are now."""
    settings = read_yaml(PARAMS_FILE)
    recorded = Freshness(settings, lambda kind, name: read_json(numerics_file(kind, name)))
    here = Freshness(settings)
    cells = read_cells(settings)
    stages = recorded.cell_stages(cells)
    for task in settings["grid"]["tasks"]:
        downloaded, prepared = data_stage_names(here.profile, task)
        stages[downloaded] = not sources_have_changed(raw_folder(task))
        stages[prepared] = recorded.data(task) is not None
    stages["numerics"] = all(recorded.code(cell.attn, cell.dotf) == here.code(cell.attn, cell.dotf) for cell in cells)
    stages["numerics"] &= all(recorded.replaced(name) == here.replaced(name) for name in here.replacing)
    return {name for name, current in stages.items() if current}


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return str(text).splitlines()[0]


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Let DVC change its lock file, which it writes in place, so that half a file never stays: see `mend_lock`."""
    write_bytes(_BEFORE, LOCK_FILE.read_bytes() if LOCK_FILE.exists() else b"")
    try:
        yield
    except BaseException:
        mend_lock()
        raise
    _BEFORE.unlink(missing_ok=True)


def mend_lock() -> None:
    """Bring back the former lock file if a process was killed while DVC wrote it; what is finished is recorded anew."""
    if _BEFORE.exists():
        if before := _BEFORE.read_bytes():
            write_bytes(LOCK_FILE, before)
        else:
            LOCK_FILE.unlink(missing_ok=True)
        _BEFORE.unlink()


def exchange_record(former: str, profile: str) -> None:
    """Put the record of a profile in place, and keep that of the former one, if it is another, beside its settings.

    So a profile on record costs the others nothing: DVC reads and writes all of dvc.lock for each stage. Nothing is
    computed again where a record is lost; the next grid puts it on record anew.
    """
    if LOCK_FILE.is_file() and former != profile:
        LOCK_FILE.replace(_kept_record(former))
    if _kept_record(profile).is_file() and not LOCK_FILE.is_file():
        write_bytes(LOCK_FILE, _kept_record(profile).read_bytes())


def _kept_record(profile: str) -> Path:
    return Path("profiles", f"{profile}.lock")


def users_of_dvc(path: Path = _RWLOCK) -> list[str]:
    """Return the commands of living processes in DVC's list of who reads and writes what; raises FileNotFoundError."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        readers = [reader for each in listed.get("read", {}).values() for reader in each]
        holders = {holder["pid"]: holder["cmd"] for holder in (*listed.get("write", {}).values(), *readers)}
    except (ValueError, TypeError, KeyError, AttributeError):
        # A kill has left half a list.
        return []
    return [f"{command} (process {number})" for number, command in holders.items() if _runs(number)]


def drop_stale_rwlock(path: Path = _RWLOCK) -> None:
    """Delete DVC's list of who reads and writes what if nobody in it is alive, or a kill has left half of it.

    DVC forgets dead processes by itself, but neither half a list nor processes whose parent has not asked for them yet.
    """
    with contextlib.suppress(FileNotFoundError):
        if not users_of_dvc(path):
            path.unlink()


def _runs(number: int) -> bool:
    try:
        process = psutil.Process(number)
        command = " ".join(process.cmdline())
        return process.status() != psutil.STATUS_ZOMBIE and any(name in command for name in _PROGRAMS)
    except psutil.Error:
        return False
