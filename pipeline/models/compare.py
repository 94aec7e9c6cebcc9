"""Two profiles, git revisions or cells side by side: what they are made from, and every number with its significance.

A difference is B less A, paired by seed: at one seed all mechanisms start from the same weights and see the same
batches. Where both have the predictions of the same test examples, p of the test accuracy is the report's
(`pipeline.reporting._statistics`), and with one seed that of McNemar's exact test on the examples. Other scores, and
accuracies without predictions, are tested by a paired t-test over seeds. All p are corrected together by Holm's method.
"""

import dataclasses
import io
import json
import subprocess
import tarfile
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from tabulate import tabulate

from pipeline.grid.axes import Cell
from pipeline.grid.results import CellResults, Metrics, trained_cells
from pipeline.grid.settings import PARAMS_FILE, flat, read_yaml
from pipeline.host.files import git, read_json
from pipeline.host.text import counted
from pipeline.models.trained import current_profile
from pipeline.reporting._statistics import LEVEL, Scores, holm, paired_differences
from pipeline.reporting._table import show_number, show_p
from schoenbat.errors import UserError, list_choices
from schoenbat.lra.training import Predictions, load_model

HERE = "."
"""Stands for the working folder as it is."""
_COLUMNS = 80
_UNCOMPARED = ("profile", "note", "grid")
_SCORES = {"test accuracy": 2, "test loss": 4, "dev accuracy": 2, "dev loss": 4}
_DECIMALS = _SCORES | {"best step": 0, "parameters": 0, "training seconds": 1}
"""Of each figure; only scores are tested."""
_TESTS = (
    "p of a test accuracy: over seeds and test examples together, as in the report, or over the examples with one "
    "seed; else a paired t-test over the seeds that both have"
)


class Result(NamedTuple):
    """What one cell has given; its figures by name, those that it has."""

    metrics: Metrics
    figures: Mapping[str, float]
    predictions: Predictions | None


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        what: in words.
        settings: the leaves of params.yaml, or of the sections of a cell, by dotted keys.
        data: of each task, what it is and its fingerprint.
        revisions: of git, at which the results were made, or that the side is.
    """

    what: str
    settings: Mapping[str, Any]
    data: Mapping[str, str]
    revisions: Sequence[str]
    results: Mapping[Cell, Result]


def run(a: str, b: str, *, as_json: bool) -> None:
    """Print the comparison of two profiles, git revisions or cells; "." is the working folder."""
    with ExitStack() as stack:
        found = compare(_side(a, stack), _side(b, stack))
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))


def compare(a: Side, b: Side) -> dict[str, Any]:
    """Return all that differs, and every number that both have, as plain values.

    `code_differs` tells whether a cell that both have was made by other code; None where there is no such cell.
    """
    common = [(cell, result, b.results[cell]) for cell, result in a.results.items() if cell in b.results]
    pairs: dict[str, list[tuple[Result, Result]]] = {}
    if one_cell := len(a.results) == len(b.results) == 1:
        names = dict.fromkeys(_mechanism(cell) for cell in (*a.results, *b.results))
        pairs[" | ".join(names)] = list(zip(a.results.values(), b.results.values(), strict=True))
    else:
        for cell, *pair in common:
            pairs.setdefault(_mechanism(cell), []).append((pair[0], pair[1]))
    numbers = [number for of, results in pairs.items() for number in _numbers(of, results)]
    tested = [number for number in numbers if number["p"] is not None]
    for number, adjusted in zip(tested, holm([number["p"] for number in tested]), strict=True):
        number["adjusted"] = adjusted
    other_code = [one.metrics.fingerprint.code != other.metrics.fingerprint.code for _, one, other in common]
    return {
        **{key: {"what": side.what, "revisions": list(side.revisions)} for key, side in (("a", a), ("b", b))},
        "settings": _differing(a.settings, b.settings),
        "data": _differing(a.data, b.data),
        "code_differs": any(other_code) if other_code else None,
        "only_a": [] if one_cell else _missing(a, b),
        "only_b": [] if one_cell else _missing(b, a),
        "numbers": numbers,
        "tests": _TESTS,
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return the comparison for people, in at most 80 columns as far as names allow."""
    out = [f"A  {found['a']['what']}", f"B  {found['b']['what']}", ""]
    for title in ("settings", "data"):
        out.append(f"{title.capitalize()}: {'what differs' if found[title] else 'the same'}")
        for key, sides in found[title].items():
            shown = ("-" if sides[side] is None else str(sides[side]) for side in ("a", "b"))
            a, b = (text if len(text) <= 70 else f"{text[:69]}\N{HORIZONTAL ELLIPSIS}" for text in shown)
            out += [f"  {key}", f"    A  {a}", f"    B  {b}"]
    out += [_code_line(found), ""]
    for of in dict.fromkeys(number["of"] for number in found["numbers"]):
        own = [number for number in found["numbers"] if number["of"] == of]
        seeds = own[0]["seeds"]
        out.append(f"{of}, {f'seed {seeds[0]}' if len(seeds) == 1 else f'mean of {len(seeds)} seeds'}")
        headings = ["", "A", "B", "B - A", "p, corrected"]
        alignment = ["left", "right", "right", "right", "left"]
        rows = [_number_shown(number) for number in own]
        drawn = tabulate(rows, headings, tablefmt="plain", disable_numparse=True, colalign=alignment)
        out += [f"  {line}".rstrip() for line in drawn.splitlines()]
    for name in ("a", "b"):
        out += [f"only in {name.upper()}: {each}" for each in found[f"only_{name}"]]
    if not found["numbers"]:
        return [*out, "no result is in both"]
    significant = sum(number["p"] is not None and number["adjusted"] < LEVEL for number in found["numbers"])
    legend = f"{_TESTS}; Holm's correction over all. Significant at 5 %: {counted(significant, 'difference')}."
    return [*out, "", *textwrap.wrap(legend, _COLUMNS)]


