"""Differences in test accuracy: each mechanism against a named one, against uniform attention, and with ppSBN against
without."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import CONTROL, Comparison, OnTask, Versus
from pipeline.reporting._figure import Figure, add_legend, new_canvas
from pipeline.reporting._mechanisms import label
from pipeline.reporting._results import Results
from pipeline.reporting._statistics import LEAST_SEEDS, POWER
from pipeline.reporting._table import MISSING, Table, show_interval, show_number, show_p

_INTERVAL = "Interval: 95 %, for this pair alone, over seeds and test examples together."
_LEGEND = (
    f"{_INTERVAL} p: t-test with the same error, not shown for fewer than {LEAST_SEEDS} seeds. Error: the shares of "
    "seeds and of examples in its square; the rest shrinks with more of either. Visible: the least true difference "
    f"that is seen in {100 * POWER:.0f} % of all cases with so many seeds and examples, at a level of 5 %, before any "
    "correction. p (Holm): corrected over this table, as are verdicts."
)
_INCHES = 0.17
"""The side of a field in the figure of pairs."""


class Differences(Report):
    """Paired by seed and example, so that what all mechanisms share drops out."""

    title = "Differences, and what they are worth"
    order = 20

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        results = comparison.results
        references = dict.fromkeys((results.reference, CONTROL))
        margin = (
            f"Equal within {results.margin:g}: two one-sided tests at 5 %; open: neither significantly different nor "
            "equal within that, but within what stands there."
        )
        families = [(f"versus-{name}", f"from {name}", comparison.others_of(name)) for name in references]
        families.append(("ppsbn", "with ppSBN from without", comparison.without_ppsbn()))
        for name, title, others in families:
            if rows := comparison.versus(others):
                yield Table(
                    name=name,
                    title=f"Difference in test accuracy {title}, in points",
                    values=pd.DataFrame([_values(row) for row in rows]),
                    shown=pd.DataFrame([_shown(row, results) for row in rows]),
                    caption=f"{_LEGEND} {margin}",
                    provenance=results.caption(),
                )
        pairs = [row for on_task in comparison.tasks.values() for row in on_task.pairs]
        if pairs:
            yield Table(
                name="pairs",
                title="All pairs of mechanisms: the first less the second, in points of test accuracy",
                values=pd.DataFrame([_values(row) for row in pairs]).drop(columns="p_holm"),
                shown=pd.DataFrame([_difference(row) | {"verdict": _verdict(row, results.margin)} for row in pairs]),
                caption=f"{_INTERVAL} Verdicts are of the family of all pairs of a task. {margin}",
                provenance=results.caption(),
            )
        for task, on_task in comparison.tasks.items():
            if len(on_task.means) > 1 and len(results.seeds) > 1:
                yield _triangle(task, on_task, results)


def _values(row: Versus) -> dict[str, Any]:
    names = ("attn", "dotf", "former", "other", "other_dotf", "other_former")
    return {
        "task": row.task,
        **dict(zip(names, row.mechanism + row.other, strict=True)),
        **vars(row.difference),
        "p_holm": row.adjusted,
        "significant": row.significant,
    }


def _shown(row: Versus, results: Results) -> dict[str, str]:
    found, texts = row.difference, _difference(row)
    if found.seeds < len(results.seeds):
        texts["difference"] += f" ({found.seeds} seeds)"
    texts["p (Holm)"] = show_p(row.adjusted) if found.seeds >= LEAST_SEEDS else MISSING
    shares = (found.seed_share, found.example_share)
    texts["error"] = MISSING if np.isnan(shares).any() else "{:.0%}, {:.0%}".format(*shares)
    texts["visible"] = show_number(found.smallest)
    texts["verdict"] = _verdict(row, results.margin)
    if row.mechanism[2] != row.other[2] and row.mechanism[0] != row.other[0]:
        texts["verdict"] += "; ppSBN differs too"
    return texts


def _difference(row: Versus) -> dict[str, str]:
    found = row.difference
    return {
        "task": row.task,
        "mechanism": label(row.mechanism),
        "less": label(row.other),
        "difference": show_number(found.estimate, "+z.2f"),
        "interval": show_interval(found.low, found.high),
    }


def _verdict(row: Versus, margin: float) -> str:
    """Say what a difference in points shows."""
    found = row.difference
    if found.seeds < 2:
        return "one seed"
    equal = row.is_equal(margin)
    if row.significant:
        return ("higher" if found.estimate > 0 else "lower") + (f", but within {margin:g}" if equal else "")
    return f"equal within {margin:g}" if equal else f"open, within {found.margin:.1f}"


def _triangle(task: str, on_task: OnTask, results: Results) -> Figure:
    """Draw all pairs, the best mechanism first, so that of two the upper one is the higher one."""
    order = sorted(on_task.means, key=lambda mechanism: -on_task.means[mechanism])
    names = [f"{label(mechanism)}  {on_task.means[mechanism]:.1f}" for mechanism in order]
    size = 0.7 + 0.07 * max(map(len, names)) + _INCHES * len(order)
    # The heading stands above the fields alone, and must not be wider than the figure.
    canvas, (axes,) = new_canvas(max(size, 0.15 * len(results.heading(task))), size)
    pairs = [
        (column, row, pair)
        for row in range(len(order))
        for column in range(row)
        if (pair := on_task.both_ways.get((order[row], order[column])))
    ]
    for name, chosen, marker, colour, area in (
        ("significantly different", lambda pair: pair.significant, "s", "#2c6fbb", 60),
        (f"equal within {results.margin:g}", lambda pair: pair.is_equal(results.margin), "o", "#d9822b", 14),
    ):
        fields = [(column, row) for column, row, pair in pairs if chosen(pair)]
        columns, rows = np.reshape(fields, (-1, 2)).T
        axes.scatter(columns, rows, label=name, marker=marker, c=colour, s=area)
    axes.set(xlim=(-0.5, len(order) - 0.5), ylim=(len(order) - 0.5, -0.5), aspect="equal", title=results.heading(task))
    axes.set_xticks(range(len(order)), [label(mechanism) for mechanism in order], rotation=90, fontsize=7)
    axes.set_yticks(range(len(order)), names, fontsize=7)
    add_legend(axes)
    return Figure(
        name=f"pairs-{task}",
        title=f"Which mechanisms differ significantly on {task}",
        canvas=canvas,
        caption="The best stands first, with mean test accuracy beside the name. Square: the row is significantly "
        "lower than the column, among all pairs of the task; dot: equal within "
        f"{results.margin:g} points; empty: open.",
        provenance=results.caption([task]),
    )
