"""What holds of every figure of a report."""

from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation, Text

from pipeline.grid.params import Params
from pipeline.reporting import REPORTS
from pipeline.reporting._comparison import COLOURED, Comparison
from pipeline.reporting._figure import COLUMNS, STYLE, Figure, spread_labels
from pipeline.reporting._results import collect


def look_at_figures(params: Params, root: Path) -> list[str]:
    """Check colours, labels and panels of all figures of a profile; their names."""
    comparison = Comparison(collect(params, root))
    with matplotlib.style.context(["default", STYLE]):
        made = [part for name in REPORTS.names() for part in REPORTS.get(name)().make(comparison)]
        figures = [part for part in made if isinstance(part, Figure)]
        for figure in figures:
            spread_labels(figure.canvas)
            _look(figure)
    return sorted(figure.name for figure in figures)


def _look(figure: Figure) -> None:
    renderer: Any = figure.canvas.canvas.get_renderer()  # type: ignore[attr-defined]
    columns = {round(axes.get_position().x0, 3) for axes in figure.canvas.axes}
    assert len(columns) <= COLUMNS, figure.name
    for axes in figure.canvas.axes:
        colours = {to_rgb(line.get_color()) for line in axes.lines}
        coloured = {colour for colour in colours if max(colour) - min(colour) > 0.05}
        # A dashed black line is the cache, or exact attention.
        assert len(coloured) + ((0.0, 0.0, 0.0) in colours) <= COLOURED, (figure.name, colours)
        labels = [text for text in axes.texts if isinstance(text, Annotation)]
        boxes = [Text.get_window_extent(label, renderer) for label in labels]
        for number, box in enumerate(boxes):
            assert box.count_overlaps(boxes[:number]) == 0, (figure.name, labels[number].get_text())
