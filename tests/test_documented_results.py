"""Figures that the documents take from a published report are those of the report."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORMERS = ("transformer", "maclauformer", "maclauformer+gain8", "maclauformer+gain32")
ROWS = re.findall(
    r"^\| (kernelized|taylor1|rmfa|rmfa-sketch) \| (\d*) ?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
    (ROOT / "docs/method.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "+".join(filter(None, row[:2])))
def test_the_recall_of_the_method_is_that_of_the_report(row: tuple[str, ...]) -> None:
    with (ROOT / "reports/recall/tables/accuracy.csv").open(encoding="utf-8", newline="") as file:
        found = {(line["attn"], line["former"]): line["recall-mqar mean"] for line in csv.DictReader(file)}
    attn = "+".join(filter(None, row[:2]))
    assert [f"{float(found[attn, former]):.1f}" for former in FORMERS] == list(row[2:])


def test_the_table_is_read() -> None:
    assert len(ROWS) == 7
