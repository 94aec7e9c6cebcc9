"""Reports of a profile: one file per report, each a function of DataFrames to texts, tables and figures.

A new report is one new file here: a subclass of `Report` that takes its rows from a `Comparison` and its `Results`.
`build` writes them all to reports/PROFILE: as Markdown, as one HTML page, and as files. What is written is a pure
function of the files under runs/PROFILE and of params.yaml: the same inputs give the same bytes.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import matplotlib.style
import pandas as pd

from pipeline.grid.params import Params
from pipeline.host.text import counted
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import STYLE, Figure
from pipeline.reporting._page import render_page
from pipeline.reporting._results import CELL, CELL_VALUES, Results, collect
from pipeline.reporting._statistics import MARGIN
from pipeline.reporting._table import Table, Text
from schoenbat.errors import UserError
from schoenbat.registry import Registry


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
    params: Params, root: Path, *, reference: str = "softmax", margin: float = MARGIN, force: bool = False
) -> None:
    """Write reports/PROFILE from whatever is finished.

    Args:
        params: the profile; results of cells outside its grid are left out.
        root: the project's folder.
        reference: the mechanism that the others are compared with.
        margin: points of accuracy within which two mechanisms count as equal.
        force: also where the report that is there shows cells of the grid of which there are no results any more.

    Raises:
        UserError: there are such cells.
    """
    results = collect(params, root, reference, margin)
    folder = root / "reports" / params.profile
    lost = [] if force else _lost(results, folder / "tables/cells.csv")
    if lost:
        raise UserError(
            f"reports/{params.profile} shows {counted(len(lost), 'finished cell')} without results by now, such as "
            f"{lost[0]}; `schoenbat-exp report --force` builds it without"
        )
    building, former = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (building, former):
        shutil.rmtree(leftover, ignore_errors=True)
    for name in ("tables", "figures"):
        (building / name).mkdir(parents=True)
    comparison = Comparison(results)
    page = "`schoenbat-exp report` also writes it as a page, `index.html`."
    lines = [f"# Profile {params.profile}", *results.status(), page]
    sections = []
    with matplotlib.style.context(["default", STYLE]):
        for report in sorted((REPORTS.get(name)() for name in REPORTS.names()), key=lambda report: report.order):
            if parts := list(report.make(comparison)):
                sections.append((report.title, parts))
                lines += [f"## {report.title}", *(part.write(building) for part in parts)]
    (building / "index.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (building / "index.html").write_text(render_page(results, sections, building / "figures"), encoding="utf-8")
    if not results.cells.empty:
        cells = results.cells[[*CELL, *CELL_VALUES]]
        cells.to_csv(building / "tables/cells.csv", index=False, lineterminator="\n", float_format="%.10g")
    if folder.exists():
        folder.rename(former)
    building.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _lost(results: Results, table: Path) -> list[str]:
    """Return the cells of the grid without results that are finished in a table of cells."""
    if not table.is_file():
        return []
    shown = pd.read_csv(table, dtype=str, keep_default_na=False)
    finished = {"-".join(filter(None, axes)) for axes in shown[shown.test_accuracy != ""][CELL].itertuples(index=False)}
    return [cell for cell in results.cells.id[results.cells.state == "missing"] if cell in finished]
