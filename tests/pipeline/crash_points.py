"""Every point at which a cell, the record or the report touches the disk, and what is left when it fails there.

    python tests/pipeline/crash_points.py [--every N] [--first N] [--kinds kill,ENOSPC,EIO,torn] [--jobs N]

A small project is made, and each unit of work is done in a process forked from one that has imported everything. Each
rename, fsync, unlink and database commit of a unit is a point. At each the process is killed, or gets an error, or
leaves half of the file that it renames, as a machine does that goes down. Then the unit is done again, and must end
with the bytes that it has without a fault, and with one MLflow run per cell that holds each evaluation once.
"""

import argparse
import contextlib
import errno
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_grid import MEAN, make_small, tracked_runs

KINDS = ("kill", "ENOSPC", "EIO", "torn")
GROUP = MEAN.removesuffix("-0")
STAGES = (
    *("numerics", "download@tiny-lra-listops", "preprocess@tiny-lra-listops"),
    *(f"train@tiny-{GROUP}", f"evaluate@tiny-{GROUP}"),
)


class Points:
    """Counts the points of this process, and strikes at one of them.

    Args:
        at: the number of the point; -1 for none.
    """

    def __init__(self, at: int, kind: str) -> None:
        self.seen: list[str] = []
        self._at, self._kind, self._owner = at, kind, os.getpid()

    def __call__(self, what: str, path: object) -> None:
        # Not what is this tool's own, and not what a child of the process does.
        if os.getpid() != self._owner:
            return
        self.seen.append(f"{what} {self.target if what in _RENAMES else path}")
        if len(self.seen) - 1 != self._at:
            return
        if self._kind in ("ENOSPC", "EIO"):
            number = getattr(errno, self._kind)
            raise OSError(number, os.strerror(number), str(path))
        if self._kind == "torn" and what in _RENAMES:
            content = Path(str(path)).read_bytes()
            Path(str(path)).write_bytes(content[: len(content) // 2])
            _os["replace"](path, self.target)
        os.kill(os.getpid(), signal.SIGKILL)

    target: object = None


_RENAMES = ("replace", "rename")
_os: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "fsync")}


def watch(points: Points) -> None:
    """Let the calls of this process be points; it is a fork, so nobody has to put them back."""

    def rename(what: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **options: Any) -> None:
            points.target = target
            points(what, source)
            _os[what](source, target, **options)

        return call

    def unlink(path: Any, **options: Any) -> None:
        points("unlink", path)
        _os["unlink"](path, **options)

    def fsync(descriptor: int) -> None:
        points("fsync", descriptor)
        _os["fsync"](descriptor)

    class Connection(sqlite3.Connection):
        def commit(self) -> None:
            points("commit", "a database")
            super().commit()

    connect = sqlite3.connect

    def counted(*arguments: Any, **options: Any) -> sqlite3.Connection:
        return connect(*arguments, **{"factory": Connection, **options})

    os.replace, os.rename, os.unlink, os.remove, os.fsync = rename("replace"), rename("rename"), unlink, unlink, fsync
    sqlite3.connect = sqlite3.dbapi2.connect = counted  # type: ignore[assignment]


@dataclass(frozen=True)
class Unit:
    """A piece of work.

    Attributes:
        work: does it in the current folder; True if it succeeds.
        result: what is to be the same afterwards.
    """

    name: str
    work: Callable[[], bool]
    result: Callable[[], object]


def content(*folders: str) -> dict[str, bytes]:
    files = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file())
    return {path.as_posix(): path.read_bytes() for path in files}


def numbers_and_runs() -> object:
    from pipeline.grid.results import CellResults

    return [path.read_bytes() for path in CellResults("tiny", MEAN).files()], tracked_runs(Path())[MEAN]


def put_on_record() -> bool:
    """What a grid does when it starts, and then what its recorder does."""
    from pipeline.record.writer import mend_lock, record

    mend_lock()
    return set(record(STAGES).values()) == {""}


def lock_and_states() -> object:
    import yaml

    from pipeline.grid.freshness import hash_file
    from pipeline.record.writer import changed_stages

    objects = [path for path in Path(".dvc/cache/files/md5").rglob("*") if path.is_file() and path.suffix != ".tmp"]
    # That of a folder is called so after its hash.
    wrong = [path for path in objects if path.parent.name + path.name.removesuffix(".dir") != hash_file(path)]
    # In which order stages stand in the lock file follows from the order in which they got there.
    return yaml.safe_load(Path("dvc.lock").read_text()), set(STAGES) & changed_stages().keys(), wrong


def do(job: str) -> Callable[[], bool]:
    """A job of a grid: its commands."""

    def work() -> bool:
        from pipeline.launch.worker import do_job

        os.environ["SCHOENBAT_OUTCOME_FILE"] = os.path.abspath("outcome.json")
        return do_job(Path(job)) == 0

    return work


def build_report() -> bool:
    from pipeline.stages.commands import run_command

    return run_command(["report"]) == 0


UNITS = (
    Unit("data", do("data.json"), lambda: content("data", "runs/tiny/data")),
    Unit("cell", do("cell.json"), numbers_and_runs),
    Unit("record", put_on_record, lock_and_states),
    Unit("report", build_report, lambda: content("reports")),
)


