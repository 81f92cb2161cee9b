"""The daemon as a process of its own, and how to read what it publishes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from bundled import sound_of, transcripts
from mosquitto import PATIENCE_S, Subscriber, wait_for

from edge_asr.types import SAMPLE_RATE

STOP_S = 2.0
"""An idle daemon ends within this: a promise of the product."""
TEXTS = transcripts()
SENTENCES = list(TEXTS.values())


class Daemon:
    """`edge-asr run`, with standard input held open until somebody closes it, and an outbox of its own."""

    def __init__(self, log: Path, port: int, *arguments: str, program: Sequence[str] = ("-m", "edge_asr")) -> None:
        self._log = log
        quick = [f"mqtt.port={port}", "device_id=hall", "mqtt.reconnect_min_s=0.05", "mqtt.reconnect_max_s=0.1"]
        quick += [f"outbox.file={log.with_suffix('.sqlite3')}", "home_assistant.enabled=false", "http.enabled=false"]
        options = [part for option in quick for part in ("-o", option)]
        command = [sys.executable, "-W", "error", *program, "run", *options, *arguments]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_ASR_")}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment
            )

    @property
    def log(self) -> str:
        """What it has written so far; no traceback, whatever happens."""
        text = self._log.read_text(encoding="utf-8")
        assert "Traceback" not in text, text
        return text

    @property
    def complaints(self) -> list[str]:
        """The lines that are meant for the user."""
        return [line for line in self.log.splitlines() if line.startswith("edge-asr: ")]

    def wait_for(self, pattern: str) -> None:
        """Return when something in the log matches."""
        wait_for(lambda: re.search(pattern, self.log) or self.process.poll() is not None, f"{pattern!r} in the log")
        assert re.search(pattern, self.log), self.log

    def hears(self, text: str, spoken: str | None = None) -> None:
        """Speak a sentence into its standard input, and return when it has been recognised, as `text`."""
        before = self.log.count(text)
        self.is_told(spoken or text)
        wait_for(lambda: self.log.count(text) > before, f"{text} in the log")

    def is_told(self, text: str) -> None:
        """Speak a sentence into its standard input, whatever becomes of it."""
        assert self.process.stdin is not None
        self.process.stdin.write(spoken(text))
        self.process.stdin.flush()

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Return the exit code of a daemon that ends, or has been asked to."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end: {self.log}")

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout_s: float = STOP_S) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(how)
        return self.end(timeout_s)


Start = Callable[..., Daemon]


def spoken(text: str) -> bytes:
    """Return a sample with a second of silence after it, as raw PCM."""
    name = next(name for name, known in TEXTS.items() if known == text)
    samples = np.concatenate([sound_of(name), np.zeros(SAMPLE_RATE, np.float32)])
    return (samples * 32767).astype("<i2").tobytes()


def texts_on(subscriber: Subscriber, topic: str) -> list[str]:
    return [message.json["text"] for message in subscriber.on(topic)]


def statuses(subscriber: Subscriber) -> list[str]:
    return [message.payload for message in subscriber.on("status")]


def states(subscriber: Subscriber) -> list[str]:
    """Return the states passed through: one that is published again counts once."""
    found = [message.json["state"] for message in subscriber.on("state")]
    return [state for k, state in enumerate(found) if k == 0 or found[k - 1] != state]


def is_ready(subscriber: Subscriber) -> bool:
    return states(subscriber)[-1:] == ["ready"]


def is_offline(subscriber: Subscriber) -> bool:
    return statuses(subscriber)[-1:] == ["offline"]
