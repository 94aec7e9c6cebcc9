"""Differences in test accuracy: each mechanism against a named one, against uniform attention, and with ppSBN against
without."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import CONTROL, Comparison, OnTask, Versus
from pipeline.reporting._mechanisms import has_ppsbn, label
from pipeline.reporting._output import Figure, add_legend, new_canvas
from pipeline.reporting._setting import Setting
from pipeline.reporting._statistics import LEAST_SEEDS, POWER, Difference
from pipeline.reporting._table import MISSING, Table, show_interval, show_number


class Differences(Report):
    """Paired by seed and example, so that what all mechanisms share drops out."""

    title = "Differences, and what they are worth"
    order = 20

    def make(self, comparison: Comparison) -> Iterator[Table | Figure]:
        setting = comparison.setting
        for name in dict.fromkeys((setting.reference, CONTROL)):
            rows = comparison.versus(name)
            if rows:
                yield _table(f"versus-{name}", f"Difference in test accuracy from {name}, in points", rows, setting)
        rows = comparison.ppsbn()
        if rows:
            yield _table("ppsbn", "Difference in test accuracy with ppSBN from without, in points", rows, setting)
        pairs = list(_pairs(comparison))
        if pairs:
            yield Table(
                name="pairs",
                title="All pairs of mechanisms: the first less the second, in points of test accuracy",
                values=pd.DataFrame([values for values, _ in pairs]),
                shown=pd.DataFrame([shown for _, shown in pairs]),
                caption=f"{_INTERVAL} Verdicts are of the family of all pairs of a task. {_margin(setting)}",
                provenance=setting.caption(),
            )
        for task, on_task in comparison.tasks.items():
            if len(on_task.means) > 1 and len(setting.seeds) > 1:
                yield _triangle(task, on_task, setting)


_INTERVAL = "Interval: 95 %, for this pair alone, by a bootstrap over seeds and test examples together."
_LEGEND = (
    f"{_INTERVAL} p: t-test with the same error, not shown for fewer than {LEAST_SEEDS} seeds. Error: the shares of "
    "seeds and of examples in its square; the rest shrinks with more of either. Visible: the least true difference "
    f"that is seen in {100 * POWER:.0f} % of all cases with so many seeds and examples, at a level of 5 %, before any "
    "correction."
)


def _margin(setting: Setting) -> str:
    return (
        f"Equal within {setting.margin:g}: two one-sided tests at 5 %; open: neither significantly different nor "
        "equal within that, but within what stands there."
    )


def _table(name: str, title: str, rows: Sequence[Versus], setting: Setting) -> Table:
    return Table(
        name=name,
        title=title,
        values=pd.DataFrame([_values(row) for row in rows]),
        shown=pd.DataFrame([_shown(row, setting) for row in rows]),
        caption=f"{_LEGEND} p (Holm): corrected over this table, as are verdicts. {_margin(setting)}",
        provenance=setting.caption(),
    )


def _values(row: Versus) -> dict:
    names = zip(
        ("attn", "dotf", "former", "other", "other_dotf", "other_former"), row.mechanism + row.other, strict=True
    )
    return {
        "task": row.task,
        **dict(names),
        **vars(row.difference),
        "p_holm": row.adjusted,
        "significant": row.significant,
    }


def _shown(row: Versus, setting: Setting) -> dict[str, str]:
    found = row.difference
    texts = {"task": row.task, "mechanism": label(row.mechanism), "less": label(row.other)}
    fewer = f" ({found.seeds} seeds)" if found.seeds < len(setting.seeds) else ""
    texts |= {"difference": f"{show_number(found.estimate, '+.2f')}{fewer}"}
    texts |= {"interval": show_interval(found.low, found.high)}
    texts |= {"p (Holm)": _p(row.adjusted) if found.seeds >= LEAST_SEEDS else MISSING, "error": _shares(found)}
    texts |= {"visible": show_number(found.smallest), "verdict": verdict(found, row.significant, setting.margin)}
    if has_ppsbn(row.mechanism[2]) != has_ppsbn(row.other[2]) and row.mechanism[0] != row.other[0]:
        texts["verdict"] += "; ppSBN differs too"
    return texts


def _pairs(comparison: Comparison) -> Iterator[tuple[dict, dict]]:
    setting = comparison.setting
    for task, on_task in comparison.tasks.items():
        for (one, other), found in on_task.differences.items():
            significant = on_task.significant[one, other]
            row = Versus(task, one, other, found, float("nan"), significant)
            values = _values(row)
            del values["p_holm"]
            shown = {
                "task": task,
                "mechanism": label(one),
                "less": label(other),
                "difference": show_number(found.estimate, "+.2f"),
            }
            shown |= {"interval": show_interval(found.low, found.high)}
            shown |= {"verdict": verdict(found, significant, setting.margin)}
            yield values, shown


_INCHES = 0.17
"""The side of a field."""


def _triangle(task: str, on_task: OnTask, setting: Setting) -> Figure:
    """Draw all pairs, the best mechanism first, so that of two the upper one is the higher one."""
    order = sorted(on_task.means, key=lambda mechanism: -on_task.means[mechanism])
    names = [f"{label(mechanism)}  {on_task.means[mechanism]:.1f}" for mechanism in order]
    size = 0.7 + 0.07 * max(map(len, names)) + _INCHES * len(order)
    # The heading stands above the fields alone, and must not be wider than the figure.
    canvas, (axes,) = new_canvas(max(size, 0.15 * len(setting.heading(task))), size)
    pairs = [(row, column) for row in range(len(order)) for column in range(row)]
    significant = [pair for pair in pairs if on_task.is_significant(*(order[each] for each in pair))]
    equal = [pair for pair in pairs if _is_equal(on_task.difference(*(order[each] for each in pair)), setting.margin)]
    for fields, name, look in (
        (significant, "significantly different", {"marker": "s", "c": "#2c6fbb"}),
        (equal, f"equal within {setting.margin:g}", {"marker": "o", "c": "#d9822b", "s": 14}),
    ):
        axes.scatter([column for _, column in fields], [row for row, _ in fields], label=name, **({"s": 60} | look))
    axes.set(xlim=(-0.5, len(order) - 0.5), ylim=(len(order) - 0.5, -0.5), aspect="equal", title=setting.heading(task))
    axes.set_xticks(range(len(order)), [label(mechanism) for mechanism in order], rotation=90, fontsize=7)
    axes.set_yticks(range(len(order)), names, fontsize=7)
    add_legend(axes)
    return Figure(
        name=f"pairs-{task}",
        title=f"Which mechanisms differ significantly on {task}",
        canvas=canvas,
        caption=(
            "The best stands first, with mean test accuracy beside the name. Square: the row is significantly "
            f"lower than the column, among all pairs of the task; dot: equal within "
            f"{setting.margin:g} points; empty: open."
        ),
        provenance=setting.caption([task]),
    )


def _is_equal(found: Difference | None, margin: float) -> bool:
    return found is not None and found.margin < margin


def verdict(found: Difference, significant: bool, margin: float) -> str:
    """Say what a difference in points shows."""
    if found.seeds < 2:
        return "one seed"
    equal = _is_equal(found, margin)
    if significant:
        return ("higher" if found.estimate > 0 else "lower") + (f", but within {margin:g}" if equal else "")
    return f"equal within {margin:g}" if equal else f"open, within {found.margin:.1f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _shares(found: Difference) -> str:
    return MISSING if np.isnan(found.seed_share) else f"{found.seed_share:.0%}, {found.example_share:.0%}"
