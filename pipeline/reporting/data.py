"""What the models were trained and tested on."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from pipeline.reporting import Report
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._table import Table

HEADINGS = {"median": "median length", "p95": "95 % below", "max_length": "cut at"}


class Data(Report):
    """Counts of examples, and lengths of texts in tokens before they are cut."""

    title = "Data"
    order = 85

    def make(self, comparison: Comparison) -> Iterator[Table]:
        results = comparison.results
        tasks = [task for task in results.tasks if task in results.data]
        if not tasks:
            return
        found = [results.data[task] for task in tasks]
        texts = pd.DataFrame({"task": tasks, "data": [summary["label"] for summary in found]})
        counts = pd.DataFrame([_counts(summary) for summary in found])
        yield Table(
            name="data",
            title="Numbers of examples, and lengths of texts in tokens before they are cut",
            values=texts.join(counts),
            shown=texts.join(counts.map("{:,.0f}".format).rename(columns=HEADINGS)),
            caption=" ".join(f"{task}: {note}" for task in tasks for note in results.data[task]["notes"]),
            provenance=results.caption(tasks),
        )


def _counts(summary: Mapping[str, Any]) -> dict[str, float]:
    lengths = summary["lengths"]
    return {
        **{split: summary["splits"][split] for split in ("train", "dev", "test")},
        "classes": summary["num_classes"],
        "vocabulary": summary["vocab_size"],
        "median": lengths["median"],
        "p95": lengths["p95"],
        "longest": lengths["max"],
        "max_length": summary["max_length"],
    }
