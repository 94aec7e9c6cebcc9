"""The documents quote what was generated, and lead nowhere that is not there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.grid.params import load_params

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_tables_in_the_readme_are_the_generated_ones() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    quotes = re.findall(r"<!-- begin: (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert quotes
    for path, quoted in quotes:
        assert quoted.strip() == (ROOT / path).read_text(encoding="utf-8").strip(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert all((document.parent / target).exists() for target in local), local


def test_the_example_of_the_method_prints_an_allocation(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/method.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, "docs/method.md", "exec"), {})
    assert "256 features, expected relative error" in capsys.readouterr().out


def test_the_diff_that_adds_a_mechanism_applies_and_is_what_is_here(tmp_path: Path) -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/adding.md").read_text(encoding="utf-8"), re.DOTALL)
    shutil.copy(ROOT / "profiles/quick.yaml", tmp_path / "params.yaml")
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    added = "schoenbat/attention/linear.py"
    assert (tmp_path / added).read_text(encoding="utf-8") == (ROOT / added).read_text(encoding="utf-8")
    params = load_params(tmp_path / "params.yaml")
    assert params.grid.plain.attn == ["softmax", "mean", "linear"]
