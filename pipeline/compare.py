"""Two profiles, git revisions or cells side by side: what they are made from, and every number with its significance.

A difference is B less A. Two results are paired by seed: at one seed all mechanisms start from the same weights and see
the same batches. Where both have the predictions of the same test examples, p of the test accuracy is that of the
report, over seeds and examples together, and with one seed that of McNemar's exact test on the examples. Other scores,
and accuracies without predictions, are tested by a paired t-test over the seeds that both have, two at least. All p
that are shown are corrected together, by Holm's method.
"""

import contextlib
import dataclasses
import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from pipeline.files import git, read_json
from pipeline.grid.axes import Cell
from pipeline.grid.settings import PARAMS_FILE, PROJECT_FILE, flat, read_yaml
from pipeline.reporting._statistics import Scores, paired_differences
from pipeline.results import CellResults, Metrics, Resources, TestScore, trained_cells
from pipeline.text import counted
from pipeline.trained import current_profile
from schoenbat.errors import UserError, list_choices
from schoenbat.lra.training import Predictions, load_model

HERE = "."
"""Stands for the working folder as it is."""
LEVEL = 0.05
_COLUMNS = 80
_CODE = ("schoenbat", "pipeline", str(PROJECT_FILE))
_UNCOMPARED = ("profile", "note", "grid")
_TESTS = (
    "p of a test accuracy: over seeds and test examples together, as in the report, or over the examples with one "
    "seed; else a paired t-test over the seeds that both have"
)


