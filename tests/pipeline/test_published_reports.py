"""The reports in the repository follow from the results in the repository."""

import re
from pathlib import Path

import pytest
from recompute import check_report

from pipeline import reporting
from pipeline.grid.params import load_params

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted(path.parents[1].name for path in ROOT.glob("reports/*/tables/pairs.csv"))
SMALLEST = "rates"


@pytest.mark.parametrize("profile", PUBLISHED)
def test_every_number_of_a_published_report_follows_from_its_raw_files(profile: str) -> None:
    assert check_report(ROOT, profile) > 0


def test_a_published_report_is_what_its_results_give_when_it_is_built_again(tmp_path: Path) -> None:
    """Tables and texts have the same bytes; of figures, whose drawing may differ, the texts are the same."""
    (tmp_path / "runs").symlink_to(ROOT / "runs")
    reporting.build(load_params(ROOT / f"profiles/{SMALLEST}.yaml"), tmp_path)
    kept, built = ROOT / "reports" / SMALLEST, tmp_path / "reports" / SMALLEST
    names = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert names == {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    for name in sorted(names):
        if name.endswith((".md", ".csv", ".tex")):
            assert (built / name).read_bytes() == (kept / name).read_bytes(), name
        elif name.endswith(".svg"):
            assert texts_of(built / name) == texts_of(kept / name), name


def texts_of(drawing: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawing.read_text(encoding="utf-8"))
