"""A real Chromium without a window, and what it complains of."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from mosquitto import PATIENCE_S
from playwright.sync_api import Browser as Browser  # who drives one finds all of it here
from playwright.sync_api import Page as Page
from playwright.sync_api import expect as expect
from playwright.sync_api import sync_playwright

AXE = resources.files("axe_playwright_python") / "axe.min.js"
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
"""As root, in a container."""
DROP = """([selector, name, type, data]) => {
    const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, {type}));
    const target = document.querySelector(selector);
    for (const kind of ["dragenter", "dragover", "drop"])
        target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer}));
}"""
"""What a browser does when a person drops a file."""


expect.set_options(timeout=PATIENCE_S * 1e3)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield a browser. While it is there this thread runs no other event loop: not for tests that are coroutines."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("not installed: chromium (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def fresh_page(browser: Browser, *, may_complain_of: str | None = None, **options: Any) -> Iterator[Page]:
    """Yield a page of somebody who was never here; fail where it complains: on its console, or of a lost request.

    `options`: viewport, locale, color_scheme and others of Playwright's. `may_complain_of`: what a complaint may say.
    """
    complaints: list[str] = []
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_S * 1e3)
    page = context.new_page()
    page.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
    page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}: {request.failure}"))
    try:
        yield page
    finally:
        context.close()
    left = [line for line in complaints if may_complain_of is None or may_complain_of not in line]
    assert not left, "\n".join(left)


def violations(page: Page) -> list[str]:
    """Return what axe-core finds: rules of WCAG 2.2 AA and good practice that the page breaks, and where."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{rule['id']} ({rule['impact']}): {rule['help']}: {node['html']}" for rule in found for node in rule["nodes"]
    ]


def drop(page: Page, selector: str, path: Path, kind: str = "audio/wav") -> None:
    """Drop a file on an element."""
    page.evaluate(DROP, [selector, path.name, kind, base64.b64encode(path.read_bytes()).decode()])