def forked(action: Callable[[], bool], folder: Path, log: Path, points: Points | None = None) -> int:
    """Do something in a process of its own, in a folder; its status, 0 where it says True."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 2
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
        if points is not None:
            points._owner = os.getpid()
            watch(points)
        status = 0 if action() else 1
        if points is not None:
            (folder / "points").write_text("\n".join(points.seen))
    except BaseException:  # noqa: BLE001 - shown as at the end of any process
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Walk:
    """Units of work at one project, each of which begins where the one before has ended.

    Args:
        folder: an empty one.
        points: those that are walked of each unit.
        kinds: of faults.
        units: those that are walked; the others are only done.
    """

    def __init__(self, folder: Path, points: range, kinds: list[str], units: list[str]) -> None:
        self._folder, self._points, self._kinds, self._units = folder, points, kinds, units
        self.log = folder / "log.txt"
        self.walked: Counter[str] = Counter()
        self.failures: list[str] = []
        self._base, self._work = folder / "base", folder / "work"

    def prepare(self) -> None:
        # MLflow keeps in its database where it puts files, so all is done in one place: what a copy logged elsewhere
        # would be there for the next.
        self._work.mkdir()
        os.chdir(self._work)
        make_small(self._work)
        import json
        from dataclasses import asdict

        from pipeline.grid.cells import expand
        from pipeline.grid.freshness import Freshness
        from pipeline.grid.numerics import write_numerics
        from pipeline.grid.params import load_params
        from pipeline.grid.settings import PARAMS_FILE, read_yaml
        from pipeline.launch.plan import plan_jobs

        params, freshness = load_params(), Freshness(read_yaml(PARAMS_FILE))
        write_numerics(params.grid.components())
        jobs = plan_jobs(params, expand(params), freshness, [], force=False, device="cpu")
        (data,) = [job for job in jobs if job.name.startswith("data")]
        Path("data.json").write_text(json.dumps([asdict(stage) for stage in data.stages]))
        (cell,) = [job for job in jobs if job.name == MEAN]
        Path("cell.json").write_text(json.dumps([asdict(stage) for stage in cell.stages]))
        # MLflow needs seconds to make its database, so it is there.
        from pipeline.mlflow import tracking

        assert forked(lambda: not tracking.Tracker("tiny").finish(), self._work, self.log) == 0
        os.chdir(self._folder)
        self._work.rename(self._base)

    def unit(self, unit: Unit) -> None:
        self._copy()
        points = Points(-1, "")
        assert forked(unit.work, self._work, self.log, points) == 0, self.log.read_text()
        names = (self._work / "points").read_text().splitlines()
        expected = self._result(unit)
        whole = self._work.rename(self._folder / "whole")
        print(f"{unit.name}: {len(names)} points", flush=True)
        walked = self._points if unit.name in self._units else ()
        for number in itertools.takewhile(lambda number: number < len(names), walked):
            for kind in self._kinds:
                if kind == "torn" and not names[number].startswith(_RENAMES):
                    continue
                self.walked[f"{unit.name}: {kind}"] += 1
                self._strike(unit, number, kind, names[number], expected)
        shutil.rmtree(self._base)
        whole.rename(self._base)

    def _strike(self, unit: Unit, number: int, kind: str, name: str, expected: object) -> None:
        self._copy()
        folder = self._work
        where = f"{unit.name}, point {number} ({name}), {kind}"
        status = forked(unit.work, folder, self.log, Points(number, kind))
        if kind in ("kill", "torn") and status == 0:
            # The order of points can differ by a few from run to run, at the very end.
            return
        told = self.log.stat().st_size
        again = forked(unit.work, folder, self.log)
        if again != 0 and kind == "torn":
            # Half a file may be refused in one line that says what to do; then all is well.
            half = name.partition(" ")[2]
            *_, last = self.log.read_text()[told:].splitlines()
            if half in last and "delete it" in last:
                (folder / half).unlink()
                again = forked(unit.work, folder, self.log)
        if again != 0:
            self._fail(f"{where}: done again, it ends with {again}")
            return
        try:
            found = self._result(unit)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with what is left is a failure
            self._fail(f"{where}: {type(error).__name__}: {error}")
            return
        if found != expected:
            self._fail(f"{where}: other bytes")

    def _fail(self, what: str) -> None:
        self.failures.append(what)
        print(what, flush=True)

    def _copy(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._base, self._work, symlinks=True)

    def _result(self, unit: Unit) -> object:
        with contextlib.chdir(self._work):
            return unit.result()


@contextlib.contextmanager
def quiet_folder() -> Iterator[Path]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        os.chdir(before)


def preload() -> None:
    """Import what the units need, so that forks begin with it."""
    import dvc.repo  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch

    import pipeline.launch.preload  # noqa: F401
    from pipeline.stages import evaluate, report, train  # noqa: F401

    torch.set_num_threads(1)


def share_out(options: argparse.Namespace) -> list[int]:
    """Walk every n-th point in each of n processes; their exit codes."""
    kept = ["--kinds", options.kinds, "--units", options.units, "--every", str(options.every * options.jobs)]
    firsts = [options.first + number * options.every for number in range(options.jobs)]
    walks = [subprocess.Popen([sys.executable, __file__, *kept, "--first", str(first)]) for first in firsts]
    return [walk.wait() for walk in walks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--units", default=",".join(unit.name for unit in UNITS))
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if options.jobs > 1:
        sys.exit(max(share_out(options)))
    began = time.monotonic()
    preload()
    with quiet_folder() as folder:
        points = range(options.first, 10**6, options.every)
        walk = Walk(folder, points, options.kinds.split(","), options.units.split(","))
        walk.prepare()
        for unit in UNITS:
            walk.unit(unit)
        print("\n".join(f"{count:5} {what}" for what, count in walk.walked.items()))
        print(f"{walk.walked.total()} points in {time.monotonic() - began:.0f} s; {len(walk.failures)} failures")
    sys.exit(bool(walk.failures))


if __name__ == "__main__":
    main()
