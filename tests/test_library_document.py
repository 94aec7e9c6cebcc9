"""The examples of docs/library.md run as they stand."""

import importlib.util
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "library.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_there_is_one_example_for_each_piece() -> None:
    assert len(EXAMPLES) == 7
    assert all(len(example.splitlines()) <= 12 for example in EXAMPLES)


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=["functional", "diagnose", "module", "calibrate", "step", "transformers", "export"]
)
def test_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "onnx" in example and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("needs the extra schoenbat[onnx]")
    if "transformers" in example and importlib.util.find_spec("transformers") is None:
        pytest.skip("needs the extra schoenbat[hf]")
    exec(compile(example, "docs/library.md", "exec"), {})
