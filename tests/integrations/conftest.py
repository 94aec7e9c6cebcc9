"""Marks that transformers' own tests carry, where SCHOENBAT_TRANSFORMERS_TESTS names their folder."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    folder, package = os.environ.get("SCHOENBAT_TRANSFORMERS_TESTS"), find_spec("transformers")
    if not folder or package is None or package.origin is None:
        return
    files = [Path(package.origin).with_name("testing_utils.py"), *Path(folder).rglob("test_*.py")]
    for name in sorted({name for file in files for name in re.findall(r"\bmark\.(\w+)", file.read_text("utf-8"))}):
        config.addinivalue_line("markers", f"{name}: of transformers")
