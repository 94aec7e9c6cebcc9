"""The one writer of DVC's record: tells DVC what has been made, by DVC's public interface. The only importer of dvc."""

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from pipeline.record.freshness import read_receipt
from pipeline.record.lock_file import LOCK_FILE, Entry, read_blocks
from schoenbat.errors import UserError
from schoenbat.files import write_bytes

_BEFORE = Path(".dvc/tmp/dvc.lock.before")
_RUN_CACHE = Path(".dvc/cache/runs")
_RWLOCK = Path(".dvc/tmp/rwlock")
_PROGRAMS = ("dvc", "schoenbat-exp", "pipeline.cli", "pytest")
_PAUSE_FACTOR = 19.0
"""Between two batches passes so many times what the last one took: DVC reads and writes all of its lock file for each,
which takes seconds where that is long, and cells need the machine. What waits has its receipt."""
_LEAST_PAUSE_SECONDS = 2.0
_LOCKED_SECONDS = 60.0
"""So long another process of DVC is waited for at the end."""


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
        """Let stages be recorded whose receipts are written."""
        self._waiting += names

    def poll(self) -> list[str]:
        """Begin what is due, without waiting; the stages that have got on record since it was last asked."""
        done = self._take_back() if self._batch is not None and self._batch.done() else []
        if self._waiting and self._batch is None and time.monotonic() >= self._next:
            names, self._waiting = self._waiting, []
            self._batch = self._executor.submit(_timed, names)
        return done

    def is_idle(self) -> bool:
        """Whether nothing is left to record; if something is, it is begun at the next `poll`."""
        self._next = 0.0
        return self._batch is None and not self._waiting

    def finish(self, *, patient: bool) -> list[str]:
        """Record everything that is left; the stages that have got on record. `failed` has the others, with why.

        Args:
            patient: wait for another process of DVC.
        """
        end, done = time.monotonic() + _LOCKED_SECONDS * patient, []
        while self._batch is not None or self._waiting or (self.failed and time.monotonic() < end and self._retry()):
            self._next = 0.0
            done += self.poll()
            if self._batch is not None:
                done += self._take_back()
        return done

    def _retry(self) -> bool:
        """Take up again what only waits for another process of DVC."""
        self._waiting = [name for name, why in self.failed.items() if why == _LOCKED]
        for name in self._waiting:
            del self.failed[name]
        return bool(self._waiting)

    def _take_back(self) -> list[str]:
        assert self._batch is not None
        results = self._batch.result()
        self._batch = None
        took = float(results.pop("", "0"))
        self._next = time.monotonic() + max(_LEAST_PAUSE_SECONDS, _PAUSE_FACTOR * took)
        self.failed |= {name: why for name, why in results.items() if why}
        return [name for name, why in results.items() if not why]


_LOCKED = "another process of DVC has locked the project"


def _timed(names: Sequence[str]) -> dict[str, str]:
    began = time.monotonic()
    return {**record(names), "": str(time.monotonic() - began)}


def record(names: Sequence[str]) -> dict[str, str]:
    """Put stages on record as their receipts have them.

    Returns:
        For each stage "" if it is on record, else why it is not: something has changed since, or DVC cannot write.
    """
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    # What went wrong is in the results; nothing else is to be seen among the lines of the grid.
    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    results: dict[str, str] = {}
    drop_stale_rwlock()
    try:
        # What was unpacked and not cloned has no history that DVC could look at.
        versioned = any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents))
        with Repo(config={} if versioned else {"core": {"no_scm": True}}) as repo, repo.lock, _whole(LOCK_FILE):
            stages = {stage.name: stage for stage in repo.index.stages if isinstance(stage, PipelineStage)}
            ready: list[Any] = []
            for name in dict.fromkeys(names):
                try:
                    results[name] = _prepare(stages.get(name), read_receipt(name), ready)
                except Exception as error:  # noqa: BLE001 - what DVC trips over at one stage is no matter of the others
                    results[name] = _reason(error)
            if ready:
                ready[0].dvcfile.dump_stages(ready, update_pipeline=False)
    except LockError:
        return dict.fromkeys(names, _LOCKED)
    except Exception as error:  # noqa: BLE001 - DVC lets through what its databases raise
        return dict.fromkeys(names, _reason(error))
    return results


