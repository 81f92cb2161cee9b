"""What is being said right now, on its way to the publisher thread: the latest of each segment, and briefly."""

from __future__ import annotations

import threading

from edge_asr.types import Partial, SegmentId

LIMIT = 64
"""Segments of which a partial waits; one more drops the oldest. A source has one, and the thread takes them at once."""


class Partials:
    """The latest partial of each segment that the publisher thread has yet to take; any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: dict[SegmentId, Partial] = {}

    def add(self, partial: Partial) -> None:
        """Let it wait in the place of the one before; an `end` stays: nothing comes after it."""
        with self._lock:
            before = self._latest.pop(partial.id, None)
            self._latest[partial.id] = before if before is not None and before.end else partial
            if len(self._latest) > LIMIT:
                del self._latest[next(iter(self._latest))]

    def forget(self, segment: SegmentId) -> None:
        """The transcript is there: whatever of it waits is outdated."""
        with self._lock:
            self._latest.pop(segment, None)

    def take(self) -> list[Partial]:
        """Return what waits, the one that has not changed for longest first, and forget it."""
        with self._lock:
            taken = list(self._latest.values())
            self._latest.clear()
        return taken
