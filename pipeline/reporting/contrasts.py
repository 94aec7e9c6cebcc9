"""The differences that were asked for: by question, paired by seed and example, corrected over each question."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison, Versus
from pipeline.reporting._mechanisms import CONTROL, OURS, PPSBN, PUBLISHED, Mechanism, columns, features_of, label
from pipeline.reporting._statistics import LEAST_SEEDS, POWER
from pipeline.reporting._table import MISSING, Table, show_interval, show_number, show_p, without_constants
from schoenbat.registry import VARIANT_MARK, base_name

PPSBN_EFFECT = "What does ppSBN do"
VERSUS = "How far is each from {}"
Pairs = Mapping[Mechanism, Mechanism]


class Contrasts(Report):
    """One table; any other pair is compared by `schoenbat-exp compare`."""

    title = "Differences, and what they are worth"
    order = 20

    def make(self, comparison: Comparison) -> Iterator[Table]:
        results = comparison.results
        rows = [(question, row) for question, found in contrasts(comparison).items() for row in found]
        if not rows:
            return
        shown, constant = without_constants(pd.DataFrame([_shown(*each, comparison) for each in rows]))
        yield Table(
            name="contrasts",
            title="Differences in test accuracy, in points",
            values=pd.DataFrame([_values(*each) for each in rows]),
            shown=shown,
            caption="Interval: 95 %, for this pair alone, over seeds and test examples together. p: t-test with the "
            f"same error, corrected by Holm over its question, not shown for fewer than {LEAST_SEEDS} seeds. Visible: "
            f"the least true difference that is seen in {100 * POWER:.0f} % of all cases with so many seeds and "
            f"examples, before any correction. Equal within {results.margin:g}: two one-sided tests at 5 %; open: "
            f"neither significantly different nor equal within that, but within what stands there. {constant}".strip(),
            provenance=results.caption(),
        )


@functools.cache
def contrasts(comparison: Comparison) -> dict[str, list[Versus]]:
    """Return what answers each question, a family by Holm; a list is empty where nothing of the kind was tested."""
    reference, tasks = comparison.results.reference, comparison.tasks
    of_reference = comparison.others_of(reference)
    from_uniform = {
        m: o for m, o in comparison.others_of(CONTROL).items() if base_name(m[0]) == reference and m[2] == o[2]
    }
    published = [m for m in of_reference if base_name(m[0]) == PUBLISHED and m[2] == PPSBN]
    # Of most features.
    most = sorted(published, key=lambda m: features_of(comparison.results.params, m[0]))[-1:]
    most_features = {m: of_reference[m] for m in most}
    wanted: dict[str, Mapping[str, Pairs]] = {
        "Does it matter where one attends": dict.fromkeys(tasks, from_uniform),
        f"Is the published form as good as {reference}": dict.fromkeys(tasks, most_features),
        "Is our estimate better than the published one at equal features": {t: _ours(comparison, t) for t in tasks},
        "Is our estimate as good as the best rival at equal state": {t: _equal_state(comparison, t) for t in tasks},
        "Is our estimate as good as the best rival at equal time": {t: _equal_time(comparison, t) for t in tasks},
        PPSBN_EFFECT: dict.fromkeys(tasks, comparison.without_ppsbn()),
        VERSUS.format(reference): dict.fromkeys(tasks, of_reference),
    }
    return {
        question: comparison.versus((task, *pair) for task, pairs in by_task.items() for pair in pairs.items())
        for question, by_task in wanted.items()
    }


def _ours(comparison: Comparison, task: str) -> Pairs:
    """Compare at each number of features the formers of either that are best on dev."""
    pairs = {}
    for attn in dict.fromkeys(m[0] for m in comparison.mechanisms if base_name(m[0]) == OURS):
        _, mark, variant = attn.partition(VARIANT_MARK)
        one, other = (
            comparison.best_on_dev(task, [m for m in comparison.mechanisms if m[0] == name])
            for name in (attn, PUBLISHED + mark + variant)
        )
        if one and other:
            pairs[one] = other
    return pairs


def _equal_state(comparison: Comparison, task: str) -> Pairs:
    one = comparison.leading(task, OURS)
    other = comparison.rival_at_equal_state(task, one) if one else None
    return {one: other} if one and other else {}


def _equal_time(comparison: Comparison, task: str) -> Pairs:
    """Take the longest length that was timed, and rivals that need no more time there."""
    one = comparison.leading(task, OURS)
    times = comparison.time_of(one) if one else {}
    longest = max(times, default=0)
    fast = [m for m in comparison.rivals if comparison.time_of(m).get(longest, math.inf) <= times.get(longest, 0.0)]
    other = comparison.best_on_dev(task, fast)
    return {one: other} if one and other else {}


def _values(question: str, row: Versus) -> dict[str, Any]:
    names = ("attn", "dotf", "former", "other", "other_dotf", "other_former")
    return {
        "question": question,
        "task": row.task,
        **dict(zip(names, row.mechanism + row.other, strict=True)),
        **vars(row.difference),
        "p_holm": row.adjusted,
        "significant": row.significant,
    }


def _shown(question: str, row: Versus, comparison: Comparison) -> dict[str, str]:
    found, seeds = row.difference, len(comparison.results.seeds)
    return {
        "question": question,
        "task": row.task,
        **columns(comparison.results.params, row.mechanism),
        "less": label(row.other),
        "difference": show_number(found.estimate, "+z.2f") + (f" ({found.seeds} seeds)" if found.seeds < seeds else ""),
        "interval": show_interval(found.low, found.high),
        "p (Holm)": show_p(row.adjusted) if found.seeds >= LEAST_SEEDS else MISSING,
        "visible": show_number(found.smallest),
        "verdict": _verdict(row, comparison.results.margin),
    }


def _verdict(row: Versus, margin: float) -> str:
    """Say what a difference in points shows."""
    if row.difference.seeds < 2:
        return "one seed"
    equal = row.is_equal(margin)
    if row.significant:
        return ("higher" if row.difference.estimate > 0 else "lower") + (f", but within {margin:g}" if equal else "")
    return f"equal within {margin:g}" if equal else f"open, within {row.difference.margin:.1f}"