def _side(name: str, stack: ExitStack) -> Side:
    profile = current_profile()
    if name == HERE:
        return _folder_side(f"the working folder, profile {profile}", Path(), profile)
    of_profile, _, cell = name.rpartition("/")
    if cell in trained_cells(of_profile or profile):
        return _cell_side(of_profile or profile, cell)
    if name == profile or trained_cells(name):
        return _folder_side(f"profile {name}", Path(), name)
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if commit is not None:
        return _revision_side(name, commit, stack)
    profiles = {path.name for path in Path("runs").glob("*") if trained_cells(path.name)}
    choices = list_choices(name, [HERE, *sorted(profiles), *trained_cells(profile)])
    raise UserError(f"{name!r} is no profile or cell with results, and no git revision; choose from: {choices}")


def _folder_side(what: str, root: Path, profile: str, revision: str | None = None) -> Side:
    """Return the results under a folder, with the settings of the profile as they are there."""
    results = dict(_result(CellResults(profile, cell, root)) for cell in trained_cells(profile, root))
    settings, kept = read_yaml(root / PARAMS_FILE), Path("profiles", f"{profile}.yaml")
    if settings.get("profile") != profile:
        settings = read_yaml(kept) if kept.is_file() else {}
    summaries = {path.stem: read_json(path) for path in sorted((root / "runs" / profile / "data").glob("*.json"))}
    return Side(
        what,
        flat({key: value for key, value in settings.items() if key not in _UNCOMPARED}),
        {task: f"{summary['label']} ({summary['fingerprint'][:12]})" for task, summary in summaries.items()},
        [revision] if revision else sorted({result.metrics.git_revision for result in results.values()}),
        results,
    )


def _cell_side(profile: str, cell_id: str) -> Side:
    results = CellResults(profile, cell_id)
    cell, result = _result(results)
    settings: dict[str, Any] = dataclasses.asdict(cell)
    if results.best.is_file():
        _, described = load_model(results.best)
        settings = {key: value for key, value in described.items() if key not in ("data", "best_step")}
        settings |= {"former": {"name": cell.former, **described["former"]}}
    data = {cell.task: f"{result.metrics.data} ({result.metrics.fingerprint.data[:12]})"}
    what = f"cell {cell_id} of profile {profile}"
    return Side(what, flat(settings), data, [result.metrics.git_revision], {cell: result})


