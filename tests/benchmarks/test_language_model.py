"""The program that says what a drop-in costs a trained model prints the loss through each estimate."""

import re
import runpy
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks/language_model.py"


def test_each_estimate_is_named_with_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, model = tmp_path / "text", tmp_path / "model.pt"
    text.write_bytes(b"the cat sat on the mat. " * 800)
    program = runpy.run_path(str(PROGRAM))
    settings = program["main"].__globals__
    settings.update(BATCH=2, TEST_BATCHES=1, LENGTH=192)
    for arguments in (["train", text, model, "--steps", "1", "--batch-size", "2"], ["compare", text, model]):
        options = [] if arguments[0] == "train" else ["--features", "8"]
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, arguments), *options])
        program["main"]()
    found = re.findall(r"^([a-z]+(?: 8)?): (\d\.\d{3})$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in found] == ["softmax", "softmax", "uniform", "sketch 8", "calibrated 8", "maclaurin 8"]
    assert found[0] == found[1]
