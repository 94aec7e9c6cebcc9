"""What the numbers say, in sentences made from them, and what they do not show."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pipeline.host.text import counted
from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison, OnTask
from pipeline.reporting._mechanisms import Mechanism, has_ppsbn, label, rows_of
from pipeline.reporting._statistics import LEAST_SEEDS
from pipeline.reporting._table import Text, show_interval, show_number

_NAMED = 4
"""So many mechanisms are listed by name; of more, the number is given."""


class Findings(Report):
    """One paragraph for what is shown, one for what is not."""

    title = "Findings"
    order = 0

    def make(self, comparison: Comparison) -> Iterator[Text]:
        shown = [line for on_task in comparison.tasks.values() for line in _on_task(comparison, on_task)]
        shown += [*_attention_matters(comparison), *_on_ppsbn(comparison)]
        yield Text("What the numbers show", tuple(shown) or ("Nothing yet: no cell is finished.",), "findings")
        missing = [line for on_task in comparison.tasks.values() for line in _open(comparison, on_task)]
        yield Text("What they do not show", tuple([*_in_general(comparison), *missing]), "limits")


def _on_task(comparison: Comparison, on_task: OnTask) -> Iterator[str]:
    task, best = on_task.task, on_task.best()
    if best is None:
        return
    others = [mechanism for mechanism in on_task.means if mechanism != best]
    start = f"{task}: {label(best)} is highest with {on_task.means[best]:.1f} %"
    tied = [mechanism for mechanism in on_task.leaders() if mechanism != best]
    if not others:
        yield f"{start}; nothing else is finished."
    elif not tied:
        yield f"{start}, significantly above {'the other one' if len(others) == 1 else f'all {len(others)} others'}."
    elif len(tied) == len(others):
        yield f"{start}, not significantly above {'the other one' if len(others) == 1 else 'any other'}."
    else:
        rest = _others(len(others) - len(tied))
        yield f"{start}: significantly above {rest}, not significantly above {_listed(tied)}."
    yield from _on_baseline(comparison, on_task)


def _on_baseline(comparison: Comparison, on_task: OnTask) -> Iterator[str]:
    """Say which mechanisms passed the best baseline with no seed, and which with some only."""
    task, baseline = on_task.task, comparison.best_baseline(on_task.task)
    if baseline is None:
        return
    never = [mechanism for mechanism in on_task.means if comparison.never_passed(task, mechanism)]
    steps = {mechanism: comparison.steps_to_pass(task, mechanism) for mechanism in on_task.means}
    passed = {mechanism: (int(np.isfinite(found).sum()), len(found)) for mechanism, found in steps.items()}
    partly = sorted((m for m, (some, every) in passed.items() if 0 < some < every), key=lambda m: passed[m][0])
    named = f"“{baseline.name}”, which scores {baseline.accuracy:.1f} % without a model"
    if never:
        who = "no mechanism" if len(never) == len(on_task.means) else f"no seed of {_listed(never)}"
        yield f"{task}: {who} passed the baseline {named}: such an accuracy is no sign of having learned more."
    if partly:
        counts = [f"{label(m)} ({passed[m][0]} of {passed[m][1]})" for m in partly[:_NAMED]]
        more = [f"{len(partly) - _NAMED} more"] if len(partly) > _NAMED else []
        yield f"{task}: only some seeds of {_joined([*counts, *more])} passed the baseline {named}."
    if not never and not partly:
        yield f"{task}: every seed of every mechanism passed the baseline {named}."


def _others(count: int) -> str:
    return "the other one" if count == 1 else f"the other {count}"


def _attention_matters(comparison: Comparison) -> Iterator[str]:
    rows = comparison.planned(comparison.setting.reference)
    for row in rows:
        found = row.difference
        one, other = label(row.mechanism), label(row.other)
        points = f"{show_number(abs(found.estimate), '.1f')} points"
        interval = f"(95 %: {show_interval(found.low, found.high, '+.1f')})"
        beats = f"{row.task}: {one} {'beats' if found.estimate > 0 else 'stays below'} {other} by {points}"
        if found.seeds < 2:
            yield f"{beats}, in one seed."
        elif row.significant:
            yield f"{beats} {interval}."
        else:
            among = f", one of {len(rows)} such comparisons" if len(rows) > 1 else ""
            yield f"{row.task}: {one} and {other} differ by {points} {interval}{among}: not significant."


def _on_ppsbn(comparison: Comparison) -> Iterator[str]:
    """Name the largest significant effects of ppSBN, and say how many there are of either sign."""
    rows = comparison.ppsbn()
    if not rows:
        return
    found = sorted((row for row in rows if row.significant), key=lambda row: -abs(row.difference.estimate))
    for row in found[:_NAMED]:
        change = "raises" if row.difference.estimate > 0 else "lowers"
        yield f"{row.task}: ppSBN {change} {label(row.other)} by {abs(row.difference.estimate):.1f} points."
    raised = sum(row.difference.estimate > 0 for row in found)
    yield (
        f"ppSBN: of {counted(len(rows), 'comparison')} with and without it, {raised} are significantly higher with it, "
        f"{len(found) - raised} significantly lower, and {len(rows) - len(found)} not significantly different."
    )


def _open(comparison: Comparison, on_task: OnTask) -> Iterator[str]:
    task, setting = on_task.task, comparison.setting
    judged = {pair: found for pair, found in on_task.differences.items() if found.seeds > 1}
    if judged:
        significant = sum(on_task.significant[pair] for pair in judged)
        equal = sum(not on_task.significant[pair] and found.margin < setting.margin for pair, found in judged.items())
        smallest = float(np.median([found.smallest for found in judged.values()]))
        examples = next(scores.shares.shape[1] for key, scores in setting.scores.items() if key[0] == task)
        yield (
            f"{task}: of {counted(len(judged), 'pair')} {significant} differ significantly, {equal} are equal within "
            f"{setting.margin:g} point{'' if setting.margin == 1 else 's'}, and "
            f"{len(judged) - significant - equal} stay open. With these seeds and {examples:,} test examples a true "
            f"difference has to be about {smallest:.1f} points to be seen in four of five cases, before any correction."
        )
    rising = _still_rising(comparison, task)
    cells = sum(key[0] == task for key in comparison.passed)
    if rising:
        yield (
            f"{task}: {rising} of {counted(cells, 'cell')} were best at their last evaluation and may not have stopped "
            "learning."
        )


def _still_rising(comparison: Comparison, task: str) -> int:
    frame = comparison.frame
    best = frame[(frame.quantity == "best_step") & (frame.task == task)].dropna()
    curves = frame[(frame.quantity == "curve_dev_accuracy") & (frame.task == task)]
    last = curves.groupby(["attn", "dotf", "former", "seed"]).step.max()
    keys = zip(best.attn, best.dotf, best.former, best.seed, strict=True)
    return sum(step == last.get(key) for key, step in zip(keys, best.value, strict=True))


def _in_general(comparison: Comparison) -> Iterator[str]:
    setting = comparison.setting
    seeds = len(setting.seeds)
    if seeds < 2:
        yield "There is one seed: no difference can be tested."
    elif seeds < LEAST_SEEDS:
        yield f"{seeds} seeds are too few for p-values; intervals are wide, and what is not significant may yet differ."
    confounded = _confounded(comparison)
    if confounded:
        yield (
            f"{setting.reference} did not run with the same ppSBN as {_listed(confounded)}: their difference from it "
            "is that of ppSBN, too."
        )
    if setting.num_finished < setting.num_cells:
        yield f"{setting.num_cells - setting.num_finished} of {counted(setting.num_cells, 'cell')} are not finished."
    if setting.unavailable:
        yield f"There are no prepared data, and so no results, for {', '.join(setting.unavailable)}."
    if len(setting.tasks) == 1:
        yield "There is one task: nothing is said about others."
    if not setting.bench.circumstances:
        yield "There is no benchmark: nothing is said about time and memory."
    frame = comparison.frame
    if setting.tasks and rows_of(frame[frame.quantity == "test_accuracy"], (setting.reference,)).empty:
        yield f"{setting.reference}, which the others would be compared with, is not in the grid."


def _confounded(comparison: Comparison) -> list[Mechanism]:
    """Return mechanisms whose reference has another former than they have."""
    found = comparison.others_of(comparison.setting.reference)
    return [mechanism for mechanism, other in found.items() if has_ppsbn(mechanism[2]) != has_ppsbn(other[2])]


def _listed(found: Sequence[Mechanism]) -> str:
    names = [label(mechanism) for mechanism in found[:_NAMED]]
    more = len(found) - len(names)
    return _joined([*names, *([f"{more} more"] if more else [])])


def _joined(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
