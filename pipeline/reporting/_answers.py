"""Answers to the questions that a reader has, each computed, in whatever sign the numbers have."""

import math
from collections.abc import Iterator, Sequence

from pipeline.reporting._comparison import Comparison, Versus
from pipeline.reporting._mechanisms import OURS, PUBLISHED, label
from pipeline.reporting._results import Results
from pipeline.reporting._table import show_interval, show_number
from pipeline.reporting.contrasts import PPSBN_EFFECT, VERSUS, contrasts
from pipeline.reporting.cost import leads_from
from pipeline.reporting.trained import EXACT, is_learned, is_ours, measured, quality_of
from schoenbat.registry import base_name

UNLEARNED = "no mechanism passed the best rule without a model"


def answers(comparison: Comparison) -> Iterator[str]:
    """Yield one sentence for each question and task; "the data cannot say" where nothing was compared."""
    versus = VERSUS.format(comparison.results.reference)
    for question, rows in contrasts(comparison).items():
        if question == PPSBN_EFFECT:
            yield from _ppsbn(comparison, rows)
        elif question != versus:
            for task in comparison.tasks:
                told = [describe(comparison, row) for row in rows if row.task == task]
                for answer in told or ["the data cannot say, nothing of the kind was compared"]:
                    yield f"{question}? {task}: {answer}."
        else:
            yield from _faster(comparison)
            yield from _advice(comparison, rows)


def answers_on_trained(results: Results) -> Iterator[str]:
    """Yield for each trained model what is left of it by the best of our settings, and by the best of the others."""
    for model in results.params.trained.model:
        if f"{model}-{EXACT}" not in results.replaced:
            continue
        values = measured(model, results).set_index("cell")
        what = quality_of(values)
        ours = [name for name in values.index if is_ours(results, name)]
        learned = [name for name in ours if is_learned(results, name)]
        kinds = {
            "of ours without training": [name for name in ours if name not in learned],
            "of ours with fitted kernels or updates": learned,
            "of the others": [name for name in values.index if name not in (*ours, f"{model}-{EXACT}")],
        }
        found = []
        for kind, names in kinds.items():
            if names:
                best = values.loc[names[0]]
                away = show_interval(best[f"{what}_low"], best[f"{what}_high"], "+z.3f")
                found.append(f"the best {kind}, {names[0].partition('-')[2]}, has {best[what]:.3f} ({away})")
        told = "; ".join(found) or "nothing was measured but exact attention"
        yield f"What {what} is left when the attention of {model} is replaced (less exact, 95 %)? {told}."


def describe(comparison: Comparison, row: Versus) -> str:
    """Say how far a mechanism is from another: equal within the margin, above, below, or not decided."""
    found, margin = row.difference, comparison.results.margin
    one, other = label(row.mechanism), label(row.other)
    points = f"{show_number(abs(found.estimate), 'z.1f')} points"
    if found.seeds < 2:
        return f"the data cannot say: {one} and {other} differ by {points} in one seed"
    interval = f"(95 %: {show_interval(found.low, found.high, '+z.1f')})"
    if row.is_equal(margin):
        return f"{one} is equal to {other} within {margin:g} point{'' if margin == 1 else 's'} {interval}"
    if not row.significant:
        return f"the data cannot say: {one} and {other} differ by {points} {interval}"
    lower = row.other if found.estimate > 0 else row.mechanism
    steps, rising = comparison.steps_of(row.task, lower)
    way, so_far = "above" if found.estimate > 0 else "below", f"after {steps:,} steps"
    if comparison.never_passed(row.task, lower):
        so_far += f", {label(lower)} not past the best rule without a model"
    elif rising:
        so_far += f", {label(lower)} still rising"
    return f"{one} is {way} {other} by {points} {interval} {so_far}"


def _ppsbn(comparison: Comparison, rows: Sequence[Versus]) -> Iterator[str]:
    """Count for each gain what ppSBN raises and lowers, and name the largest effect of either sign."""
    if not rows:
        yield f"{PPSBN_EFFECT}? The data cannot say: nothing ran both with it and without."
    for task, former in dict.fromkeys((row.task, row.mechanism[2]) for row in rows):
        own = [row for row in rows if (row.task, row.mechanism[2]) == (task, former)]
        equal = [row for row in own if row.is_equal(comparison.results.margin)]
        found = [row for row in own if row.significant and row not in equal]
        higher, lower = ([row for row in found if (row.difference.estimate > 0) == up] for up in (True, False))
        named = [max(rows, key=lambda row: abs(row.difference.estimate)) for rows in (higher, lower) if rows]
        most = "".join(f"; {describe(comparison, row)}" for row in named or equal[:1])
        yield (
            f"{PPSBN_EFFECT} with gain {comparison.results.params.former[former].gain:g}? {task}: of {len(own)} pairs "
            f"with and without it {len(higher)} are higher with it, {len(lower)} lower, {len(equal)} equal, "
            f"{len(own) - len(found) - len(equal)} open{most}."
        )


