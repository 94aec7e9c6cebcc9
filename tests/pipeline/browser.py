"""A page in headless Chromium: what overflows, what the console says, and what axe finds."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

# Cells of a table that is wider than the page are reached by scrolling inside of it.
_TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth;
  const within = (element) => {
    const box = element.closest(".scroll");
    return box && getComputedStyle(box).overflowX !== "visible";
  };
  return [...document.querySelectorAll("body *")]
    .filter((element) => element.getBoundingClientRect().right > width + 1 && !within(element))
    .map((element) => element.outerHTML.slice(0, 100));
}"""


def executable() -> str:
    """The system's own Chromium, or the one that playwright has installed; "" if there is neither."""
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if system is not None:
        return system
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        own = started.chromium.executable_path
    return own if Path(own).is_file() else ""


def missing() -> str:
    """Why pages cannot be looked at; "" if they can."""
    try:
        import axe_playwright_python  # noqa: F401
        import playwright  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed (extra browser)"
    return "" if executable() else "no Chromium: install it, or run playwright install chromium"


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = executable()
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(width: int = 1800, height: int = 1200) -> Iterator[Any]:
    """A page; where there is no browser the test is skipped."""
    if reason := missing():
        pytest.skip(reason)
    with chromium() as browser:
        yield browser.new_page(viewport={"width": width, "height": height})


def look(
    browser: Any, page: Path, width: int, scheme: Literal["light", "dark"], media: str = "screen"
) -> dict[str, list[str]]:
    """What is wrong with the page at a width in pixels: "console", "wide" and "axe", each a list."""
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        shown = context.new_page()
        said: list[str] = []
        requested: list[str] = []
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: requested.append(request.url))
        shown.emulate_media(media=media, color_scheme=scheme)
        shown.goto(page.as_uri())
        found = Axe().run(shown).response
        assert found["passes"], "axe has looked at nothing"
        said += [url for url in requested if not url.startswith(("file:", "data:"))]
        violations = [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found["violations"]]
        return {"console": said, "wide": shown.evaluate(_TOO_WIDE), "axe": violations}
    finally:
        context.close()
