"""Reports of a profile: one file per report, each a function of one tidy DataFrame to tables and figures.

The frame has one row per observation (`_collect.py` describes it), so a new report is one new file here: a subclass of
`Report` that picks its rows by `quantity`. `build` writes them all to reports/PROFILE: as Markdown, as one HTML page,
and as files. What is written is a pure function of the files under runs/PROFILE and of params.yaml: the same inputs
give the same bytes.
"""

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import matplotlib.style

from pipeline.grid.params import Params
from pipeline.host.text import counted
from pipeline.reporting._collect import collect
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._output import STYLE, Figure, write_figure, write_table, write_text
from pipeline.reporting._page import Section, render_page
from pipeline.reporting._statistics import MARGIN
from pipeline.reporting._table import Table, Text
from schoenbat.errors import UserError
from schoenbat.registry import Registry

_FINISHED = re.compile(r"^(\d+) of \d+ cells are finished\.$", re.MULTILINE)


class Report(ABC):
    """One view of the results."""

    title: ClassVar[str]
    order: ClassVar[int] = 90
    """Its place among the sections: those with a smaller number come first."""

    @abstractmethod
    def make(self, comparison: Comparison) -> Iterable[Text | Table | Figure]:
        """Return texts, tables and figures, in order; whatever there is nothing to show for is left out."""


REPORTS: Registry[Report] = Registry("report", "pipeline.reporting", Report)  # type: ignore[type-abstract]


def build(
    profile: str,
    params: Params,
    root: Path,
    *,
    reference: str = "softmax",
    margin: float = MARGIN,
    force: bool = False,
) -> None:
    """Write reports/PROFILE and reports/index.md from whatever is finished.

    Args:
        profile: the name of the profile.
        params: the grid; results of cells outside it are left out.
        root: the project's folder.
        reference: the mechanism that the others are compared with.
        margin: points of accuracy within which two mechanisms count as equal.
        force: replace a report even if it shows more finished cells.

    Raises:
        UserError: the report that is there shows more finished cells.
    """
    frame, setting = collect(profile, params, root, reference, margin)
    comparison = Comparison(frame, setting)
    folder = root / "reports" / profile
    before = finished_cells(folder)
    if before > setting.num_finished and not force:
        raise UserError(
            f"{folder.relative_to(root)} shows {counted(before, 'finished cell')}, a new report would show "
            f"{setting.num_finished}; pass --force to replace it"
        )
    building, former = folder.with_name(f".{profile}.new"), folder.with_name(f".{profile}.old")
    for leftover in (building, former):
        shutil.rmtree(leftover, ignore_errors=True)
    for name in ("tables", "figures"):
        (building / name).mkdir(parents=True)
    lines = [f"# Profile {profile}", *setting.status(), "The same as a page: [index.html](index.html)."]
    sections = []
    with matplotlib.style.context(["default", STYLE]):
        for report in sorted((REPORTS.get(name)() for name in REPORTS.names()), key=lambda report: report.order):
            parts = list(report.make(comparison))
            if parts:
                sections.append(Section(report.title, parts))
                lines += [f"## {report.title}", *(_write(building, part) for part in parts)]
    (building / "index.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (building / "index.html").write_text(render_page(setting, sections, building / "figures"), encoding="utf-8")
    if folder.exists():
        folder.rename(former)
    building.rename(folder)
    shutil.rmtree(former, ignore_errors=True)
    _write_overview(root / "reports")


def finished_cells(folder: Path) -> int:
    """Return how many finished cells the report in `folder` shows; 0 where there is none."""
    index = folder / "index.md"
    text = index.read_text(encoding="utf-8", errors="replace") if index.is_file() else ""
    found = _FINISHED.search(text)
    return int(found[1]) if found else 0


def _write(folder: Path, part: Text | Table | Figure) -> str:
    """Write one part's files; return its Markdown."""
    if isinstance(part, Text):
        return write_text(folder, part)
    return write_table(folder, part) if isinstance(part, Table) else write_figure(folder, part)


def _write_overview(folder: Path) -> None:
    """List all profiles that have a report, in reports/index.md."""
    lines = ["# Reports", ""]
    for index in sorted(folder.glob("[!.]*/index.md")):
        note = (index.read_text(encoding="utf-8", errors="replace").splitlines()[2:] or ["not readable"])[0]
        lines.append(f"- [{index.parent.name}]({index.parent.name}/index.md): {note}")
    temporary = folder / ".index.md.new"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(folder / "index.md")
