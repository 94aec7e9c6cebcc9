"""Answers to the questions that a reader has, each computed, in whatever sign the numbers have."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from pipeline.reporting._comparison import CONTROL, Comparison, Versus
from pipeline.reporting._mechanisms import Mechanism, label, rows_of
from pipeline.reporting._results import CELL, Results
from pipeline.reporting._table import Table, show_interval, show_number
from pipeline.reporting.cost import leads_from
from pipeline.reporting.trained import EXACT as UNCHANGED
from pipeline.reporting.trained import measured
from schoenbat.registry import VARIANT_MARK, base_name

PUBLISHED, OURS, EXACT = "rmfa", "rmfa-sketch", "kernelized"
PPSBN, PLAIN = "maclauformer", "transformer"
TIMED = "forward+backward"

Pairs = Mapping[Mechanism, Mechanism]


def answers(comparison: Comparison) -> Iterator[str]:
    """Yield one sentence for each question and task; "the data cannot say" where nothing was compared."""
    questions = {
        "Does it matter where one attends": _matters(comparison),
        "Is the published form as good as softmax": _published(comparison),
        "Is our estimate better than the published one at equal features": _ours(comparison),
        "Is our estimate as good as the best rival at equal state": _equal_state(comparison),
        "Is our estimate as good as the best rival at equal time": _equal_time(comparison),
    }
    for question, by_task in questions.items():
        yield from _sentences(comparison, question, by_task)
    yield from _ppsbn(comparison)
    yield from _faster(comparison)
    yield from _advice(comparison)


def answers_on_trained(results: Results) -> Iterator[str]:
    """Yield for each trained model what is left of it by the best of our settings, and by the best of the others."""
    cells = results.params.trained.cells
    for model in results.params.trained.model:
        if f"{model}-{UNCHANGED}" not in results.replaced:
            continue
        values = measured(model, results).set_index("cell")
        what = "loss" if "loss" in values else "cosine"
        ours = [name for name in values.index if (cells[name].estimate or cells[name].share) and not cells[name].bare]
        learned = [name for name in ours if cells[name].fit or cells[name].rank]
        kinds = {
            "of ours without training": [name for name in ours if name not in learned],
            "of ours with fitted kernels or updates": learned,
            "of the others": [name for name in values.index if name not in (*ours, f"{model}-{UNCHANGED}")],
        }
        found = []
        for kind, names in kinds.items():
            if names:
                ordered = values.loc[names].sort_values(what, ascending=what == "loss")
                best = ordered.iloc[0]
                away = show_interval(best[f"{what}_low"], best[f"{what}_high"], "+z.3f")
                found.append(f"the best {kind}, {ordered.index[0].partition('-')[2]}, has {best[what]:.3f} ({away})")
        told = "; ".join(found) or "nothing was measured but exact attention"
        yield f"What {what} is left when the attention of {model} is replaced (less exact, 95 %)? {told}."


def leading(comparison: Comparison, task: str, attn: str, formers: tuple[str, ...] = ()) -> Mechanism | None:
    """Return the variant of `attn` that has the highest accuracy on dev, of these formers if any are given."""
    return _best_on_dev(
        comparison,
        task,
        [m for m in comparison.mechanisms if base_name(m[0]) == attn and (not formers or m[2] in formers)],
    )


def rivals(comparison: Comparison) -> list[Mechanism]:
    """Return the mechanisms that are neither exact, nor uniform, nor of this project."""
    known = {comparison.results.reference, CONTROL, EXACT, PUBLISHED, OURS}
    return [m for m in comparison.mechanisms if base_name(m[0]) not in known]


def state_of(comparison: Comparison, task: str, mechanism: Mechanism) -> float:
    """Return the bytes of its state, NaN where attention is not causal."""
    cells = rows_of(comparison.results.cells, mechanism)
    return float(cells[cells.task == task].state_bytes.max())


def best_rival(comparison: Comparison, task: str, most_bytes: float = math.inf) -> Mechanism | None:
    """Return the rival with the highest accuracy on dev among those whose state is no larger."""
    fitting = [m for m in rivals(comparison) if most_bytes == math.inf or state_of(comparison, task, m) <= most_bytes]
    return _best_on_dev(comparison, task, fitting)


def steps_of(comparison: Comparison, task: str, mechanism: Mechanism) -> tuple[int, bool]:
    """Return the steps trained, and whether a seed was best at its last evaluation with room to rise on dev."""
    results = comparison.results
    curves = rows_of(results.curves[results.curves.task == task], mechanism)
    cells = rows_of(results.cells[results.cells.task == task], mechanism).set_index(CELL)
    last = curves.groupby(CELL).step.max()
    at_end = cells.best_step.reindex(last.index) == last
    rising = at_end & (100 - 100 * cells.dev_accuracy.reindex(last.index) > results.margin)
    return int(last.max()), bool(rising.any())


def time_of(comparison: Comparison, mechanism: Mechanism) -> dict[int, float]:
    """Return its time of a training pass relative to torch's attention, by length; empty where it is not timed."""
    rows = _timed(comparison, base_name(mechanism[0]), mechanism[1])
    if features := features_of(comparison, mechanism):
        rows = rows[rows.num_features == features]
    return dict(zip(rows.length, 1 / rows.speedup_vs_sdpa, strict=True))


