"""A headless browser for tests: the system's own Chromium, or the one that playwright has installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def open_page(width: int = 1800, height: int = 1200) -> Iterator[Any]:
    """A page; where there is no browser the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e 'pipeline[browser]'")
    with playwright.sync_playwright() as running:
        installed = Path(running.chromium.executable_path)
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if path is None and not installed.is_file():
            pytest.skip("no Chromium: install it, or run playwright install chromium")
        browser = running.chromium.launch(executable_path=path or str(installed), args=["--no-sandbox"])
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()
