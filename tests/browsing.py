"""A real browser for the tests: Debian's chromium by playwright, which may reach nothing but this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = "/usr/bin/chromium"
needs_browser = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="Debian's chromium is not installed")
WAIT_MS = 30_000


@contextmanager
def browser_page() -> Iterator[object]:
    """A page of a browser of its own. Whatever a page logs as an error fails the test."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(WAIT_MS)
        raised = []
        page.on("pageerror", lambda error: raised.append(str(error)))
        try:
            yield page
        finally:
            browser.close()
        assert raised == []


def picture(page, name: str) -> None:
    """`make pictures` keeps what the documents show."""
    if folder := os.environ.get("PICTURES"):
        page.screenshot(path=Path(folder) / name, full_page=True)
