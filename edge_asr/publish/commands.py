"""Commands from MQTT: which messages are one, what they mean, how many are too many, and what is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from edge_asr.errors import EdgeAsrError

Command = Callable[[str, Mapping[str, Any]], "Future[Mapping[str, Any]]"]
"""Obeys a command, given by its name and typed arguments, without blocking; the future holds what to answer."""


class CommandError(EdgeAsrError):
    """A command cannot be obeyed; its text is the answer."""