def _timed(comparison: Comparison, attn: str, dotf: str) -> pd.DataFrame:
    """Return the timings of a training pass, causal where the cells of the profile are, at the first features."""
    results = comparison.results
    direction = f"causal {TIMED}" if results.cells.state_bytes.notna().any() else TIMED
    bench = results.first_timings()
    return bench[(bench.attn == attn) & (bench.dotf == dotf) & (bench.direction == direction)]


def features_of(comparison: Comparison, mechanism: Mechanism) -> int:
    """Return `num_features` of a mechanism, 0 where it is not set."""
    options = comparison.results.params.attention.get(mechanism[0], {})
    return int(options.get("num_features") or 0)


def gain_of(comparison: Comparison, former: str) -> float:
    """Return what a former multiplies the kernel's argument by."""
    return comparison.results.params.former[former].gain


def _best_on_dev(comparison: Comparison, task: str, among: list[Mechanism]) -> Mechanism | None:
    tested = [m for m in among if (task, m) in comparison.results.scores]
    cells = comparison.results.cells[comparison.results.cells.task == task]
    return max(tested, key=lambda m: rows_of(cells, m).dev_accuracy.mean(), default=None)


def _versus(comparison: Comparison, wanted: Mapping[str, Pairs]) -> dict[str, list[Versus]]:
    """Compare on each task what is wanted there; one family by Holm."""
    rows = comparison.versus_on((task, one, other) for task, pairs in wanted.items() for one, other in pairs.items())
    return {task: [row for row in rows if row.task == task] for task in wanted}


def _matters(comparison: Comparison) -> dict[str, list[Versus]]:
    reference = comparison.results.reference
    pairs = {m: o for m, o in comparison.others_of(CONTROL).items() if m[0] == reference and m[2] == o[2]}
    return _versus(comparison, dict.fromkeys(comparison.tasks, pairs))


def _published(comparison: Comparison) -> dict[str, list[Versus]]:
    """Take the published estimate with its normalisation, of most features."""
    others = comparison.others_of(comparison.results.reference)
    published = [m for m in others if base_name(m[0]) == PUBLISHED and m[2] == PPSBN]
    one = max(published, key=lambda mechanism: features_of(comparison, mechanism), default=None)
    return _versus(comparison, dict.fromkeys(comparison.tasks, {one: others[one]} if one else {}))


def _ours(comparison: Comparison) -> dict[str, list[Versus]]:
    """Compare at each number of features the formers of either that are best on dev."""
    wanted: dict[str, dict[Mechanism, Mechanism]] = {}
    for task in comparison.tasks:
        pairs = wanted.setdefault(task, {})
        for attn in dict.fromkeys(m[0] for m in comparison.mechanisms if base_name(m[0]) == OURS):
            _, mark, variant = attn.partition(VARIANT_MARK)
            one, other = (
                _best_on_dev(comparison, task, [m for m in comparison.mechanisms if m[0] == name])
                for name in (attn, PUBLISHED + mark + variant)
            )
            if one and other:
                pairs[one] = other
    return _versus(comparison, wanted)


def _equal_state(comparison: Comparison) -> dict[str, list[Versus]]:
    wanted: dict[str, Pairs] = {}
    for task in comparison.tasks:
        one = leading(comparison, task, OURS)
        other = best_rival(comparison, task, state_of(comparison, task, one)) if one else None
        wanted[task] = {one: other} if one and other and state_of(comparison, task, one) > 0 else {}
    return _versus(comparison, wanted)


