"""Whether results are up to date, told from files alone: what each was made from, and what it would be made from now.

A cell is finished when metrics.json and test.json carry the fingerprint that it has now: of what its code computes, of
its sections of params.yaml, and of its data. Data is up to date when its summary says that it was made by what the code
of the task computes now, from its section of params.yaml. DVC's record says the same by files (see
`pipeline.record`), but it knows a group of seeds only as a whole, and is asked for what measures and reports.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.grid import numerics
from pipeline.grid.axes import Cell, replace_stage_name, stage_names
from pipeline.grid.numerics import digest
from pipeline.grid.results import CellResults, Fingerprint, Replaced
from pipeline.host.files import read_json
from schoenbat.errors import UserError

REVIEWS, PAPERS = "lra-text", "lra-retrieval"
"""The tasks whose texts trained models are given."""
PROVENANCE = "provenance.json"
CODE_VARIABLE = "SCHOENBAT_CODE"
"""The fingerprint that a grid has found for the code of a cell when it started."""


def raw_folder(task: str) -> Path:
    return Path("data/raw", task)


def data_folder(profile: str, task: str) -> Path:
    return Path("data/processed", profile, task)


def summary_file(profile: str, task: str) -> Path:
    """Return the copy of a data set's meta.json that is kept with the results."""
    return Path("runs", profile, "data", f"{task}.json")


class Freshness:
    """What results of a params file would be made from, by the files as they are when each is first looked at.

    `data(task)` is the fingerprint of a task's data; None if there is none, or other data would be made now.

    Args:
        settings: the content of params.yaml, as it is written.
        digests: the numerics of a component by kind and name: of the code by default.
    """

    def __init__(
        self, settings: Mapping[str, Any], digests: Callable[[str, str], Any] = numerics.component_digests
    ) -> None:
        self._settings = settings
        self._digests = functools.cache(digests)
        self.data = functools.cache(self._read_data)
        self.profile: str = settings["profile"]

    @property
    def replacing(self) -> list[str]:
        """The names of the cells of trained models."""
        return list(self._settings["trained"]["cells"])

    def look_again(self) -> "Freshness":
        """Return the same with data and results as they are by now, and code and settings as they were."""
        return Freshness(self._settings, self._digests)

    def code(self, attn: str, dotf: str | None) -> str:
        """Return the fingerprint of the code of a mechanism and its kernel."""
        return digest([self._digests("attention", attn), dotf and self._digests("kernel", dotf)])

    def settings(self, cell: Cell) -> str:
        """Return the fingerprint of the sections of params.yaml that decide a cell's numbers."""
        task = self._settings["task"][cell.task]
        return digest(
            {
                "cell": cell.id,
                "model": task["model"],
                "training": task["training"],
                "attention": self._settings["attention"].get(cell.attn),
                "former": self._settings["former"].get(cell.former),
            }
        )

    def made_from(self, task: str) -> str:
        """Return the fingerprint of what decides a task's data: its code, and its section of params.yaml."""
        return digest([self._digests("task", task), self._settings["task"][task]["data"]])

    def _read_data(self, task: str) -> str | None:
        try:
            summary = read_json(summary_file(self.profile, task))
        except FileNotFoundError:
            return None
        if summary.get("made_from") != self.made_from(task) or sources_have_changed(raw_folder(task)):
            return None
        return str(summary["fingerprint"])

    def has_arrays(self, task: str) -> bool:
        """Return whether the prepared data of a task is here, and not its summary alone, as in a clone."""
        try:
            meta = read_json(data_folder(self.profile, task) / "meta.json")
        except FileNotFoundError:
            return False
        return self.data(task) is not None and meta["fingerprint"] == self.data(task)

    def fingerprint(self, cell: Cell) -> Fingerprint | None:
        """Return what a result of the cell would be made from; None if its data has to be made first."""
        data = self.data(cell.task)
        return None if data is None else Fingerprint(self.code(cell.attn, cell.dotf), self.settings(cell), data)

    def is_trained(self, cell: Cell) -> bool:
        """Return whether the cell's training is up to date; its weights may be missing, as in a clone."""
        return CellResults(self.profile, cell.id).fingerprints()[0] == str(self.fingerprint(cell))

    def is_finished(self, cell: Cell) -> bool:
        """Return whether training and test of the cell are up to date."""
        return CellResults(self.profile, cell.id).fingerprints() == [str(self.fingerprint(cell))] * 2

    def replaced(self, cell: str) -> Fingerprint | None:
        """Return what a result of a cell of `trained.cells` would be made from; None if its data has to be made."""
        trained, data = self._settings["trained"], [self.data(task) for task in (REVIEWS, PAPERS)]
        settings = digest([cell, trained["model"][cell.partition("-")[0]], trained["cells"][cell]])
        return None if None in data else Fingerprint(digest(self._digests("stage", "replace")), settings, digest(data))

    def is_replaced(self, cell: str) -> bool:
        """Return whether the result of a cell of `trained.cells` is up to date."""
        return Replaced(self.profile, cell).fingerprint() == str(self.replaced(cell))

    def cell_stages(self, cells: Iterable[Cell]) -> dict[str, bool]:
        """Return whether the stages of DVC that train and test `cells`, and those that replace, are up to date."""
        stages: dict[str, bool] = {}
        for cell in cells:
            train, test = stage_names(self.profile, cell)
            stages[train] = stages.get(train, True) and self.is_trained(cell)
            stages[test] = stages.get(test, True) and self.is_finished(cell)
        for name in self.replacing:
            stages[replace_stage_name(self.profile, name)] = self.is_replaced(name)
        return stages


def check_folders() -> None:
    """Raise UserError if results would go through a link that leads out of the checkout: DVC records nothing there."""
    here = Path.cwd().resolve()
    for folder in map(Path, ("data", "data/raw", "data/processed", "weights", "runs", "reports", "numerics")):
        if folder.is_symlink() and not folder.resolve().is_relative_to(here):
            raise UserError(
                f"{folder} is a link to {folder.resolve()}, out of the checkout, where DVC records nothing; "
                "make it a folder, or put the whole checkout there"
            )


def named_files(settings: Any) -> Iterator[str]:
    """Yield the files of this machine that a task's settings name, such as a table of one's own."""
    if isinstance(settings, str):
        # What is too long for a path is none.
        if len(settings) < 1000 and "\0" not in settings and Path(settings).is_file():
            yield settings
    elif isinstance(settings, dict | list | tuple):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from named_files(value)


def read_provenance(raw: Path) -> dict[str, Any]:
    """Return what provenance.json says; nothing where it is absent or cut short, so that it is written anew."""
    try:
        return dict(read_json(raw / PROVENANCE))
    except (FileNotFoundError, UserError):
        return {}


def sources_have_changed(raw: Path) -> bool:
    """Return whether a file that raw data was taken from has changed since; one that is gone has not."""
    sources: dict[str, str] = read_provenance(raw).get("sources", {})
    return any(Path(path).is_file() and hash_file(Path(path)) != found for path, found in sources.items())


def hash_file(path: Path) -> str:
    """Return the MD5 digest of a file's content, as DVC takes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
