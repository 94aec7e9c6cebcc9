"""The numbers of a report once more, from the raw files of its cells alone, with none of the project's code.

It reads metrics/, test/, curves/ and predictions/ of each group of cells, and the summaries of the data, and compares
what follows from them with the tables of the report.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

Mechanism = tuple[str, str, str]


class Raw:
    """The raw results in a folder."""

    def __init__(self, folder: Path) -> None:
        self.baselines: dict[str, dict[str, float]] = {}
        self.sizes: dict[str, dict[str, int]] = {}
        for path in (folder / "data").glob("*.json"):
            summary = json.loads(path.read_text())
            self.baselines[path.stem] = summary.get("baselines", {})
            self.sizes[path.stem] = summary["splits"]
        self.cells: dict[tuple[str, Mechanism, int], dict[str, Any]] = {}
        for path in folder.glob("*/metrics/*.json"):
            metrics, group = json.loads(path.read_text()), path.parents[1]
            with np.load(group / f"predictions/{path.stem}.npz") as arrays:
                correct, targets = arrays["correct"].astype(float), arrays["targets"].astype(float)
            key = (metrics["task"], (metrics["attn"], metrics["dotf"] or "", metrics["former"]), metrics["seed"])
            self.cells[key] = {
                "metrics": metrics,
                "test": json.loads((group / f"test/{path.stem}.json").read_text()),
                "right": correct / targets.mean(),
                "accuracy": 100 * correct.sum() / targets.sum(),
                "curve": pd.read_csv(group / f"curves/{path.stem}.csv"),
            }

    def of(self, task: str, mechanism: Mechanism) -> dict[int, dict[str, Any]]:
        found = {seed: cell for (of, one, seed), cell in self.cells.items() if (of, one) == (task, mechanism)}
        return dict(sorted(found.items()))

    def difference(self, task: str, one: Mechanism, other: Mechanism) -> dict[str, float]:
        """Of the means, in points, with its squared error from the mean squares of seeds and examples."""
        mine, theirs = self.of(task, one), self.of(task, other)
        seeds = sorted(mine.keys() & theirs.keys())
        table = 100 * np.array([mine[seed]["right"] - theirs[seed]["right"] for seed in seeds])
        found = {"estimate": float(table.mean()), "seeds": len(seeds)}
        if len(seeds) < 2:
            return found
        s, n = table.shape
        of_seeds = n * table.mean(1).var(ddof=1)
        of_examples = s * table.mean(0).var(ddof=1)
        residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
        of_rest = (residual**2).sum() / ((s - 1) * (n - 1))
        of_seeds = max(of_seeds, of_rest)
        of_examples = of_rest if math.isclose(of_examples, of_rest, rel_tol=1e-9) else of_examples
        extra = max(0.0, of_examples - of_rest)
        error = math.sqrt((of_seeds + extra) / (s * n))
        parts = of_seeds**2 / (s - 1)
        if of_examples > of_rest:
            parts += of_examples**2 / (n - 1) + of_rest**2 / ((s - 1) * (n - 1))
        if error == 0:
            # What a binomial of n draws without a hit leaves possible.
            unseen = 100 * scipy.stats.beta.ppf(0.95, 1, n)
            ends = {"low": found["estimate"] - unseen, "high": found["estimate"] + unseen}
            return found | {"error": 0.0, **ends, "margin": abs(found["estimate"]) + unseen}
        df = (of_seeds + extra) ** 2 / parts
        reach = scipy.stats.t.ppf(0.975, df) * error
        return found | {
            "error": error,
            "df": df,
            "low": found["estimate"] - reach,
            "high": found["estimate"] + reach,
            "p": 2 * scipy.stats.t.sf(abs(found["estimate"]) / error, df),
            "margin": abs(found["estimate"]) + scipy.stats.t.ppf(0.95, df) * error,
            "seed_share": max(0.0, of_seeds - of_rest) / (of_seeds + extra),
            "example_share": extra / (of_seeds + extra),
        }


def check_report(root: Path, profile: str) -> int:
    """Compare every number of the main tables of a report with what its raw files give; how many were compared."""
    raw, tables = Raw(root / "runs" / profile), root / "reports" / profile / "tables"
    return sum(check(raw, tables) for check in (_accuracy, _cells, _contrasts, _cost))


def _same(found: Any, expected: float, **tolerance: float) -> int:
    number = float(found) if found != "" else float("nan")
    assert np.isclose(number, expected, equal_nan=True, **({"rtol": 1e-6, "atol": 1e-6} | tolerance)), (
        number,
        expected,
    )
    return 1


def _mechanism(row: Any, prefix: str = "") -> Mechanism:
    names = ("attn", "dotf", "former") if not prefix else (prefix, f"{prefix}_dotf", f"{prefix}_former")
    return tuple("" if pd.isna(row[name]) else row[name] for name in names)  # type: ignore[return-value]


def _accuracy(raw: Raw, tables: Path) -> int:
    count = 0
    for path in [*tables.glob("accuracy-*.csv"), *tables.glob("summary-*.csv")]:
        task, table = path.stem.partition("-")[2], pd.read_csv(path)
        for row in table.to_dict("records"):
            cells = raw.of(task, _mechanism(row)).values()
            scores = np.array([cell["accuracy"] for cell in cells])
            count += _same(row["n"], len(scores)) + _same(row["mean"], scores.mean())
            count += _same(row["std"], scores.std(ddof=1) if len(scores) > 1 else math.nan)
            passed = [_passed(raw, task, cell["curve"]) for cell in cells]
            count += _same(row["passed"], np.isfinite(passed).sum())
            last = max(cell["curve"].step.max() for cell in cells)
            metrics = [cell["metrics"] for cell in cells]
            rising = any(one["best_step"] == last and one["best_dev_accuracy"] < 0.99 for one in metrics)
            count += _same(row["steps"], last) + _same(row["rising"], rising)
            state = metrics[0]["state_bytes"]
            count += _same(row["state_bytes"], math.nan if state is None else state)
        assert table["mean"].is_monotonic_decreasing
    return count


def _cells(raw: Raw, tables: Path) -> int:
    count = 0
    for row in pd.read_csv(tables / "cells.csv").to_dict("records"):
        cell = raw.cells.get((row["task"], _mechanism(row), row["seed"]))
        if cell is None:
            count += _same(row["test_accuracy"], math.nan)
            continue
        count += _same(row["test_accuracy"], cell["test"]["accuracy"])
        count += _same(100 * row["test_accuracy"], cell["accuracy"])
        count += _same(row["dev_accuracy"], cell["metrics"]["best_dev_accuracy"])
        count += _same(row["best_step"], cell["metrics"]["best_step"])
        count += _same(row["passed_baseline_at"], _passed(raw, row["task"], cell["curve"]))
    return count


def _passed(raw: Raw, task: str, curve: pd.DataFrame) -> float:
    if not raw.baselines.get(task):
        return math.nan
    bar = max(raw.baselines[task].values())
    for step, reached in zip(curve.step, curve.dev_accuracy, strict=True):
        squared = reached * (1 - reached) / raw.sizes[task]["dev"] + bar * (1 - bar) / raw.sizes[task]["test"]
        if reached > bar + 2 * math.sqrt(squared):
            return float(step)
    return math.inf


def _compare(row: dict[Any, Any], expected: dict[str, float]) -> int:
    count = _same(row["estimate"], expected["estimate"]) + _same(row["seeds"], expected["seeds"])
    if expected.get("error") == 0:
        return count + sum(_same(row[name], expected[name]) for name in ("error", "low", "high", "margin"))
    for name in ("df", "seed_share", "example_share", "error", "low", "high", "margin"):
        count += _same(row[name], expected.get(name, math.nan))
    if expected["seeds"] > 1:
        count += _same(row["p"], expected["p"], rtol=1e-5)
    return count


def _holm(p: Any) -> Any:
    """By its definition: the k-th smallest of m, times m - k + 1, never less than the one before."""
    adjusted, least = np.full(len(p), math.nan), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        if not math.isnan(p[index]):
            least = max(least, min(1.0, (np.sum(~np.isnan(p)) - rank) * p[index]))
            adjusted[index] = least
    return adjusted


def _cost(raw: Raw, tables: Path) -> int:
    """A ratio is the median time over that of torch's attention in the same pass at the same length."""
    path = tables.parents[2] / "runs" / tables.parent.name / "bench.csv"
    if not path.is_file():
        return 0
    timings, count = pd.read_csv(path, dtype={"dotf": str}, keep_default_na=False), 0
    table = pd.read_csv(tables / "cost.csv", dtype={"dotf": str}, keep_default_na=False)
    exact = timings[timings.attn == "sdpa"].set_index(["direction", "length"]).milliseconds
    for row in timings.to_dict("records"):
        same = (table[name] == row[name] for name in ("attn", "dotf", "direction"))
        found = table[np.logical_and.reduce([*same, table.num_features == int(row["num_features"] or 0)])]
        if (row["direction"], row["length"]) in exact.index:
            expected = float(row["milliseconds"]) / float(exact[row["direction"], row["length"]])
            count += _same(found[str(row["length"])].item(), expected)
        if row["length"] == timings.length.max():
            count += _same(found.peak_memory_mb.item(), row["peak_memory_mb"])
    return count


def _contrasts(raw: Raw, tables: Path) -> int:
    count = 0
    for _, table in pd.read_csv(tables / "contrasts.csv").groupby("question"):
        for row in table.to_dict("records"):
            count += _compare(row, raw.difference(row["task"], _mechanism(row), _mechanism(row, "other")))
        for (_, row), expected in zip(table.iterrows(), _holm(table.p.to_numpy()), strict=True):
            count += _same(row.p_holm, expected)
            assert row.significant == (expected < 0.05)
    return count
