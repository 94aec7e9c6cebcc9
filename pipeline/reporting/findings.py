"""What the numbers say, in sentences made from them, and what they do not show."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._comparison import Comparison, OnTask, compared
from pipeline.reporting._mechanisms import Mechanism, has_ppsbn, label, rows_of
from pipeline.reporting._statistics import LEAST_SEEDS
from pipeline.reporting._table import Text
from pipeline.text import counted

_NAMED = 4
"""So many mechanisms are listed by name; of more, the number is given."""


class Findings(Report):
    """One paragraph for what is shown, one for what is not."""

    title = "Findings"
    order = 0

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Text]:
        comparison = compared(frame, setting)
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
        yield f"{start}, told apart from {'the other one' if len(others) == 1 else f'all {len(others)} others'}."
    elif len(tied) == len(others):
        yield f"{start}, but not told apart from {'the other one' if len(others) == 1 else 'any other'}."
    else:
        yield f"{start}; it is not told apart from {_listed(tied)}, but from {_others(len(others) - len(tied))}."
    never = [mechanism for mechanism in on_task.means if comparison.never_passed(task, mechanism)]
    rule = comparison.best_rule(task)
    if rule is not None and never:
        who = "no mechanism" if len(never) == len(on_task.means) else f"no seed of {_listed(never)}"
        yield (
            f"{task}: {who} passed the rule “{rule.name}”, which scores {rule.accuracy:.1f} % without a model: such an "
            "accuracy is no sign of having learned more."
        )
    elif rule is not None:
        yield f"{task}: every mechanism passed the best rule that needs no model ({rule.name}, {rule.accuracy:.1f} %)."


def _others(count: int) -> str:
    return "the other one" if count == 1 else f"the other {count}"


def _attention_matters(comparison: Comparison) -> Iterator[str]:
    rows = comparison.planned(comparison.setting.reference)
    for row in rows:
        found = row.difference
        pair = f"{row.task}: {label(row.mechanism)} less {label(row.other)} is {found.estimate:+.1f} points"
        interval = f"(95 %: {found.low:+.1f} to {found.high:+.1f})"
        if found.seeds < 2:
            yield f"{pair}, of one seed."
        elif row.apart:
            yield f"{pair} {interval}: it matters where one attends."
        else:
            among = f", one of {len(rows)} such comparisons," if len(rows) > 1 else ""
            yield f"{pair} {interval}{among} which may be luck: that it matters where one attends is not shown."


def _on_ppsbn(comparison: Comparison) -> Iterator[str]:
    rows = comparison.ppsbn()
    if not rows:
        return
    apart = [row for row in rows if row.apart]
    for row in apart[:_NAMED]:
        change = "raises" if row.difference.estimate > 0 else "lowers"
        yield f"{row.task}: ppSBN {change} {label(row.other)} by {abs(row.difference.estimate):.1f} points."
    kept = len(rows) - len(apart)
    more = f", of which {len(apart)} are told apart" if apart else ", none of which is told apart"
    yield f"ppSBN: {counted(len(rows), 'comparison')} with and without{more}; {kept} may be luck."


def _open(comparison: Comparison, on_task: OnTask) -> Iterator[str]:
    task, setting = on_task.task, comparison.setting
    judged = {pair: found for pair, found in on_task.differences.items() if found.seeds > 1}
    if judged:
        apart = sum(on_task.apart[pair] for pair in judged)
        equal = sum(not on_task.apart[pair] and found.margin < setting.margin for pair, found in judged.items())
        smallest = float(np.median([found.smallest for found in judged.values()]))
        examples = next(scores.shares.shape[1] for key, scores in setting.scores.items() if key[0] == task)
        yield (
            f"{task}: of {counted(len(judged), 'pair')} {apart} are told apart, {equal} are equal within "
            f"{setting.margin:g} point{'' if setting.margin == 1 else 's'}, and {len(judged) - apart - equal} stay "
            f"open. With these seeds and {examples:,} test examples a true difference has to be about {smallest:.1f} "
            "points to be seen in four of five cases, before any correction."
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
        yield "There is one seed: no difference can be told from luck."
    elif seeds < LEAST_SEEDS:
        yield f"{seeds} seeds are too few for p-values; intervals are wide, and what is not told apart may yet differ."
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
    if not setting.bench:
        yield "There is no benchmark: nothing is said about time and memory."
    frame = comparison.frame
    if setting.tasks and rows_of(frame[frame.quantity == "test_accuracy"], (setting.reference,)).empty:
        yield f"{setting.reference}, which the others would be compared with, is not in the grid."


def _confounded(comparison: Comparison) -> list[Mechanism]:
    """Mechanisms whose reference has another former than they have."""
    found = comparison.others_of(comparison.setting.reference)
    return [mechanism for mechanism, other in found.items() if has_ppsbn(mechanism[2]) != has_ppsbn(other[2])]


def _listed(found: Sequence[Mechanism]) -> str:
    names = [label(mechanism) for mechanism in found[:_NAMED]]
    more = len(found) - len(names)
    return _joined([*names, *([f"{more} more"] if more else [])])


def _joined(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