def _prepare(stage: Any, receipt: Entry | None, ready: list[Any]) -> str:
    if receipt is None or stage is None:
        return "dvc.yaml does not have it any more" if stage is None else "its receipt is gone"
    stage.save()
    changed = _changed(stage, receipt)
    if changed:
        return f"{changed} has changed since it ran"
    # Relinking would take a file away for a moment, and a process can be killed at any.
    stage.commit(relink=False)
    ready.append(stage)
    return ""


def _changed(stage: Any, receipt: Entry) -> str:
    """The first thing in which what DVC is about to record differs from what the stage was made from and made."""
    if " ".join(stage.cmd.split()) != receipt.command:
        return "its command"
    for found, known in ((stage.deps, receipt.deps), (stage.outs, receipt.outs)):
        hashed = {item.def_path: item.hash_info.value for item in found}
        params = hashed.pop("params.yaml", {})
        if found is stage.deps and params != receipt.params:
            return "params.yaml"
        if hashed != known:
            return next((path for path in hashed if hashed[path] != known.get(path)), "the list of what it reads")
    return ""


def _reason(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause) or type(cause).__name__
    return str(text).splitlines()[0]


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Let DVC change its lock file, which it writes in place, so that half a file never stays: see `mend_lock`."""
    _BEFORE.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    write_bytes(_BEFORE, before)
    try:
        yield
    except BaseException:
        if before:
            write_bytes(path, before)
        else:
            path.unlink(missing_ok=True)
        raise
    finally:
        _BEFORE.unlink(missing_ok=True)


def mend_lock() -> None:
    """Bring back the lock file of before, if a process was killed while DVC wrote it and something is missing.

    What DVC noted beside it in that moment goes, as it may be half a note; what was about to be
    recorded has its receipt, so nothing is lost.
    """
    if not _BEFORE.exists():
        return
    _drop_runs(_BEFORE.stat().st_mtime_ns)
    before = _BEFORE.read_bytes()
    now = LOCK_FILE.read_bytes() if LOCK_FILE.exists() else b""
    try:
        known, found = read_blocks(_BEFORE), read_blocks()
        torn = any(
            name not in found or (block != found[name] and block.startswith(found[name]))
            for name, block in known.items()
        )
    except UserError:
        torn = True
    if torn or not now.endswith(b"\n"):
        if before:
            write_bytes(LOCK_FILE, before)
        else:
            LOCK_FILE.unlink(missing_ok=True)
    _BEFORE.unlink()


def _drop_runs(since_ns: int) -> None:
    """Delete what DVC has noted since then in its run cache, where half a note of a stage keeps it off the record."""
    for note in _RUN_CACHE.glob("*/*/*"):
        if note.stat().st_mtime_ns >= since_ns:
            note.unlink()


def drop_stale_rwlock(path: Path = _RWLOCK) -> None:
    """Delete DVC's list of who reads and writes what if nobody in it is alive, or a kill has left half of it.

    DVC forgets dead processes by itself, but neither half a list nor processes whose parent has not asked for them yet.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        readers = [reader for each in listed.get("read", {}).values() for reader in each]
        holders = [*listed.get("write", {}).values(), *readers]
        if any(_runs(holder["pid"]) for holder in holders):
            return
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    path.unlink(missing_ok=True)


def _runs(number: int) -> bool:
    try:
        process = psutil.Process(number)
        command = " ".join(process.cmdline())
        return process.status() != psutil.STATUS_ZOMBIE and any(name in command for name in _PROGRAMS)
    except psutil.Error:
        return False
