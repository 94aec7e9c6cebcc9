"""Reports of a profile: one file per report, each a function of one tidy DataFrame to tables and figures.

The frame has one row per observation (`_collect.py` describes it), so a new report is one new file here: a subclass of
`Report` that picks its rows by `quantity`. `build` writes them all to reports/PROFILE. What is written is a pure
function of the files that DVC tracks and of params.yaml: the same inputs give the same bytes.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import matplotlib.style
import pandas as pd

from pipeline.grid.params import Params
from pipeline.reporting._collect import Setting, collect
from pipeline.reporting._output import STYLE, Figure, write_figure, write_table
from pipeline.reporting._table import Table
from schoenbat.registry import Registry


class Report(ABC):
    """One view of the results."""

    title: ClassVar[str]
    order: ClassVar[int] = 90
    """Its place among the sections: those with a smaller number come first."""

    @abstractmethod
    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterable[Table | Figure]:
        """Tables and figures, in order; whatever there is nothing to show for is left out."""


REPORTS: Registry[Report] = Registry("report", "pipeline.reporting", Report)  # type: ignore[type-abstract]


def build(profile: str, params: Params, root: Path) -> None:
    """Write reports/PROFILE and reports/index.md from whatever is finished.

    Args:
        profile: the name of the profile.
        params: the grid; results of cells outside it are left out.
        root: the project's folder.
    """
    frame, setting = collect(profile, params, root)
    folder = root / "reports" / profile
    building, former = folder.with_name(f".{profile}.new"), folder.with_name(f".{profile}.old")
    for leftover in (building, former):
        shutil.rmtree(leftover, ignore_errors=True)
    for name in ("tables", "figures"):
        (building / name).mkdir(parents=True)
    sections = [f"# Profile {profile}", *setting.status()]
    with matplotlib.style.context(["default", STYLE]):
        for report in sorted((REPORTS.get(name)() for name in REPORTS.names()), key=lambda report: report.order):
            parts = [
                write_table(building, part) if isinstance(part, Table) else write_figure(building, part)
                for part in report.make(frame, setting)
            ]
            if parts:
                sections += [f"## {report.title}", *parts]
    (building / "index.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(former)
    building.rename(folder)
    shutil.rmtree(former, ignore_errors=True)
    _write_overview(root / "reports")


def _write_overview(folder: Path) -> None:
    """List all profiles that have a report, in reports/index.md."""
    lines = ["# Reports", ""]
    for index in sorted(folder.glob("[!.]*/index.md")):
        note = (index.read_text(encoding="utf-8", errors="replace").splitlines()[2:] or ["not readable"])[0]
        lines.append(f"- [{index.parent.name}]({index.parent.name}/index.md): {note}")
    temporary = folder / ".index.md.new"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(folder / "index.md")
