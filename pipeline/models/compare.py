"""Two profiles, git revisions or cells side by side: what they are made from, and every number with its significance.

A difference is B less A, paired by seed: at one seed all mechanisms start from the same weights and see the same
batches. Where both have the predictions of the same test examples, p of the test accuracy is the report's
(`pipeline.reporting._statistics`), and with one seed that of McNemar's exact test on the examples. Other scores, and
accuracies without predictions, are tested by a paired t-test over seeds. All p are corrected together by Holm's method.
"""

import contextlib
import dataclasses
import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from tabulate import tabulate

from pipeline.grid.axes import Cell
from pipeline.grid.results import CellResults, Metrics, Resources, TestScore, trained_cells
from pipeline.grid.settings import PARAMS_FILE, PROJECT_FILE, flat, read_yaml
from pipeline.host.files import git, read_json
from pipeline.host.text import counted
from pipeline.models.trained import current_profile
from pipeline.reporting._statistics import LEVEL, Scores, holm, paired_differences
from schoenbat.errors import UserError, list_choices
from schoenbat.lra.training import Predictions, load_model

HERE = "."
"""Stands for the working folder as it is."""
_COLUMNS = 80
_CODE = ("schoenbat", "pipeline", str(PROJECT_FILE))
_UNCOMPARED = ("profile", "note", "grid")
_TESTS = (
    "p of a test accuracy: over seeds and test examples together, as in the report, or over the examples with one "
    "seed; else a paired t-test over the seeds that both have"
)


class Result(NamedTuple):
    """What one cell has given."""

    metrics: Metrics
    test: TestScore | None
    resources: Resources | None
    predictions: Predictions | None


Pairs = dict[str, list[tuple[Result, Result]]]
"""By mechanism on a task, such as "lra-text rmfa exp maclauformer": the results of both sides at each seed."""


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
    """Print the comparison of two profiles, git revisions or cells; "." is the working folder.

    Raises:
        UserError: a name that is none of these.
    """
    with ExitStack() as stack:
        found = compare(_side(a, stack), _side(b, stack))
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))


