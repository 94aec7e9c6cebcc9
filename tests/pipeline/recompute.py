"""The numbers of a report once more, from the raw files of its cells alone, with none of the project's code.

It reads metrics/, test/, curves/ and predictions/ of each group of cells, and the summaries of the data, and compares
what follows from them with the tables of the report.
"""

import itertools
import json
import math
import re
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
    return sum(check(raw, tables) for check in (_accuracy, _cells, _pairs, _versus))


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
    table = pd.read_csv(tables / "accuracy.csv")
    tasks = [column.removesuffix(" std") for column in table if column.endswith(" std")]
    count = 0
    for row in table.to_dict("records"):
        if row["attn"].startswith("baseline: "):
            for task in tasks:
                accuracy = raw.baselines.get(task, {}).get(row["attn"].removeprefix("baseline: "), math.nan)
                count += _same(row[f"{task} mean"], 100 * accuracy)
            continue
        runs = []
        for task in tasks:
            scores = np.array([cell["accuracy"] for cell in raw.of(task, _mechanism(row)).values()])
            count += _same(row[f"{task} n"], len(scores))
            count += _same(row[f"{task} mean"], scores.mean() if len(scores) else math.nan)
            count += _same(row[f"{task} std"], scores.std(ddof=1) if len(scores) > 1 else math.nan)
            floor = 100 * raw.baselines.get(task, {}).get("majority class", math.nan)
            runs.append(100 * (scores - floor) / (100 - floor))
        if len(tasks) > 1:
            every = np.sort(np.concatenate(runs))
            cut = len(every) // 4
            middle = every[cut : len(every) - cut].mean() if all(map(len, runs)) else math.nan
            count += _same(row["iqm"], middle)
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


def _pairs(raw: Raw, tables: Path) -> int:
    table = pd.read_csv(tables / "pairs.csv")
    count = 0
    for row in table.to_dict("records"):
        expected = raw.difference(row["task"], _mechanism(row), _mechanism(row, "other"))
        count += _compare(row, expected)
    for task, rows in table.groupby("task"):
        known = {mechanism for of, mechanism, _ in raw.cells if of == task}
        assert len(rows) == len(list(itertools.combinations(known, 2)))
        count += _letters(tables, str(task), rows)
    return count


def _compare(row: dict[Any, Any], expected: dict[str, float]) -> int:
    count = _same(row["estimate"], expected["estimate"]) + _same(row["seeds"], expected["seeds"])
    if expected.get("error") == 0:
        return count + sum(_same(row[name], expected[name]) for name in ("error", "low", "high", "margin"))
    for name in ("df", "seed_share", "example_share", "error", "low", "high", "margin"):
        count += _same(row[name], expected.get(name, math.nan))
    if expected["seeds"] > 1:
        count += _same(row["p"], expected["p"], rtol=1e-5)
    return count


def _letters(tables: Path, task: str, rows: pd.DataFrame) -> int:
    """Two share a letter exactly if the table of pairs calls them not significant."""
    accuracy = pd.read_csv(tables / "accuracy.csv")
    # After z come a1, b1 and so on.
    groups = {
        _mechanism(row): set(re.findall(r"[a-z]\d*", row[f"{task} group"]))
        for row in accuracy.dropna(subset=f"{task} group").to_dict("records")
    }
    holm = _holm(rows.p.to_numpy())
    for (_, row), adjusted in zip(rows.iterrows(), holm, strict=True):
        significant = adjusted < 0.05
        assert significant == row.significant
        one, other = _mechanism(row), _mechanism(row, "other")
        assert significant == (not groups[one] & groups[other]), (one, other)
    return len(rows)


def _holm(p: Any) -> Any:
    """By its definition: the k-th smallest of m, times m - k + 1, never less than the one before."""
    adjusted, least = np.full(len(p), math.nan), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        if not math.isnan(p[index]):
            least = max(least, min(1.0, (np.sum(~np.isnan(p)) - rank) * p[index]))
            adjusted[index] = least
    return adjusted


def _versus(raw: Raw, tables: Path) -> int:
    count = 0
    for path in [*tables.glob("versus-*.csv"), *tables.glob("ppsbn.csv")]:
        table = pd.read_csv(path)
        for row in table.to_dict("records"):
            count += _compare(row, raw.difference(row["task"], _mechanism(row), _mechanism(row, "other")))
        for found, expected in zip(table.p_holm, _holm(table.p.to_numpy()), strict=True):
            count += _same(found, expected)
    return count
