"""Opens HTML pages in a headless browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
Visit = tuple[Page, list[str], list[str]]
"""The page, the URLs that it requested, and its console messages."""


@contextmanager
def started() -> Iterator[Browser]:
    if not (chromium := shutil.which("chromium") or shutil.which("chromium-browser")):
        missing = pytest.fail if "BROWSER_REQUIRED" in os.environ else pytest.skip
        missing("no chromium here (Debian: apt-get install chromium)")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield browser
        browser.close()


def visit(browser: Browser, html: Path) -> Visit:
    requests: list[str] = []
    messages: list[str] = []
    view = browser.new_page(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    view.on("request", lambda request: requests.append(request.url))
    view.on("console", lambda message: messages.append(message.text))
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.goto(html.as_uri())
    return view, requests, messages
