"""The report as one HTML page that needs nothing else: no server, no other host, no file beside it.

Figures are drawn inside the page as SVG, with the page's own colours for what is black and white in the file.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from pipeline.host.text import counted
from pipeline.reporting._figure import Figure
from pipeline.reporting._results import Results
from pipeline.reporting._table import Table, Text

_ENLARGED = 1.5
"""Pixels of a figure in the page for each of its points, where there is room."""
_COLOURS = {"#000000": "currentColor", "#ffffff": "var(--page)", "#e6e6e6": "var(--rule)"}


def render_page(
    results: Results, sections: Sequence[tuple[str, Sequence[Text | Table | Figure]]], figures: Path
) -> str:
    """Return the page as one text.

    Args:
        sections: their titles, and what stands under them.
        figures: the folder in which NAME.svg of each figure lies.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "anchor": lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"),
        # Percent signs stay beside their numbers.
        "bound": lambda text: text.replace(" %", "\u00a0%"),
        "drawn": lambda figure: _drawn(figure, (figures / f"{figure.name}.svg").read_text(encoding="utf-8")),
    }
    page = environment.get_template("page.html.j2").render(
        results=results,
        sections=sections,
        finished=f"{results.num_finished} of {counted(results.num_cells, 'cell')}",
        seeds=counted(len(results.seeds), "seed"),
    )
    return page + "\n"


def _drawn(figure: Figure, svg: str) -> Markup:
    """Return the <svg> element of a file by matplotlib, fit to stand in a page with others."""
    element = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    element = re.sub(r"\n\s*", "\n", element)
    for name, replaced in _COLOURS.items():
        element = element.replace(name, replaced)
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{figure.name}-", element)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', element)
    assert box, f"{figure.name}: not what matplotlib writes"
    label = escape(f"{figure.title}. {figure.caption}".strip())
    opening = (
        f'<svg role="img" aria-label="{label}" {box[0]} style="max-width: {_ENLARGED * float(box[1]):.0f}px" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(opening + element[element.index(">") + 1 :].strip())
