"""The pictures of the page in docs/, of an appliance that hears the bundled recordings for two minutes.

Run with `PYTHONPATH=tests python -m bench.screenshots`.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from browser import Browser, chromium, expect, fresh_page
from bundled import REPOSITORY
from speech_server import serving

from bench.load import bundled_sentences, make_tape

SECONDS = 120.0
PICTURES: dict[str, dict[str, Any]] = {
    "page.png": {"viewport": {"width": 1200, "height": 1040}},
    "page-phone.png": {
        "viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "color_scheme": "dark", "locale": "zh-CN",
    },
}  # fmt: skip


def main() -> None:
    """Let an appliance listen, and look at its page."""
    with tempfile.TemporaryDirectory() as folder:
        tape = Path(folder) / "tape.wav"
        make_tape(tape, bundled_sentences(), SECONDS)
        source = {"kind": "file", "path": tape, "name": "desk"}
        appliance = serving(state_dir=Path(folder) / "state", sources=[source], segment={"preset": "aggressive"})
        with appliance as server, chromium() as browser:
            take_pictures(browser, server.url)


def take_pictures(browser: Browser, url: str) -> None:
    """Have all pages open while it listens, and take their pictures in the middle of a sentence."""
    with ExitStack() as stack:
        pages = {name: stack.enter_context(fresh_page(browser, **options)) for name, options in PICTURES.items()}
        for page in pages.values():
            page.goto(url)
        page.wait_for_timeout((SECONDS - 20) * 1e3)
        for name, page in pages.items():
            expect(page.locator("#partials .text")).to_have_count(1)
            page.screenshot(path=REPOSITORY / "docs" / name)
            print(f"docs/{name}")


if __name__ == "__main__":
    main()