def _equal_time(comparison: Comparison) -> dict[str, list[Versus]]:
    """Take the longest length that was timed, and rivals that need no more time there."""
    wanted: dict[str, Pairs] = {}
    for task in comparison.tasks:
        one = leading(comparison, task, OURS)
        times = time_of(comparison, one) if one else {}
        most = times.get(max(times, default=0), 0.0)
        length = max(times, default=0)
        fast = [m for m in rivals(comparison) if time_of(comparison, m).get(length, math.inf) <= most]
        other = _best_on_dev(comparison, task, fast)
        wanted[task] = {one: other} if one and other else {}
    return _versus(comparison, wanted)


def _sentences(comparison: Comparison, question: str, by_task: Mapping[str, list[Versus]]) -> Iterator[str]:
    for task, rows in by_task.items():
        if not rows:
            yield f"{question}? {task}: the data cannot say, nothing of the kind was compared."
        for row in rows:
            yield f"{question}? {task}: {describe(comparison, row)}."


def describe(comparison: Comparison, row: Versus) -> str:
    """Say how far a mechanism is from another: equal within the margin, above, below, or not decided."""
    found, margin = row.difference, comparison.results.margin
    one, other = label(row.mechanism), label(row.other)
    points = f"{show_number(abs(found.estimate), 'z.1f')} points"
    if found.seeds < 2:
        return f"the data cannot say; {one} and {other} differ by {points} in one seed"
    interval = f"(95 %: {show_interval(found.low, found.high, '+z.1f')})"
    if row.is_equal(margin):
        return f"{one} is equal to {other} within {margin:g} point{'' if margin == 1 else 's'} {interval}"
    if not row.significant:
        return f"the data cannot say; {one} and {other} differ by {points} {interval}, which is not significant"
    lower = row.other if found.estimate > 0 else row.mechanism
    steps, rising = steps_of(comparison, row.task, lower)
    so_far = f", after {steps:,} steps"
    if comparison.never_passed(row.task, lower):
        so_far += f", by which no seed of {label(lower)} had passed the best rule without a model"
    elif rising:
        so_far += f", still rising: {label(lower)} learns more slowly"
    return f"{one} is {'above' if found.estimate > 0 else 'below'} {other} by {points} {interval}{so_far}"


def _ppsbn(comparison: Comparison) -> Iterator[str]:
    """Count for each gain what ppSBN raises and lowers, and name the largest effect of either sign."""
    rows = comparison.versus(comparison.without_ppsbn())
    if not rows:
        yield "What does ppSBN do? The data cannot say: nothing ran both with it and without."
    for task, former in dict.fromkeys((row.task, row.mechanism[2]) for row in rows):
        own = [row for row in rows if (row.task, row.mechanism[2]) == (task, former)]
        equal = [row for row in own if row.is_equal(comparison.results.margin)]
        found = [row for row in own if row.significant and row not in equal]
        gain = gain_of(comparison, former)
        higher, lower = ([row for row in found if (row.difference.estimate > 0) == up] for up in (True, False))
        rest = len(own) - len(found) - len(equal)
        named = [max(rows, key=lambda row: abs(row.difference.estimate)) for rows in (higher, lower) if rows]
        named = named or equal[:1]
        most = "".join(f"; {describe(comparison, row)}" for row in named)
        yield (
            f"What does ppSBN do with gain {gain:g}? {task}: of {len(own)} with and without it, {len(higher)} are "
            f"higher with it, {len(lower)} lower, {len(equal)} equal, {rest} not decided{most}."
        )


def _faster(comparison: Comparison) -> Iterator[str]:
    question = "When is it faster than exact attention"
    kernels = dict.fromkeys(
        (base_name(m[0]), m[1]) for m in comparison.mechanisms if base_name(m[0]) in (PUBLISHED, OURS)
    )
    timed = {kernel: rows for kernel in kernels if len(rows := _timed(comparison, *kernel))}
    for kernel, rows in timed.items():
        ratios = (1 / rows.speedup_vs_sdpa).tolist()
        start, longest = leads_from(rows.length.tolist(), ratios), rows.length.max()
        when = f"from {start:,.0f} tokens on" if start else "at every length timed"
        yield (
            f"{question}? {label(kernel)} with {rows.num_features.iloc[0]} features, {rows.direction.iloc[0]}: "
            f"{'never' if math.isinf(start) else when}; at {longest:,} tokens it takes {ratios[-1]:.2f} times the time "
            "of torch's attention."
        )
    if not timed:
        yield f"{question}? The data cannot say: it was not timed."


