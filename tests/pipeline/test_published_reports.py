"""The reports in the repository follow from the results in the repository."""

from pathlib import Path

import pytest
from recompute import check_report

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted(path.parents[1].name for path in ROOT.glob("reports/*/tables/pairs.csv"))


@pytest.mark.parametrize("profile", PUBLISHED)
def test_every_number_of_a_published_report_follows_from_its_raw_files(profile: str) -> None:
    assert check_report(ROOT, profile) > 0
