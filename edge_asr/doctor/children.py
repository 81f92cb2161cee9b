"""Starts a probe in a process of its own, and says how it ended."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

LIMIT_S = 30.0
"""How long a library may take to load; from a cold SD card TensorRT takes several seconds."""
KILL_S = 1.0
"""How long a killed child is waited for: one that hangs inside a driver cannot be killed."""

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a library said of itself, or why it said nothing."""

    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """Why there are no facts, in words; None where there are."""
    missing: str | None = None
    """The Python module that is not installed, where that is why."""


def ask(subject: str, limit_s: float = LIMIT_S) -> Answer:
    """Return what the probe of `subject` says within `limit_s` seconds."""
    # As in the loader: with our own sys.path the child imports what we would.
    code = f"import sys; sys.path[:] = {sys.path!a}; from edge_asr.doctor.probe import main; main({subject!a})"
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        return Answer(error=f"no process could be started to load it ({error})")
    try:
        said, complaints = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=KILL_S)
        return Answer(error=f"it hung: not loaded after {limit_s:g} s")
    return _answer(child.returncode, said, complaints)


def _answer(code: int, said: bytes, complaints: bytes) -> Answer:
    last = _last_line(complaints)
    if code < 0:
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        return Answer(error=f"loading it crashed with {name}{f' ({last})' if last else ''}")
    try:
        facts = json.loads(said)
    except ValueError:
        return Answer(error=f"loading it ended the process with {code}{f' ({last})' if last else ''}")
    if error := facts.pop("error", None):
        return Answer(error=" ".join(error.split()), missing=facts.get("missing"))
    return Answer({**facts, "complaint": last})


def _last_line(complaints: bytes) -> str:
    text = COLOUR.sub("", complaints.decode(errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
