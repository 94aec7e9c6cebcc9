"""Accuracies that others have published, as docs/published.csv has them."""

from pathlib import Path

import pandas as pd

DOCS = Path(__file__).parents[1] / "docs"
TASKS = ["ListOps", "Text", "Retrieval", "Image", "Pathfinder"]


def test_each_value_is_an_accuracy_whose_source_is_described_with_its_faults() -> None:
    values, sources = pd.read_csv(DOCS / "published.csv"), pd.read_csv(DOCS / "published-sources.csv")
    assert len(values) == 57
    assert not values.duplicated(["source", "mechanism"]).any()
    assert set(values.source) == set(sources.source)
    assert sources.notna().all(axis=None)
    accuracies = values[TASKS]
    assert ((accuracies > 10) & (accuracies < 100)).all(axis=None)
