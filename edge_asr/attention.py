"""To whom the appliance listens: to everybody, to whoever asked for it, or to whoever begins with a wake phrase."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Protocol

from edge_asr import metrics
from edge_asr.recognizer.tokens import join
from edge_asr.types import Recognition

ALWAYS, PUSH_TO_TALK, PHRASE = "always", "push_to_talk", "phrase"


class WakePhrase(Protocol):
    """How an address is told."""

    def after(self, tokens: tuple[str, ...]) -> int | None:
        """Return how many tokens at the beginning are a wake phrase; None: they do not begin with one."""


class Attention:
    """Decides what is heard; for the event loop's thread."""

    def __init__(
        self,
        mode: str = ALWAYS,
        wake_phrase: WakePhrase | None = None,
        seconds: float = 8.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`seconds`: how long it listens when asked to, or after a wake phrase on its own."""
        self.mode = mode
        self._wake_phrase = wake_phrase
        self._seconds = seconds
        self._clock = clock
        self._until = -math.inf

    def listen(self, seconds: float | None = None) -> float:
        """Listen to everybody for so many seconds, the configured ones if None; return how many."""
        wanted = self._seconds if seconds is None else seconds
        self._until = self._clock() + wanted
        return wanted

    def ignore(self) -> None:
        """End that."""
        self._until = -math.inf

    def hears(self, started_at: float) -> bool:
        """Tell whether a segment that began at `started_at` (monotonic seconds) is worth recognising."""
        return self.mode != PUSH_TO_TALK or self._until >= started_at

    def admit(self, recognition: Recognition, started_at: float) -> Recognition | None:
        """Return what is meant for us of a recognition, without the wake phrase; None: nothing is.

        A wake phrase on its own is nothing, but then it listens for a while.
        """
        if self.mode == ALWAYS or self._until >= started_at:
            return recognition
        said = self._addressed(recognition) if self.mode == PHRASE else None
        if said is None:
            metrics.UNADDRESSED.labels(self.mode).inc()
        elif not said.tokens:
            self.listen()
            return None
        return said

    def preview(self, recognition: Recognition, started_at: float) -> Recognition | None:
        """Return as `admit` what may be shown of a segment that goes on."""
        if self.mode == ALWAYS or self._until >= started_at:
            return recognition
        said = self._addressed(recognition) if self.mode == PHRASE else None
        return said if said is not None and said.tokens else None

    def _addressed(self, recognition: Recognition) -> Recognition | None:
        assert self._wake_phrase is not None
        count = self._wake_phrase.after(tuple(token.text for token in recognition.tokens))
        if count is None:
            return None
        tokens = recognition.tokens[count:]
        return dataclasses.replace(recognition, text=join([token.text for token in tokens]), tokens=tokens)