def _revision_side(name: str, commit: str, stack: ExitStack) -> Side:
    """Return the results of a commit that git has."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    packed = subprocess.run(["git", "archive", commit, str(PARAMS_FILE), "runs"], capture_output=True, check=False)
    if packed.returncode:
        raise UserError(f"git revision {name} has no {PARAMS_FILE} or no results in runs")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(root, filter="data")
    profile = current_profile(root)
    return _folder_side(f"git revision {name} ({commit[:12]}), profile {profile}", root, profile, commit)


def _result(results: CellResults) -> tuple[Cell, Result]:
    metrics, test, resources = results.metrics(), results.test(), results.resources()
    assert metrics is not None
    figures = {"test accuracy": test.accuracy, "test loss": test.loss} if test else {}
    figures |= {"dev accuracy": metrics.best_dev_accuracy, "dev loss": metrics.best_dev_loss}
    figures |= {"best step": metrics.best_step, "parameters": metrics.num_parameters}
    figures |= {"training seconds": resources.seconds} if resources else {}
    cell = Cell(metrics.task, metrics.attn, metrics.dotf, metrics.former, metrics.seed)
    return cell, Result(metrics, figures, results.predictions())


def _mechanism(cell: Cell) -> str:
    return " ".join(filter(None, (cell.task, cell.attn, cell.dotf, cell.former)))


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Return by key what either side has, None for nothing, where that differs."""
    return {key: {"a": a.get(key), "b": b.get(key)} for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}


def _missing(side: Side, other: Side) -> list[str]:
    """Return the mechanisms on tasks, with their seeds, that the other side has not."""
    seeds: dict[str, list[str]] = {}
    for cell in side.results:
        if cell not in other.results:
            seeds.setdefault(_mechanism(cell), []).append(str(cell.seed))
    return [f"{of}, seed {', '.join(found)}" for of, found in seeds.items()]


def _numbers(of: str, pairs: Sequence[tuple[Result, Result]]) -> Iterator[dict[str, Any]]:
    """Yield each figure that both sides have: means over seeds, and p of no difference, None without a test."""
    for name in _DECIMALS:
        both = [(one, other) for one, other in pairs if name in one.figures and name in other.figures]
        if not both:
            continue
        a, b = (np.array([result.figures[name] for result in side]) for side in zip(*both, strict=True))
        same = bool((a == b).all())
        p = _p_of_predictions(both) if name == "test accuracy" else None
        if p is None and name in _SCORES and len(both) > 1:
            # Where all differences are equal, a t-test can say nothing of them.
            p = float(stats.ttest_rel(b, a).pvalue) if np.ptp(b - a) else (1.0 if same else None)
        seeds = [one.metrics.seed for one, _ in both]
        means = {"a": float(a.mean()), "b": float(b.mean()), "difference": float(b.mean() - a.mean())}
        yield {"of": of, "name": name, "seeds": seeds, **means, "p": p, "adjusted": None, "same": same}


def _p_of_predictions(pairs: Sequence[tuple[Result, Result]]) -> float | None:
    """Return p of no difference in test accuracy; None where predictions of the same examples are missing."""
    found = []
    for one, other in pairs:
        a, b = one.predictions, other.predictions
        same = one.metrics.fingerprint.data == other.metrics.fingerprint.data
        if a is None or b is None or not same or not np.array_equal(a.targets, b.targets):
            return None
        found.append((a, b))
    if len(found) > 1:
        of_a, of_b = (Scores.of(dict(enumerate(side))) for side in zip(*found, strict=True))
        return paired_differences({"": (of_a, of_b)})[""].p
    ((a, b),) = found
    if (a.targets != 1).any():
        return None
    apart = (a.correct - b.correct)[a.correct != b.correct]
    return float(stats.binomtest(int((apart > 0).sum()), len(apart)).pvalue) if len(apart) else 1.0


def _code_line(found: Mapping[str, Any]) -> str:
    revisions = [", ".join(found[side]["revisions"]) or "unknown" for side in ("a", "b")]
    if found["code_differs"] is None:
        return f"Code: git revision {' | '.join(revisions)}"
    same = f"{'not ' if found['code_differs'] else ''}the same where cells depend on it"
    return f"Code: {same} (git revision {' | '.join(dict.fromkeys(revisions))}; `git diff` shows it)"


def _number_shown(number: Mapping[str, Any]) -> list[str]:
    """Return a row of the table for people."""
    name, p = number["name"], number["adjusted"]
    factor, unit = (100, " %") if name.endswith("accuracy") else (1, "")
    a, b, difference = (factor * number[key] for key in ("a", "b", "difference"))
    how = f"z,.{_DECIMALS[name]}f"
    sides = [name, show_number(a, how) + unit, show_number(b, how) + unit]
    if number["same"]:
        return [*sides, "the same", ""]
    significance = "" if p is None else show_p(p) + (" *" if p < LEVEL else "")
    return [*sides, show_number(difference, f"+{how}"), significance]