def _advice(comparison: Comparison) -> Iterator[str]:
    """Name the mechanism with the least state among those that are equal to the reference within the margin."""
    question, reference = "What should I use", comparison.results.reference
    rows = comparison.versus(comparison.others_of(reference))
    for task in comparison.tasks:
        equal = [row.mechanism for row in rows if row.task == task and row.is_equal(comparison.results.margin)]
        sizes = {m: size for m in equal if not math.isnan(size := state_of(comparison, task, m))}
        if all(comparison.never_passed(task, mechanism) for mechanism in comparison.tasks[task].means):
            answer = "the data cannot say; no mechanism passed the best rule without a model"
        elif not equal:
            answer = f"{reference}; nothing is shown to be equal to it within the margin"
        elif sizes:
            least = min(sizes, key=lambda m: sizes[m])
            answer = (
                f"{label(least)}, with {sizes[least]:,.0f} bytes the least state of {len(equal)} equal to {reference}"
            )
        else:
            answer = f"any of the {len(equal)} that are equal to {reference}, the fastest at your length"
        yield f"{question}? {task}: {answer}."


def roles(comparison: Comparison, task: str) -> dict[str, Mechanism]:
    """Return the mechanisms that a reader compares first, by what they stand for; each at its best variant on dev."""
    ours = leading(comparison, task, OURS)
    found = {
        "softmax": leading(comparison, task, comparison.results.reference),
        "uniform": leading(comparison, task, CONTROL),
        "exact kernel": leading(comparison, task, EXACT),
        "as published": leading(comparison, task, PUBLISHED, (PPSBN,)) or leading(comparison, task, PUBLISHED),
        "ours": ours,
        "window": leading(comparison, task, "window"),
        "best rival": best_rival(comparison, task),
        "best rival at our state": best_rival(comparison, task, state_of(comparison, task, ours)) if ours else None,
    }
    return {role: mechanism for role, mechanism in found.items() if mechanism}


def summary(comparison: Comparison, task: str) -> Table:
    """Return at most eight rows: what is compared first, by accuracy, with its cost."""
    rows: list[dict[str, Any]] = []
    for role, mechanism in roles(comparison, task).items():
        scores, times = comparison.results.scores_of(task, mechanism), time_of(comparison, mechanism)
        steps, rising = steps_of(comparison, task, mechanism)
        has_ppsbn = base_name(mechanism[2]) == PPSBN
        row: dict[str, Any] = {
            "role": role,
            "method": label((base_name(mechanism[0]), mechanism[1])),
            "features": features_of(comparison, mechanism) or "",
            "ppSBN": "yes" if has_ppsbn else "no",
            "gain": gain_of(comparison, mechanism[2]) if has_ppsbn else "",
            "accuracy": scores.mean,
            "std": scores.std if len(scores.seeds) > 1 else math.nan,
            "steps": steps,
            "rising": rising,
            "state_bytes": state_of(comparison, task, mechanism),
        }
        rows.append(row | {f"time at {length}": times.get(length, math.nan) for length in _lengths(comparison)})
    values = pd.DataFrame(rows).sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)
    spread = values["std"].map(lambda value: "" if math.isnan(value) else f" ± {value:.1f}")
    shown = pd.DataFrame({name: values[name].astype(str) for name in ("role", "method", "features", "ppSBN")})
    shown["gain"] = values.gain.map(lambda gain: f"{gain:g}" if gain else "")
    shown["accuracy"] = values.accuracy.map(lambda value: show_number(value, "z.1f")) + spread
    shown["steps"] = [
        f"{steps:,}{', rising' * rising}" for steps, rising in zip(values.steps, values.rising, strict=True)
    ]
    shown["state"] = values.state_bytes.map(lambda size: show_number(size, ",.0f"))
    for length in _lengths(comparison):
        shown[f"time at {length:,}"] = values[f"time at {length}"].map(show_number)
    return Table(
        name=f"summary-{task}",
        title=f"What to compare first on {task}",
        values=values,
        shown=shown,
        caption=(
            "Accuracy in percent; each at the variant that is best on dev. Rising: a seed was best at its last "
            "evaluation. State in bytes. Time of a training pass relative to torch's attention."
        ),
        provenance=comparison.results.caption([task]),
    )


def _lengths(comparison: Comparison) -> list[int]:
    """Return the two longest lengths that were timed."""
    return sorted(comparison.results.bench.length.unique().tolist())[-2:]
