"""What was spoken just now, for acting on: published at once or never."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge_asr import metrics
from edge_asr.publish.connection import Connection
from edge_asr.publish.outbox import Row
from edge_asr.types import Transcript

LIMIT = 1000
"""Transcripts that wait for the broker to show that it is alive; one more drops the oldest, counted."""


@dataclass(frozen=True, slots=True)
class _Spoken:
    row: Row
    offered_at: float
    """Monotonic seconds."""
    ended_at: float
    """When its speech was seen to have ended (monotonic seconds); the offer, where it did not come in live."""


class Live:
    """The transcripts for `said`; for the publisher thread.

    A broker that hangs takes bytes all the same, and would deliver a command when it wakes up. So `said` goes out once
    the broker has acknowledged something that was sent since: as a rule the transcript itself. It costs a round trip.
    """

    def __init__(self, live_for_s: float) -> None:
        self._live_for_s = live_for_s
        self._waiting: deque[_Spoken] = deque()
        self.said = self.dropped = 0

    def add(self, transcript: Transcript, row: Row, offered_at: float, connection: Connection | None) -> None:
        """Take a transcript that has just been recorded."""
        if transcript.lost:
            return  # there is nothing to act on
        if connection is None or not connection.up:
            self._drop()
            return
        marks = transcript.marks
        self._waiting.append(_Spoken(row, offered_at, offered_at if marks is None else marks.segment_ended_at))
        if len(self._waiting) > LIMIT:
            self._waiting.popleft()
            self._drop()

    def send(self, connection: Connection, publish: Callable[[Mapping[str, Any]], None], content: Content) -> None:
        """Hand what may go out now to `publish`, as the JSON object that `content` makes of it."""
        while self._waiting:
            spoken = self._waiting[0]
            if time.monotonic() - spoken.ended_at > self._live_for_s:
                self._waiting.popleft()
                self._drop()
            elif connection.clear and connection.proven_at >= spoken.offered_at:
                publish(content(spoken.row, event_type="said"))
                self._waiting.popleft()
                self.said += 1
            else:
                return

    def next_end(self) -> float | None:
        """Return the moment (monotonic seconds) from which the first that waits is too old."""
        return self._waiting[0].ended_at + self._live_for_s if self._waiting else None

    def forget(self) -> None:
        """Drop what waits: the connection of its moment is over."""
        while self._waiting:
            self._waiting.popleft()
            self._drop()

    def _drop(self) -> None:
        self.dropped += 1
        metrics.DROPPED_SAID.inc()


Content = Callable[..., dict[str, Any]]
