"""To whom the appliance listens: to everybody, to whoever asked for it, or to whoever begins with a wake phrase."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from edge_asr import metrics
from edge_asr.recognizer.tokens import join
from edge_asr.types import Recognition

ALWAYS, PUSH_TO_TALK, PHRASE = "always", "push_to_talk", "phrase"
HEAD_START_S = 1.0
"""What began so long before it was asked to listen is heard too: people speak while they still press the button."""
REMEMBERED = 8
"""Times of listening that what waits for its recognition may have begun in."""


class WakePhrase(Protocol):
    """How an address is told."""

    def after(self, tokens: Sequence[str]) -> int | None:
        """Return how many tokens at the beginning are a wake phrase; None: they do not begin with one."""

    def may_follow(self, tokens: Sequence[str]) -> bool:
        """Tell whether a text that goes on begins with a wake phrase, or may yet do so."""


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
        self._times: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        """From when to when (exclusive) what began is heard, whoever says it."""
        self._ears: list[Attention] = []
        self._ignored_at = -math.inf

    def use(self, mode: str, wake_phrase: WakePhrase | None) -> None:
        """Listen to others from now on."""
        for one in (self, *self._ears):
            one.mode, one._wake_phrase = mode, wake_phrase

    def ear(self) -> Attention:
        """Return the attention of one source: it does what this one is asked to, but its wake phrases are its own."""
        self._ears.append(Attention(self.mode, self._wake_phrase, self._seconds, self._clock))
        return self._ears[-1]

    def listen(self, seconds: float | None = None) -> float:
        """Listen to everybody for so many seconds, the configured ones if None; return how many."""
        wanted = self._seconds if seconds is None else seconds
        for one in (self, *self._ears):
            one._listen_from(self._clock() - HEAD_START_S, wanted)
        return wanted

    def ignore(self) -> None:
        """End that: what begins from now on is nobody's; what began before is heard to its end."""
        for one in (self, *self._ears):
            one._end()
            one._ignored_at = self._clock()

    def hears(self, started_at: float) -> bool:
        """Tell whether a segment that began at `started_at` (monotonic seconds) is worth recognising."""
        return self.mode != PUSH_TO_TALK or self._listened(started_at)

    def admit(self, recognition: Recognition, started_at: float) -> Recognition | None:
        """Return what is meant for us of a recognition, without the wake phrase; None: nothing is.

        A wake phrase on its own is nothing, but then it listens for a while.
        """
        said = self._meant(recognition, started_at)
        if said is None:
            metrics.UNADDRESSED.labels(self.mode).inc()
        elif recognition.tokens and not said.tokens:
            if started_at >= self._ignored_at:
                self._listen_from(started_at, self._seconds)  # what followed may wait for its recognition already
            return None
        return said

    def preview(self, recognition: Recognition, started_at: float) -> Recognition | None:
        """Return as `admit` what may be shown of a segment that goes on."""
        said = self._meant(recognition, started_at)
        if said is recognition and self.mode == PHRASE and self._may_be_addressed(recognition):
            return None  # the wake phrase itself is not shown
        return said if said is not None and said.tokens else None

    def _listen_from(self, since: float, seconds: float) -> None:
        self._end()
        self._times.append((since, self._clock() + seconds))

    def _end(self) -> None:
        if self._times:
            since, until = self._times[-1]
            self._times[-1] = since, min(until, self._clock())

    def _listened(self, started_at: float) -> bool:
        return any(since <= started_at < until for since, until in self._times)

    def _meant(self, recognition: Recognition, started_at: float) -> Recognition | None:
        """Return the recognition, without a wake phrase where it begins with one; None: it is not for us."""
        addressed = self._addressed(recognition) if self.mode == PHRASE else None
        if addressed is not None:
            return addressed
        return recognition if self.mode == ALWAYS or self._listened(started_at) else None

    def _may_be_addressed(self, recognition: Recognition) -> bool:
        assert self._wake_phrase is not None
        return self._wake_phrase.may_follow([token.text for token in recognition.tokens])

    def _addressed(self, recognition: Recognition) -> Recognition | None:
        assert self._wake_phrase is not None
        count = self._wake_phrase.after([token.text for token in recognition.tokens])
        if count is None:
            return None
        tokens = recognition.tokens[count:]
        return dataclasses.replace(recognition, text=join([token.text for token in tokens]), tokens=tokens)
