"""Logging: one line an entry on standard error, no spoken text at INFO."""

from __future__ import annotations

import logging


def set_up(level: str) -> None:
    """Send records of `level` and above to standard error; systemd and containers add the time themselves."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True)
