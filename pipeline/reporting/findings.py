"""What the numbers say, in sentences made from them, and what they do not show."""

from collections.abc import Iterable, Iterator

import numpy as np

from pipeline.host.text import counted
from pipeline.reporting import Report
from pipeline.reporting._answers import answers, answers_on_trained, roles, summary
from pipeline.reporting._comparison import Comparison, OnTask
from pipeline.reporting._mechanisms import label
from pipeline.reporting._results import CELL
from pipeline.reporting._statistics import LEAST_SEEDS
from pipeline.reporting._table import Table, Text

_NAMED = 4
"""So many mechanisms are listed by name; of more, the number is given."""


class Findings(Report):
    """One paragraph for what is shown, one for what is not."""

    title = "Findings"
    order = 0

    def make(self, comparison: Comparison) -> Iterator[Text | Table]:
        results = comparison.results
        if results.cells.empty and not results.replaced:
            return
        shown = [*answers_on_trained(results), *(answers(comparison) if results.scores else ())]
        shown += [line for task, on_task in comparison.tasks.items() for line in _on_task(comparison, task, on_task)]
        shown = shown or ["Nothing yet: no cell is finished."]
        yield Text("What the numbers show", tuple(shown), "findings")
        for task in comparison.tasks:
            if roles(comparison, task):
                yield summary(comparison, task)
        if not results.cells.empty:
            missing = [line for task, on_task in comparison.tasks.items() for line in _open(comparison, task, on_task)]
            yield Text("What they do not show", (*_in_general(comparison), *missing), "limits")


def _on_task(comparison: Comparison, task: str, on_task: OnTask) -> Iterator[str]:
    best = on_task.best
    if best is None:
        return
    others = len(on_task.means) - 1
    start = f"{task}: {label(best)} is highest with {on_task.means[best]:.1f} %"
    tied = [mechanism for mechanism in on_task.leaders() if mechanism != best]
    if not others:
        yield f"{start}; nothing else is finished."
    elif not tied:
        yield f"{start}, significantly above {'the other one' if others == 1 else f'all {others} others'}."
    elif len(tied) == others:
        yield f"{start}, not significantly above {'the other one' if others == 1 else 'any other'}."
    else:
        rest = others - len(tied)
        above = "the other one" if rest == 1 else f"the other {rest}"
        yield f"{start}: significantly above {above}, not significantly above {_joined(map(label, tied))}."
    yield from _on_baseline(comparison, task, on_task)


def _on_baseline(comparison: Comparison, task: str, on_task: OnTask) -> Iterator[str]:
    """Say which mechanisms passed the best baseline with no seed, and which with some only."""
    baseline = comparison.best_baseline(task)
    if baseline is None:
        return
    steps = {mechanism: comparison.steps_to_pass(task, mechanism) for mechanism in on_task.means}
    passed = {mechanism: int(np.isfinite(found).sum()) for mechanism, found in steps.items()}
    never = [label(mechanism) for mechanism in on_task.means if comparison.never_passed(task, mechanism)]
    partly = [mechanism for mechanism, found in passed.items() if 0 < found < len(steps[mechanism])]
    counts = [f"{label(m)} ({passed[m]} of {len(steps[m])})" for m in sorted(partly, key=lambda m: passed[m])]
    named = "“{}”, which scores {:.1f} % without a model".format(*baseline)
    if never:
        who = "no mechanism" if len(never) == len(on_task.means) else f"no seed of {_joined(never)}"
        yield f"{task}: {who} passed the baseline {named}: such an accuracy is no sign of having learned more."
    if counts:
        yield f"{task}: only some seeds of {_joined(counts)} passed the baseline {named}."
    if not never and not counts:
        yield f"{task}: every seed of every mechanism passed the baseline {named}."


def _open(comparison: Comparison, task: str, on_task: OnTask) -> Iterator[str]:
    margin = comparison.results.margin
    judged = [row for row in on_task.pairs if row.difference.seeds > 1]
    if judged:
        significant = sum(row.significant for row in judged)
        equal = sum(not row.significant and row.is_equal(margin) for row in judged)
        smallest = float(np.median([row.difference.smallest for row in judged]))
        examples = comparison.results.scores[task, judged[0].mechanism].shares.shape[1]
        yield (
            f"{task}: of {counted(len(judged), 'pair')} {significant} differ significantly, {equal} are equal within "
            f"{margin:g} point{'' if margin == 1 else 's'}, and "
            f"{len(judged) - significant - equal} stay open. With these seeds and {examples:,} test examples a true "
            f"difference has to be about {smallest:.1f} points to be seen in four of five cases, before any correction."
        )
    curves, cells = (frame[frame.task == task] for frame in (comparison.results.curves, comparison.results.cells))
    last = curves.groupby(CELL).step.max()
    rising = int((cells.set_index(CELL).best_step.reindex(last.index) == last).sum())
    if rising:
        yield (
            f"{task}: {rising} of {counted(len(last), 'cell')} were best at their last evaluation and may not have "
            "stopped learning."
        )


def _in_general(comparison: Comparison) -> Iterator[str]:
    results = comparison.results
    seeds, cells = len(results.seeds), results.num_cells
    if seeds < 2:
        yield "There is one seed: no difference can be tested."
    elif seeds < LEAST_SEEDS:
        yield f"{seeds} seeds are too few for p-values; intervals are wide, and what is not significant may yet differ."
    others = comparison.others_of(results.reference)
    confounded = [label(mechanism) for mechanism, other in others.items() if mechanism[2] != other[2]]
    if confounded:
        yield (
            f"{results.reference} did not run with the same ppSBN as {_joined(confounded)}: their difference from it "
            "is that of ppSBN, too."
        )
    if results.num_finished < cells:
        yield f"{cells - results.num_finished} of {counted(cells, 'cell')} are not finished."
    if results.unavailable:
        yield f"There are no prepared data, and so no results, for {', '.join(results.unavailable)}."
    if len(results.tasks) == 1:
        yield "There is one task: nothing is said about others."
    if results.bench.empty:
        yield "There is no benchmark: nothing is said about time and memory."
    if results.tasks and results.reference not in set(results.cells.attn):
        yield f"{results.reference}, which the others would be compared with, is not in the grid."


def _joined(words: Iterable[str]) -> str:
    """Return the first words as a list, and how many there are more."""
    named = list(words)
    if len(named) > _NAMED:
        named[_NAMED:] = [f"{len(named) - _NAMED} more"]
    *first, last = named
    return f"{', '.join(first)} and {last}" if first else last
