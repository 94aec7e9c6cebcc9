"""The report as one HTML page that needs nothing else: no server, no other host, no file beside it.

Figures are drawn inside the page as SVG, with the page's own colours for what is black and white in the file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from pipeline.host.text import counted
from pipeline.reporting._output import Figure
from pipeline.reporting._setting import Setting
from pipeline.reporting._table import Table, Text

MOST_ROWS = 600
"""Of a table in the page; its files have all."""
LEAST_FILTERED = 9
"""Rows from which a table gets a filter."""
_ENLARGED = 1.5
"""Pixels of a figure in the page for each of its points, where there is room."""
_TEMPLATE = "page.html.j2"
_COLOURS = {
    "#000000": "currentColor",
    "#ffffff": "var(--page)",
    "#e6e6e6": "var(--rule)",
}


@dataclass(frozen=True)
class Section:
    """A title and what stands under it."""

    title: str
    parts: Sequence[Text | Table | Figure]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def render_page(setting: Setting, sections: Sequence[Section], figures: Path) -> str:
    """Return the page as one text.

    Args:
        figures: the folder in which NAME.svg of each figure lies.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests |= {
        "table": lambda part: isinstance(part, Table),
        "figure": lambda part: isinstance(part, Figure),
    }
    page = environment.get_template(_TEMPLATE).render(
        setting=setting,
        sections=sections,
        finished=f"{setting.num_finished} of {counted(setting.num_cells, 'cell')}",
        rows_of=_rows,
        bound=_bound,
        most_rows=MOST_ROWS,
        least_filtered=LEAST_FILTERED,
        drawn=lambda figure: _drawn(figure, (figures / f"{figure.name}.svg").read_text(encoding="utf-8")),
    )
    return page + "\n"


def _rows(table: Table) -> list[list[tuple[str, bool]]]:
    """Return the cells to be shown, and whether each stands out."""
    headings = list(table.shown.columns)
    return [
        [(_bound(text), (number, heading) in table.strong) for heading, text in zip(headings, row, strict=True)]
        for number, row in enumerate(table.shown.head(MOST_ROWS).to_numpy().tolist())
    ]


def _bound(text: str) -> str:
    """Keep percent signs beside their numbers."""
    return text.replace(" %", "\u00a0%")


def _drawn(figure: Figure, svg: str) -> Markup:
    """Return the <svg> element of a file by matplotlib, fit to stand in a page with others."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"\n\s*", "\n", element)
    for name, replaced in _COLOURS.items():
        element = element.replace(name, replaced)
    prefix = f"{figure.name}-"
    element = re.sub(r'\bid="', f'id="{prefix}', element)
    element = re.sub(r'href="#', f'href="#{prefix}', element)
    element = element.replace("url(#", f"url(#{prefix}")
    width = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', element)
    assert width, f"{figure.name}: not what matplotlib writes"
    label = escape(f"{figure.title}. {figure.caption}".strip())
    opening = (
        f'<svg role="img" aria-label="{label}" {width[0]} style="max-width: {_ENLARGED * float(width[1]):.0f}px" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(opening + element[element.index(">") + 1 :].strip())
