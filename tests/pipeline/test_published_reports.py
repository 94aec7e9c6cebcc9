"""The reports in the repository follow from the results in the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recompute import check_report

from pipeline import reporting
from pipeline.grid.params import load_params

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted(path.parents[1].name for path in ROOT.glob("reports/*/tables/contrasts.csv"))
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


def test_a_clone_is_set_to_a_profile_whose_results_dvc_shows_at_once(tmp_path: Path) -> None:
    profile = load_params(ROOT / "params.yaml").profile
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / f"profiles/{profile}.yaml").read_bytes()
    for name in ("dvc.yaml", "params.yaml", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "runs" / profile, tmp_path / "runs" / profile)
    command = [sys.executable, "-m", "dvc", "metrics", "show", "--json"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "failed to load" not in shown.stderr
    found = json.loads(shown.stdout)[""]["data"]
    files = [*tmp_path.glob("runs/*/*/metrics/*.json"), *tmp_path.glob("runs/*/*/test/*.json")]
    assert {name for name, read in found.items() if "error" not in read} == {
        file.relative_to(tmp_path).as_posix() for file in files
    }
    assert len(files) > 100


def texts_of(drawing: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawing.read_text(encoding="utf-8"))