def compare(a: Side, b: Side) -> dict[str, Any]:
    """Return all that differs, and every number that both have, as plain values.

    `code` lists files that differ between the revisions, and is None where that cannot be said; `code_differs` tells
    whether a cell that both have was made by other code, and is None where there is no such cell.
    """
    pairs = _pairs(a, b)
    numbers = [number for of, results in pairs.items() for number in _numbers(of, results)]
    tested = [number for number in numbers if number["p"] is not None]
    for number, adjusted in zip(tested, holm([number["p"] for number in tested]), strict=True):
        number["adjusted"] = adjusted
    code = [{cell: result.metrics.fingerprint.code for cell, result in side.results.items()} for side in (a, b)]
    common = code[0].keys() & code[1].keys()
    one_cell = len(a.results) == len(b.results) == 1
    return {
        **{key: {"what": side.what, "revisions": list(side.revisions)} for key, side in (("a", a), ("b", b))},
        "settings": _differing(a.settings, b.settings),
        "data": _differing(a.data, b.data),
        "code": _changed_files(a.revisions, b.revisions),
        "code_differs": any(code[0][cell] != code[1][cell] for cell in common) if common else None,
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
            out += [f"  {key}", f"    A  {_shown(sides['a'])}", f"    B  {_shown(sides['b'])}"]
    out += [*_code_lines(found), ""]
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
    made = {result.metrics.git_revision for result in results.values()}
    params = root / PARAMS_FILE
    kept = Path("profiles", f"{profile}.yaml")
    if revision is None and (settings := read_yaml(params)).get("profile") != profile:
        settings = read_yaml(kept) if kept.is_file() else {}
    elif revision is not None:
        settings = read_yaml(params)
    plain = {key: value for key, value in settings.items() if key not in _UNCOMPARED}
    data = {path.stem: _data(read_json(path)) for path in sorted((root / "runs" / profile / "data").glob("*.json"))}
    return Side(what, flat(plain), data, [revision] if revision else sorted(made), results)


def _cell_side(profile: str, cell_id: str) -> Side:
    results = CellResults(profile, cell_id)
    cell, result = _result(results)
    settings: dict[str, Any] = dict(dataclasses.asdict(cell))
    if results.best.is_file():
        _, described = load_model(results.best)
        settings = {key: value for key, value in described.items() if key not in ("data", "best_step")}
        settings |= {"former": {"name": cell.former, **described["former"]}}
    data = {cell.task: f"{result.metrics.data} ({result.metrics.fingerprint.data[:12]})"}
    what = f"cell {cell_id} of profile {profile}"
    return Side(what, flat(settings), data, [result.metrics.git_revision], {cell: result})


def _revision_side(name: str, commit: str, stack: ExitStack) -> Side:
    """Return the results of a commit: those that git has, or DVC as far as its cache holds them."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    try:
        files = DVCFileSystem(".", rev=commit)
        (root / PARAMS_FILE).write_bytes(files.read_bytes(str(PARAMS_FILE)))
        profile = str(read_yaml(root / PARAMS_FILE)["profile"])
        folder = f"runs/{profile}"
        for path in files.find(folder) if files.exists(folder) else []:
            kept = Path(path.lstrip("/"))
            if kept.parent.name in ("metrics", "test", "predictions", "data"):
                (root / kept).parent.mkdir(parents=True, exist_ok=True)
                # What the cache does not hold is as if it had not run.
                with contextlib.suppress(FileNotFoundError):
                    (root / kept).write_bytes(files.read_bytes(path))
    except (DvcException, FileNotFoundError, KeyError, TypeError) as error:
        raise UserError(f"git revision {name} holds no project that DVC can read: {error}") from None
    what = f"git revision {name} ({commit[:12]}), profile {profile}"
    return _folder_side(what, root, profile, commit)


def _result(results: CellResults) -> tuple[Cell, Result]:
    metrics = results.metrics()
    assert metrics is not None
    cell = Cell(metrics.task, metrics.attn, metrics.dotf, metrics.former, metrics.seed)
    return cell, Result(metrics, results.test(), results.resources(), results.predictions())


def _mechanism(cell: Cell) -> str:
    return " ".join(str(part) for part in (cell.task, cell.attn, cell.dotf, cell.former) if part is not None)


def _data(meta: Mapping[str, Any]) -> str:
    return f"{meta['label']} ({meta['fingerprint'][:12]})"


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Return by key what either side has, None for nothing, where that differs."""
    return {key: {"a": a.get(key), "b": b.get(key)} for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}


def _pairs(a: Side, b: Side) -> Pairs:
    """Return the results that belong together: of the same cell; or, of two cells, these."""
    if len(a.results) == len(b.results) == 1:
        ((one, of_a),), ((other, of_b),) = a.results.items(), b.results.items()
        names = dict.fromkeys([_mechanism(one), _mechanism(other)])
        return {" | ".join(names): [(of_a, of_b)]}
    pairs: Pairs = {}
    for cell, result in a.results.items():
        if cell in b.results:
            pairs.setdefault(_mechanism(cell), []).append((result, b.results[cell]))
    return pairs


def _missing(side: Side, other: Side) -> list[str]:
    """Return the mechanisms on tasks, with their seeds, that the other side has not."""
    seeds: dict[str, list[str]] = {}
    for cell in side.results:
        if cell not in other.results:
            seeds.setdefault(_mechanism(cell), []).append(str(cell.seed))
    return [f"{of}, seed {', '.join(found)}" for of, found in seeds.items()]


_FIGURES: dict[str, Callable[[Result], float | None]] = {
    "test accuracy": lambda result: result.test.accuracy if result.test else None,
    "test loss": lambda result: result.test.loss if result.test else None,
    "dev accuracy": lambda result: result.metrics.best_dev_accuracy,
    "dev loss": lambda result: result.metrics.best_dev_loss,
    "best step": lambda result: result.metrics.best_step,
    "parameters": lambda result: result.metrics.num_parameters,
    "training seconds": lambda result: result.resources.seconds if result.resources else None,
}
_TESTED = ("test accuracy", "test loss", "dev accuracy", "dev loss")


def _numbers(of: str, pairs: list[tuple[Result, Result]]) -> Iterator[dict[str, Any]]:
    """Yield each figure that both sides have: means over seeds, and p of no difference, None without a test."""
    for name, figure in _FIGURES.items():
        found = [(one, other, figure(one), figure(other)) for one, other in pairs]
        both = [(one, other, x, y) for one, other, x, y in found if x is not None and y is not None]
        if not both:
            continue
        a, b = np.array([x for _, _, x, _ in both]), np.array([y for _, _, _, y in both])
        p = None
        if name == "test accuracy":
            p = _p_of_predictions([(one, other) for one, other, _, _ in both])
        if p is None and name in _TESTED and len(both) > 1:
            p = _paired_t(b - a)
        seeds = [one.metrics.seed for one, _, _, _ in both]
        means = {"a": float(a.mean()), "b": float(b.mean()), "difference": float(b.mean() - a.mean())}
        yield {"of": of, "name": name, "seeds": seeds, **means, "p": p, "adjusted": None, "same": bool((a == b).all())}


def _paired_t(differences: np.ndarray) -> float | None:
    """Return the two-sided p; None where all differences are equal, of which a t-test can say nothing."""
    if np.ptp(differences) == 0:
        return None if differences[0] else 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _p_of_predictions(pairs: list[tuple[Result, Result]]) -> float | None:
    """Return p of no difference in test accuracy; None where predictions of the same examples are missing."""
    sides: tuple[dict[int, Predictions], dict[int, Predictions]] = ({}, {})
    for place, (one, other) in enumerate(pairs):
        a, b = one.predictions, other.predictions
        same = one.metrics.fingerprint.data == other.metrics.fingerprint.data
        if a is None or b is None or not same or not np.array_equal(a.targets, b.targets):
            return None
        sides[0][place], sides[1][place] = a, b
    if len(pairs) > 1:
        found = paired_differences({"": (Scores.of(sides[0]), Scores.of(sides[1]))})[""].p
        return None if np.isnan(found) else found
    if (sides[0][0].targets != 1).any():
        return None
    right_in_one = (sides[0][0].correct - sides[1][0].correct)[sides[0][0].correct != sides[1][0].correct]
    return float(stats.binomtest(int((right_in_one > 0).sum()), len(right_in_one)).pvalue) if len(right_in_one) else 1.0


def _changed_files(a: Sequence[str], b: Sequence[str]) -> list[str] | None:
    """Return the files of code that differ between the revisions; None where git cannot say."""
    if any(len(made) != 1 or made[0] == "none" or made[0].endswith("+") for made in (a, b)):
        return None
    changed = git("diff", "--name-only", a[0], b[0], "--", *_CODE)
    return None if changed is None else changed.splitlines()


def _code_lines(found: Mapping[str, Any]) -> list[str]:
    revisions = [", ".join(found[side]["revisions"]) or "unknown" for side in ("a", "b")]
    if found["code_differs"] is None:
        head = f"Code: git revision {' | '.join(revisions)}"
    else:
        head = f"Code: {'not ' if found['code_differs'] else ''}the same where cells depend on it"
        head += f" (git revision {' | '.join(dict.fromkeys(revisions))})"
    files = found["code"] or []
    more = [f"  ... and {len(files) - 10} more"] if len(files) > 10 else []
    return [head, *(f"  {file}" for file in files[:10]), *more]


def _shown(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 70 else f"{text[:69]}\N{HORIZONTAL ELLIPSIS}"


def _number_shown(number: Mapping[str, Any]) -> list[str]:
    """Return a row of the table for people."""
    name = number["name"]
    percent = name.endswith("accuracy")
    decimals = 2 if percent else 4 if name.endswith("loss") else 1 if name == "training seconds" else 0
    a, b, difference = ((100 if percent else 1) * number[key] for key in ("a", "b", "difference"))
    unit = " %" if percent else ""
    if number["same"]:
        return [name, f"{a:,.{decimals}f}{unit}", f"{b:,.{decimals}f}{unit}", "the same", ""]
    p = number["adjusted"]
    shown = "" if p is None else ("< 0.001" if p < 0.001 else f"{p:.3f}") + (" *" if p < LEVEL else "")
    return [name, f"{a:,.{decimals}f}{unit}", f"{b:,.{decimals}f}{unit}", f"{difference:+z,.{decimals}f}", shown]
