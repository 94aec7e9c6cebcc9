"""Figures that the documents take from a published report are those of the report."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = (ROOT / "docs/method.md").read_text(encoding="utf-8")
FORMERS = ("transformer", "maclauformer", "maclauformer+gain8", "maclauformer+gain32")
RECALL = re.findall(
    r"^\| (kernelized|taylor1|rmfa|rmfa-sketch) \| (\d*) ?" + r"\| ([\d.]+) " * 4 + r"\|$", METHOD, re.M
)
MAD = re.findall(r"^\| ([\w-]+) \| `(recall-\w+)` \| ([\d.]+) \|(?: ([\d.]+))? \|(?: ([\d.]+))? \|$", METHOD, re.M)


def reported(profile: str, task: str) -> dict[tuple[str, str], str]:
    """By mechanism and former the mean accuracy as the documents write it."""
    with (ROOT / f"reports/{profile}/tables/accuracy-{task}.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    return {(line["attn"], line["former"]): f"{float(line['mean']):.1f}" for line in lines}


@pytest.mark.parametrize("row", RECALL, ids=lambda row: "+".join(filter(None, row[:2])))
def test_the_recall_of_the_method_is_that_of_the_report(row: tuple[str, ...]) -> None:
    found, attn = reported("recall", "recall-mqar"), "+".join(filter(None, row[:2]))
    assert [found[attn, former] for former in FORMERS] == list(row[2:])


@pytest.mark.parametrize("row", MAD, ids=lambda row: "-".join(row[:2]))
def test_the_recall_among_noise_and_the_copying_of_the_method_are_those_of_the_report(row: tuple[str, ...]) -> None:
    attn, task, *accuracies = row
    found = reported("mad", task)
    assert [found.get((attn, former), "") for former in FORMERS[:3]] == accuracies


def test_the_tables_are_read() -> None:
    assert (len(RECALL), len(MAD)) == (7, 12)
