"""DVC inside this process; the only importer of dvc.

Everything is DVC's own but for its lock file, which is read and written stage by stage (see `dvc_lock`), and the
project's own commands, which a worker runs without starting Python anew.
"""

import json
import logging
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import dvc.dvcfile
import dvc.stage.run
import psutil
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.lock import LockError, make_lock
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_LOCK
from dvc.stage import serialize
from dvc.stage.exceptions import StageCmdFailedError
from dvc.utils.serialize import dumps_yaml

from pipeline.record.dvc_lock import HEAD, Blocks, Entries
from schoenbat.errors import UserError

RWLOCK_FILE = Path(".dvc/tmp/rwlock")


class _Lockfile(dvc.dvcfile.Lockfile):
    """DVC's lock file, of which only the stages in question are parsed and written."""

    def _load(self, **kwargs: Any) -> tuple[Any, str]:
        blocks = self._blocks()
        if not blocks:
            return super()._load(**kwargs)
        return {"schema": "2.0", "stages": Entries(blocks)}, ""

    def dump_stages(self, stages: list[Any], **kwargs: Any) -> None:
        blocks = self._blocks()
        if blocks is None:
            super().dump_stages(stages, **kwargs)
            return
        changed = False
        for stage in stages:
            text = dumps_yaml({"schema": "2.0", "stages": serialize.to_lockfile(stage, **kwargs)})
            ((name, block),) = Blocks(text).items()
            if blocks.get(name) != block:
                blocks.replace(name, block)
                changed = True
        if changed:
            blocks.write(Path(self.path))
            self.repo.scm_context.track_file(self.relpath)

    def _blocks(self) -> Blocks | None:
        """None for a file with other things in it than stages, which DVC has to deal with itself."""
        path = Path(self.path)
        try:
            return Blocks(path.read_text(encoding="utf-8") if path.exists() else "")
        except ValueError:
            return None


dvc.dvcfile.Lockfile = _Lockfile
# It prints by itself; what MLflow's imports have made of the root logger would print it again.
logging.getLogger("dvc").propagate = False
assert dumps_yaml({"schema": "2.0", "stages": {"a": {"cmd": "b"}}}) == f"{HEAD}  a:\n    cmd: b\n"


@contextmanager
def project() -> Iterator[Repo]:
    """The DVC project of the current folder, in which an operation waits for the project's lock.

    Raises:
        UserError: it is not one.
    """
    try:
        repo = Repo(_wait_for_lock=True)
    except NotDvcRepoError as error:
        raise UserError(f"{Path.cwd()} is not a DVC project; run this in the root folder of the project") from error
    with repo:
        yield repo


def changed_stages() -> set[str]:
    """The stages that DVC finds changed.

    Raises:
        UserError: a stage of this checkout is running, or DVC cannot read the project.
    """
    with project() as repo:
        try:
            return set(repo.status())
        except LockError as error:
            raise UserError(
                "a stage of this checkout is running, so DVC cannot say what is out of date; wait for its end"
            ) from error
        except DvcException as error:
            raise UserError(f"dvc status failed: {str(error).splitlines()[0]}") from error


def run_commands(program: str, run: Callable[[Sequence[str], Mapping[str, str], str], int]) -> None:
    """Let `run` run the plain commands of `program` from now on, and a shell, as ever, all others.

    Args:
        run: given words, environment and folder, returns the exit status, negative for a signal.
    """
    plain = re.compile(rf"{re.escape(program)}( [\w@%+=:,./-]+)*")
    by_shell = dvc.stage.run._run

    def run_command(executable: str | None, command: str, **options: Any) -> None:
        if not plain.fullmatch(command):
            by_shell(executable, command, **options)
            return
        # As DVC does it: the command decides what an interrupt means.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            status = run(command.split(), options["env"], options["cwd"])
        finally:
            signal.signal(signal.SIGINT, before)
        if status != 0:
            raise StageCmdFailedError(command, status)

    dvc.stage.run._run = run_command


def drop_damaged_rwlock(path: Path = RWLOCK_FILE) -> None:
    """Delete DVC's record of who reads and writes what, if a process was killed while it wrote it.

    DVC itself forgets the entries of dead processes, but gives up on a file that is not whole.
    """
    with _guard(path):
        if _holders(path) is None:
            path.unlink(missing_ok=True)


def drop_stale_rwlock(path: Path = RWLOCK_FILE) -> None:
    """Delete that record as well if nobody in it is alive; a number may have gone to a process that is not DVC."""
    with _guard(path):
        if not any(_runs_dvc(number) for number in _holders(path) or ()):
            path.unlink(missing_ok=True)


def _guard(path: Path) -> AbstractContextManager[Any]:
    """DVC's lock around its writing of the record, which is damaged as long as it is being written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_lock(str(path.with_name(RWLOCK_LOCK)), tmp_dir=str(path.parent), wait=True)


def _holders(path: Path) -> set[int] | None:
    """The processes that the record names; None if it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        writers = [*record.get("write", {}).values()]
        readers = [reader for each in record.get("read", {}).values() for reader in each]
        return {int(holder["pid"]) for holder in [*writers, *readers]}
    except FileNotFoundError:
        return set()
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _runs_dvc(number: int) -> bool:
    try:
        command = " ".join(psutil.Process(number).cmdline())
    except psutil.Error:
        return False
    return "dvc" in command or "pipeline.launch" in command