@dataclass(frozen=True)
class Result:
    """What one seed of a mechanism on a task has given."""

    metrics: Metrics
    test: TestScore | None
    resources: Resources | None
    predictions: Predictions | None


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        what: in words.
        settings: the leaves of params.yaml, or of the sections of a cell, by dotted keys.
        data: of each task, what it is and its fingerprint.
        revisions: of git, at which the results were made, or that the side is.
        code: of each cell, the fingerprint of the code that made it.
        results: by mechanism on a task, such as "lra-text rmfa exp maclauformer", and seed.
    """

    name: str
    what: str
    settings: Mapping[str, Any]
    data: Mapping[str, str]
    revisions: Sequence[str]
    code: Mapping[str, str]
    results: Mapping[str, Mapping[int, Result]]


@dataclass(frozen=True)
class Number:
    """One figure of both sides.

    Attributes:
        of: the mechanism and task.
        a, b: means over the seeds that both have.
        p: of no difference, before any correction; None where there is no test for it.
        adjusted: after Holm's correction.
        same: every seed has exactly the same value on both sides.
    """

    of: str
    name: str
    seeds: list[int]
    a: float
    b: float
    p: float | None
    same: bool
    adjusted: float | None = None

    @property
    def difference(self) -> float:
        return self.b - self.a


@dataclass(frozen=True)
class Comparison:
    """All that differs, and every number that both have.

    Attributes:
        settings, data: by key, what either side has; None where it has none.
        code: files that differ between the revisions; None where that cannot be said.
        code_differs: whether a cell that both have was made by other code; None if they have no cell in common.
        only_a, only_b: mechanisms on tasks, or seeds of them, that the other side has not.
    """

    a: Side
    b: Side
    settings: dict[str, tuple[Any, Any]]
    data: dict[str, tuple[str | None, str | None]]
    code: list[str] | None
    code_differs: bool | None
    numbers: list[Number] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)


def run(a: str, b: str, *, as_json: bool) -> None:
    """Print the comparison of two profiles, git revisions or cells; "." is the working folder.

    Raises:
        UserError: a name that is none of these.
    """
    with ExitStack() as stack:
        comparison = compare(_side(a, stack), _side(b, stack))
    print(json.dumps(_plain(comparison), indent=2) if as_json else "\n".join(lines(comparison)))


def compare(a: Side, b: Side) -> Comparison:
    pairs = _pairs(a, b)
    numbers = [number for of, results in pairs for number in _numbers(of, results)]
    known = [number.p for number in numbers if number.p is not None]
    adjusted = iter(multipletests(known, method="holm")[1].tolist() if known else [])
    numbers = [
        number if number.p is None else dataclasses.replace(number, adjusted=next(adjusted)) for number in numbers
    ]
    common = [cell for cell in a.code if cell in b.code]
    shared = {(of, seed) for of in a.results for seed in a.results[of] if seed in b.results.get(of, {})}
    cells = _is_single(a) and _is_single(b)
    return Comparison(
        a=a,
        b=b,
        settings=_differing(a.settings, b.settings),
        data=_differing(a.data, b.data),
        code=_changed_files(a.revisions, b.revisions),
        code_differs=any(a.code[cell] != b.code[cell] for cell in common) if common else None,
        numbers=numbers,
        only_a=[] if cells else _missing(a, shared),
        only_b=[] if cells else _missing(b, shared),
    )


def lines(found: Comparison) -> list[str]:
    """The comparison for people, in at most 80 columns as far as names allow."""
    out = [f"A  {found.a.what}", f"B  {found.b.what}", ""]
    for title, rows in (("Settings", found.settings), ("Data", found.data)):
        out.append(f"{title}: {'what differs' if rows else 'the same'}")
        for key, (one, other) in rows.items():
            out += [f"  {key}", f"    A  {_shown(one)}", f"    B  {_shown(other)}"]
    out += [*_code_lines(found), ""]
    last = None
    for number in found.numbers:
        if number.of != last:
            last = number.of
            seeds = f"seed {number.seeds[0]}" if len(number.seeds) == 1 else f"mean of {len(number.seeds)} seeds"
            out += [f"{number.of}, {seeds}", f"  {'':17}{'A':>13}{'B':>13}{'B - A':>13}  p, corrected"]
        out.append(f"  {number.name:17}{_numbers_shown(number)}")
    for name, missing in (("A", found.only_a), ("B", found.only_b)):
        out += [f"only in {name}: {each}" for each in missing]
    if not found.numbers:
        out.append("no result is in both")
    else:
        apart = sum(1 for number in found.numbers if number.adjusted is not None and number.adjusted < LEVEL)
        legend = f"{_TESTS}; Holm's correction over all. More than luck at 5 %: {counted(apart, 'difference')}."
        out += ["", *textwrap.wrap(legend, _COLUMNS)]
    return out


def _side(name: str, stack: ExitStack) -> Side:
    profile = current_profile()
    if name == HERE:
        return _folder_side(name, f"the working folder, profile {profile}", Path(), profile)
    of_profile, _, cell = name.rpartition("/")
    if cell in trained_cells(of_profile or profile):
        return _cell_side(name, of_profile or profile, cell)
    if name == profile or trained_cells(name):
        return _folder_side(name, f"profile {name}", Path(), name)
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if commit is not None:
        return _revision_side(name, commit, stack)
    profiles = {path.name for path in Path("runs").glob("*") if trained_cells(path.name)}
    choices = list_choices(name, [HERE, *sorted(profiles), *trained_cells(profile)])
    raise UserError(f"{name!r} is no profile or cell with results, and no git revision; choose from: {choices}")


def _folder_side(name: str, what: str, root: Path, profile: str, revision: str | None = None) -> Side:
    """The results under a folder, and the settings of the profile as they are there."""
    results: dict[str, dict[int, Result]] = {}
    code, made = {}, set()
    for name_of_cell in trained_cells(profile, root):
        cell, result = _result(CellResults(profile, name_of_cell, root))
        results.setdefault(_mechanism(cell), {})[cell.seed] = result
        code[cell.id] = result.metrics.fingerprint.code
        made.add(result.metrics.git_revision)
    params = root / PARAMS_FILE
    kept = Path("profiles", f"{profile}.yaml")
    if revision is None and (settings := read_yaml(params)).get("profile") != profile:
        settings = read_yaml(kept) if kept.is_file() else {}
    elif revision is not None:
        settings = read_yaml(params)
    plain = {key: value for key, value in settings.items() if key not in _UNCOMPARED}
    data = {path.stem: _data(read_json(path)) for path in sorted((root / "runs" / profile / "data").glob("*.json"))}
    return Side(name, what, flat(plain), data, [revision] if revision else sorted(made), code, results)


def _cell_side(name: str, profile: str, cell_id: str) -> Side:
    results = CellResults(profile, cell_id)
    cell, result = _result(results)
    settings: dict[str, Any] = dict(dataclasses.asdict(cell))
    if results.best.is_file():
        _, described = load_model(results.best)
        settings = {key: value for key, value in described.items() if key not in ("data", "best_step")}
        settings |= {"former": {"name": cell.former, **described["former"]}}
    fingerprint = result.metrics.fingerprint
    data = {cell.task: f"{result.metrics.data} ({fingerprint.data[:12]})"}
    code = {cell.id: fingerprint.code}
    what = f"cell {cell_id} of profile {profile}"
    by_mechanism = {_mechanism(cell): {cell.seed: result}}
    return Side(name, what, flat(settings), data, [result.metrics.git_revision], code, by_mechanism)


def _revision_side(name: str, commit: str, stack: ExitStack) -> Side:
    """The results of a commit: those that git has, or DVC as far as its cache holds them."""
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
    return _folder_side(name, what, root, profile, commit)


def _result(results: CellResults) -> tuple[Cell, Result]:
    metrics = results.metrics()
    assert metrics is not None
    cell = Cell(metrics.task, metrics.attn, metrics.dotf, metrics.former, metrics.seed)
    return cell, Result(metrics, results.test(), results.resources(), results.predictions())


def _mechanism(cell: Cell) -> str:
    return " ".join(str(part) for part in (cell.task, cell.attn, cell.dotf, cell.former) if part is not None)


def _data(meta: Mapping[str, Any]) -> str:
    return f"{meta['label']} ({meta['fingerprint'][:12]})"


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}


def _pairs(a: Side, b: Side) -> list[tuple[str, list[tuple[Result, Result]]]]:
    """The results that belong together: of the same mechanism, task and seed; or those of two cells."""
    if _is_single(a) and _is_single(b):
        ((one, of_a),), ((other, of_b),) = a.results.items(), b.results.items()
        (result_a,), (result_b,) = of_a.values(), of_b.values()
        return [(one if one == other else f"{one} | {other}", [(result_a, result_b)])]
    paired = {
        of: [(of_a[seed], b.results[of][seed]) for seed in of_a if seed in b.results[of]]
        for of, of_a in a.results.items()
        if of in b.results
    }
    return [(of, results) for of, results in paired.items() if results]


def _is_single(side: Side) -> bool:
    return [len(results) for results in side.results.values()] == [1]


def _missing(side: Side, shared: set[tuple[str, int]]) -> list[str]:
    missing = []
    for of, results in side.results.items():
        seeds = [seed for seed in results if (of, seed) not in shared]
        if seeds:
            missing.append(f"{of}, seed {', '.join(map(str, seeds))}")
    return missing


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


def _numbers(of: str, pairs: list[tuple[Result, Result]]) -> Iterator[Number]:
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
        yield Number(of, name, seeds, float(a.mean()), float(b.mean()), p, bool((a == b).all()))


def _paired_t(differences: np.ndarray) -> float | None:
    """Two-sided; None where all differences are one and the same, of which a t-test can say nothing."""
    if np.ptp(differences) == 0:
        return None if differences[0] else 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _p_of_predictions(pairs: list[tuple[Result, Result]]) -> float | None:
    """Of no difference in test accuracy; None where predictions of the same examples are missing."""
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
    """The files of code that git says differ between the revisions; None where it cannot."""
    if any(len(made) != 1 or made[0] == "none" or made[0].endswith("+") for made in (a, b)):
        return None
    changed = git("diff", "--name-only", a[0], b[0], "--", *_CODE)
    return None if changed is None else changed.splitlines()


def _code_lines(found: Comparison) -> list[str]:
    revisions = [", ".join(side.revisions) or "unknown" for side in (found.a, found.b)]
    if found.code_differs is None:
        head = f"Code: git revision {revisions[0]} | {revisions[1]}"
    else:
        head = f"Code: {'not ' if found.code_differs else ''}the same where cells depend on it"
        head += f" (git revision {' | '.join(dict.fromkeys(revisions))})"
    if found.code:
        shown = found.code[:10]
        more = [f"  ... and {len(found.code) - len(shown)} more"] if len(shown) < len(found.code) else []
        return [head, *(f"  {file}" for file in shown), *more]
    return [head]


def _shown(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 70 else f"{text[:69]}\N{HORIZONTAL ELLIPSIS}"


def _numbers_shown(number: Number) -> str:
    percent = number.name.endswith("accuracy")
    decimals = 2 if percent else 4 if number.name.endswith("loss") else 1 if number.name == "training seconds" else 0
    a, b, difference = (f"{(100 if percent else 1) * x:,.{decimals}f}" for x in (number.a, number.b, number.difference))
    unit = " %" if percent else ""
    change = "the same" if number.same else f"{'+' if number.difference > 0 else ''}{difference}"
    p = "" if number.adjusted is None or number.same else _p_shown(number.adjusted)
    return f"{a + unit:>13}{b + unit:>13}{change:>13}  {p}".rstrip()


def _p_shown(p: float) -> str:
    return "< 0.001 *" if p < 0.001 else f"{p:.3f}{' *' if p < LEVEL else ''}"


def _plain(found: Comparison) -> dict[str, Any]:
    """For programs."""
    sides = {
        key: {"name": side.name, "what": side.what, "revisions": list(side.revisions)}
        for key, side in (("a", found.a), ("b", found.b))
    }
    numbers = [{**dataclasses.asdict(number), "difference": number.difference} for number in found.numbers]
    listed = {key: {"a": one, "b": other} for key, (one, other) in found.settings.items()}
    data = {key: {"a": one, "b": other} for key, (one, other) in found.data.items()}
    rest = {"code": found.code, "code_differs": found.code_differs, "only_a": found.only_a, "only_b": found.only_b}
    return {**sides, "settings": listed, "data": data, **rest, "numbers": numbers, "tests": _TESTS}
