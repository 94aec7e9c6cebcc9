"""Results of one revision carried over to another that computes the same, and taken over from another checkout."""

import contextlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.grid.axes import Cell
from pipeline.grid.cells import expand
from pipeline.grid.freshness import Freshness, summary_file
from pipeline.grid.params import Params
from pipeline.grid.results import CellResults, Replaced, read_rows
from pipeline.grid.settings import PARAMS_FILE
from pipeline.host.devices import describe_device
from pipeline.host.files import git, git_revision, write_csv
from pipeline.host.text import share
from pipeline.stages.golden import STEPS
from schoenbat.errors import UserError
from schoenbat.files import write_bytes


def carry_over(params: Params, revision: str, *, tolerance: float) -> None:
    """Give results that `revision` made the numerics of today's code where both compute the same.

    Of each group of cells whose results are out of date for their code alone, the first seed is trained for a few steps
    by both revisions, on this machine and with the data that is prepared here. Where weights, losses and outputs differ
    by no more than `tolerance`, its results count as those of today's code, and a line of runs/PROFILE/carried.csv says
    so. The others stay out of date.

    Raises:
        UserError: no such revision, or one that has no golden records.
    """
    freshness = Freshness(params.written)
    groups: dict[str, list[Cell]] = {}
    for cell in expand(params):
        if _is_of_other_code(cell, freshness):
            groups.setdefault(cell.group, []).append(cell)
    replaced = [name for name in freshness.replacing if _is_replaced_by_other_code(name, freshness)]
    if not groups and not replaced:
        print("no results are out of date for their code alone")
        return
    if git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}") is None:
        raise UserError(f"{revision!r} is no git revision")
    firsts = [cells[0] for cells in groups.values()]
    with _checked_out(revision) as tree:
        ids = [*(cell.id for cell in firsts), *replaced]
        before, after = _golden(params.profile, ids, tree), _golden(params.profile, ids, Path.cwd())
    commit = git("rev-parse", "--short=12", revision)
    made = {
        **{"from": commit, "to": git_revision(), "device": describe_device(torch.device("cpu"))},
        **{"threads": params.run.threads, "torch": torch.__version__, "steps": STEPS},
    }
    rows = []
    for name, compared in {**{cell.group: cell.id for cell in firsts}, **{name: name for name in replaced}}.items():
        difference = _difference(before, after, compared)
        if math.isnan(difference) or difference > tolerance:
            print(f"{name}: differs by {difference:.3g}, so it is out of date")
            continue
        rows.append({"group": name, **made, "difference": difference})
        for each in groups.get(name, ()):
            fingerprint = freshness.fingerprint(each)
            assert fingerprint is not None
            CellResults(params.profile, each.id).set_fingerprint(fingerprint)
        if name in replaced:
            fingerprint = freshness.replaced(name)
            assert fingerprint is not None
            Replaced(params.profile, name).set_fingerprint(fingerprint)
    path = Path("runs", params.profile, "carried.csv")
    if rows:
        write_csv(path, [*(read_rows(path, ()) if path.is_file() else ()), *rows])
    print(f"{len(rows)} of {len(groups) + len(replaced)} groups of cells compute the same as at {commit}: {path}")


def take_over(params: Params, folder: Path) -> None:
    """Copy the results of another checkout that are what today's code, settings and data of this one make.

    Args:
        folder: the root of the other checkout; its cells may be finished in part, and its record does not matter.

    Raises:
        UserError: there are no results of the profile.
    """
    if not (folder / "runs" / params.profile).is_dir():
        raise UserError(f"{folder} has no results of profile {params.profile} (runs/{params.profile})")
    freshness, cells, taken = Freshness(params.written), expand(params), 0
    for task in params.grid.tasks:
        theirs = folder / summary_file(params.profile, task)
        if theirs.is_file() and freshness.data(task) is None:
            write_bytes(summary_file(params.profile, task), theirs.read_bytes())
    freshness = freshness.look_again()
    for cell in cells:
        wanted, other = freshness.fingerprint(cell), CellResults(params.profile, cell.id, folder)
        if wanted is None or freshness.is_finished(cell) or other.fingerprints() != [str(wanted)] * 2:
            continue
        own = CellResults(params.profile, cell.id)
        for source, target in zip(other.files(), own.files(), strict=True):
            if source.is_file():
                write_bytes(target, source.read_bytes())
        taken += 1
    for name in freshness.replacing:
        given = Replaced(params.profile, name, folder)
        if not freshness.is_replaced(name) and given.fingerprint() == str(freshness.replaced(name)):
            for source, target in zip(given.files(), Replaced(params.profile, name).files(), strict=True):
                write_bytes(target, source.read_bytes())
            taken += 1
    number = len(cells) + len(freshness.replacing)
    print(f"{share(taken, number, 'cell', f'of profile {params.profile}')} taken from {folder}")


def _is_replaced_by_other_code(name: str, freshness: Freshness) -> bool:
    wanted, found = freshness.replaced(name), Replaced(freshness.profile, name).fingerprint()
    if wanted is None or found is None or found == str(wanted):
        return False
    return found.endswith(f"-{wanted.settings}-{wanted.data}")


def _is_of_other_code(cell: Cell, freshness: Freshness) -> bool:
    wanted = freshness.fingerprint(cell)
    trained, tested = CellResults(freshness.profile, cell.id).fingerprints()
    if wanted is None or trained is None or trained != tested:
        return False
    return trained != str(wanted) and trained.endswith(f"-{wanted.settings}-{wanted.data}")


@contextlib.contextmanager
def _checked_out(revision: str) -> Iterator[Path]:
    """Yield a folder with the files of a revision, today's params.yaml and the data that is prepared here."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), revision], check=True, capture_output=True)
        try:
            (tree / PARAMS_FILE).write_bytes(PARAMS_FILE.read_bytes())
            (tree / "data").symlink_to(Path("data").absolute())
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True, capture_output=True)


def _golden(profile: str, cells: Sequence[str], tree: Path) -> dict[str, np.ndarray]:
    """Return the golden records of cells by the code of a checkout."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "golden.npz")
        options = [word for cell in cells for word in ("--cell", cell)]
        command = [sys.executable, "-m", "pipeline.cli", "golden", str(out), "--profile", profile, *options]
        done = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=False)
        if done.returncode:
            raise UserError(f"the code in {tree} gives no golden records; its output says why")
        with np.load(out) as arrays:
            return dict(arrays)


def _difference(before: dict[str, np.ndarray], after: dict[str, np.ndarray], cell: str) -> float:
    """Return the largest difference relative to the largest value of its kind; 0 for the same bits."""
    names = [name for name in before if name.startswith(f"{cell}/")]
    pairs = [(before[name], after[name]) for name in names if not np.array_equal(before[name], after[name])]
    if any(one.shape != other.shape for one, other in pairs):
        return math.inf
    return float(np.max([np.abs(one - other).max() / np.abs(one).max() for one, other in pairs], initial=0.0))
