"""The reports in the repository follow from the results in the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from figures import look_at_figures
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
    """Tables and texts have the same bytes; of pictures, whose drawing may differ, there are the same."""
    (tmp_path / "runs").symlink_to(ROOT / "runs")
    reporting.build(load_params(ROOT / f"profiles/{SMALLEST}.yaml"), tmp_path)
    kept, built = ROOT / "reports" / SMALLEST, tmp_path / "reports" / SMALLEST
    names = {name.removeprefix(f"reports/{SMALLEST}/") for name in tracked() if name.startswith(f"reports/{SMALLEST}/")}
    assert names == {
        path.relative_to(built).as_posix()
        for path in built.rglob("*")
        if path.suffix in (".csv", ".png") or (path.suffix == ".md" and path.parent == built)
    }
    for name in sorted(names):
        if not name.endswith(".png"):
            assert (built / name).read_bytes() == (kept / name).read_bytes(), name


def test_git_has_of_a_report_its_texts_numbers_and_the_pictures_in_them() -> None:
    names = tracked()
    assert {Path(name).suffix for name in names} == {".md", ".csv", ".png"}
    for index in (ROOT / name for name in names if name.endswith("index.md")):
        for target in re.findall(r"\]\(([^)]+)\)", index.read_text(encoding="utf-8")):
            assert (index.parent / target).relative_to(ROOT).as_posix() in names, (index, target)


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(name, marks=[] if name in (SMALLEST, "trained") else [pytest.mark.slow])
        for name in sorted({*PUBLISHED, "trained"})
    ],
)
def test_no_published_figure_has_more_than_six_coloured_lines_or_labels_that_overlap(profile: str) -> None:
    drawn = look_at_figures(load_params(ROOT / f"profiles/{profile}.yaml"), ROOT)
    assert drawn == sorted(path.stem for path in (ROOT / f"reports/{profile}/figures").glob("*.png"))


def test_what_git_has_not_of_a_report_dvc_does_not_look_at_either() -> None:
    """So that the output of the stage is the same in a clone."""
    ignored, unseen = (
        {line for line in (ROOT / name).read_text().splitlines() if re.match(r"!?/reports/[\w*]+/.+", line)}
        for name in (".gitignore", ".dvcignore")
    )
    assert ignored == unseen != set()


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


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "reports"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()
