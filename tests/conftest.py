"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mosquitto import Mosquitto, find_program


@pytest.fixture(scope="session")
def mosquitto_installed() -> None:
    """Skip what needs the real broker where it is not installed."""
    missing = [name for name in ("mosquitto", "mosquitto_sub", "mosquitto_passwd") if find_program(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: apt install mosquitto mosquitto-clients)")


@pytest.fixture
def broker(tmp_path: Path, mosquitto_installed: None) -> Iterator[Mosquitto]:
    """Yield a running Mosquitto that admits everybody."""
    server = Mosquitto(tmp_path)
    server.start()
    yield server
    server.kill()