def _faster(comparison: Comparison) -> Iterator[str]:
    question, found = "When is it faster than exact attention", list(_starts(comparison, PUBLISHED, OURS))
    for name, direction, start, longest, ratio in found:
        when = f"from {start:,.0f} tokens on" if start else "at every length timed"
        yield (
            f"{question}? {name}, {direction}: {'never' if math.isinf(start) else when}; at {longest:,} tokens it "
            f"takes {ratio:.2f} times the time of torch's attention."
        )
    if not found:
        yield f"{question}? The data cannot say: ours was not timed."


def _starts(comparison: Comparison, *methods: str) -> Iterator[tuple[str, str, float, int, float]]:
    """Yield each kernel's name, direction, length from which it is faster, the longest length, its ratio there."""
    kernels = dict.fromkeys((base_name(attn), dotf) for attn, dotf, _ in comparison.mechanisms)
    for attn, dotf in (kernel for kernel in kernels if kernel[0] in methods):
        rows = comparison.timings(attn, dotf)
        if len(rows):
            ratios = (1 / rows.speedup_vs_sdpa).tolist()
            name = f"{label((attn, dotf))} with {rows.num_features.iloc[0]} features"
            start = leads_from(rows.length.tolist(), ratios)
            yield name, rows.direction.iloc[0], start, int(rows.length.max()), ratios[-1]


def _advice(comparison: Comparison, rows: Sequence[Versus]) -> Iterator[str]:
    """Name the mechanism with the least state among those that are equal to the reference within the margin."""
    reference = comparison.results.reference
    for task, tested in comparison.tasks.items():
        equal = [row.mechanism for row in rows if row.task == task and row.is_equal(comparison.results.margin)]
        sizes = {m: size for m in equal if not math.isnan(size := comparison.state_of(task, m))}
        if all(comparison.never_passed(task, mechanism) for mechanism in tested):
            answer = f"the data cannot say, {UNLEARNED}"
        elif not equal:
            answer = f"{reference}; nothing is shown to be equal to it within the margin"
        elif sizes:
            least = min(sizes, key=lambda m: sizes[m])
            told = f"{sizes[least]:,.0f} bytes the least state of {len(equal)} equal to {reference}"
            answer = f"{label(least)}, with {told}"
        else:
            answer = f"any of the {len(equal)} that are equal to {reference}, the fastest at your length"
        yield f"What should I use? {task}: {answer}."


def advice(comparison: Comparison) -> tuple[list[str], list[str]]:
    """Return when our estimate is the right choice, and when it is not, as far as this profile shows it."""
    use: list[str] = []
    avoid: list[str] = []
    results = comparison.results
    for row in contrasts(comparison)[VERSUS.format(results.reference)]:
        if row.mechanism != comparison.leading(row.task, OURS):
            continue
        if comparison.never_passed(row.task, comparison.tasks[row.task][0]):
            avoid.append(f"Your task is like {row.task}: there {UNLEARNED}.")
            continue
        is_enough = row.is_equal(results.margin) or (row.significant and row.difference.estimate > 0)
        told = f"You need the accuracy of {results.reference} on {row.task}: {describe(comparison, row)}."
        (use if is_enough else avoid).append(told)
    for name, direction, start, longest, ratio in _starts(comparison, OURS):
        if math.isinf(start):
            avoid.append(f"Time matters at up to {longest:,} tokens: {name} is not faster ({direction}).")
            continue
        after = f"Texts are longer than {start:,.0f} tokens" if start else "Time matters at any length that was timed"
        use.append(f"{after}: {name} takes {ratio:.2f} of exact attention's time at {longest:,} ({direction}).")
        if start:
            avoid.append(f"Texts are shorter than {start:,.0f} tokens: exact attention is faster.")
    for model in results.params.trained.model:
        if f"{model}-{EXACT}" in results.replaced:
            _advise_on(model, results, use, avoid)
    return use, avoid


def _advise_on(model: str, results: Results, use: list[str], avoid: list[str]) -> None:
    """Say at which lengths the best of our settings without training is faster, and what it costs."""
    values = measured(model, results).set_index("cell")
    what = quality_of(values)
    ours = [name for name in values.index if is_ours(results, name) and not is_learned(results, name)]
    if not ours:
        return
    best = values.loc[ours[0]]
    loss = f"{what} {show_interval(best[f'{what}_low'], best[f'{what}_high'], '+z.3f')}"
    times = {length: best.get(f"of_sdpa_{length}", math.nan) for length in results.params.trained.lengths}
    for lines, is_faster in ((use, True), (avoid, False)):
        told = [f"{time:.2f} at {n:,} tokens" for n, time in times.items() if (time < 1 if is_faster else time >= 1)]
        if told:
            lines.append(
                f"{model}, {ours[0].partition('-')[2]}: the time of exact attention times {', '.join(told)}; {loss}."
            )
