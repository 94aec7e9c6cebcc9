"""Take docs/figures/mlflow.png: the page at which `schoenbat-exp ui` opens MLflow, in a checkout that has run a grid.

    schoenbat-exp ui --profile quick                # prints the address, and serves it until Ctrl-C
    python docs/figures/picture_mlflow.py ADDRESS [--task recall-mqar] [--seed 42]

It needs the extra `browser` and a Chromium, the system's own or the one that `playwright install chromium` brings.
"""

import argparse
import shutil
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode

from playwright.sync_api import Page, sync_playwright

WIDTH, HEIGHT = 1500, 1150
PATIENCE = 60_000
"""Milliseconds for the page to appear."""
SETTLING = 5_000
"""Milliseconds after which the other charts are drawn as well."""


def take(address: str, picture: Path) -> None:
    """Save what a browser shows at `address` once the curves are drawn."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(address)
            _wait_for_curves(page)
            # The panel of MLflow's assistant takes a quarter of the page.
            page.get_by_role("button", name="Close", exact=True).click()
            page.wait_for_timeout(SETTLING)
            page.screenshot(path=picture)
        finally:
            browser.close()


def narrowed(address: str, task: str, seed: str) -> str:
    """Return the address of the same page with the cells of one task and seed alone."""
    start, mark, query = address.partition("?")
    values = dict(parse_qsl(query))
    values["searchFilter"] += f" and params.task = '{task}' and params.seed = '{seed}'"
    return start + mark + urlencode(values, quote_via=quote)


def _wait_for_curves(page: Page) -> None:
    page.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for(timeout=PATIENCE)
    page.get_by_text("dev_accuracy", exact=True).first.scroll_into_view_if_needed(timeout=PATIENCE)
    # The page asks its server again and again, so it is never idle.
    page.wait_for_timeout(SETTLING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--task", default="recall-mqar")
    parser.add_argument("--seed", default="42")
    chosen = parser.parse_args()
    take(narrowed(chosen.address, chosen.task, chosen.seed), Path(__file__).with_name("mlflow.png"))


if __name__ == "__main__":
    main()
