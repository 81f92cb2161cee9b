"""What an outbox holds and tells, and one that holds it in memory."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edge_asr import metrics

log = logging.getLogger(__name__)

MEMORY_LIMIT = 1000
"""Transcripts held in memory; one more drops the oldest, counted."""
NO_SEQS = range(0)


@dataclass(frozen=True, slots=True)
class Row:
    """A recorded transcript."""

    seq: int | None
    """Strictly increasing, never used twice; None: it is in memory only."""
    id: str
    recorded_at: float
    """Unix seconds, by the steady clock of the outbox."""
    payload: str
    """JSON of the transcript as it was when recorded."""
    acknowledged: bool = False
    place: int = dataclasses.field(default=0, compare=False)
    """Place among the rows of this process that are, or were, in memory only; from 1 on."""


@dataclass(frozen=True, slots=True)
class OutboxStats:
    """How an outbox is doing."""

    rows: int
    """All that is kept, in memory too."""
    pending: int
    """Not acknowledged; without those set aside."""
    first_seq: int | None
    """The lowest that is kept."""
    last_seq: int | None
    """The highest that was ever given."""
    oldest_s: float | None
    """Age of the oldest pending one."""
    dropped: int
    """Given up before the broker had them, since the start."""
    refused: int
    """Set aside because the broker will never take them, since the start."""
    trouble: str
    """What is wrong, in one line with the remedy; empty: all is well."""

    def to_json(self) -> dict[str, Any]:
        """Return what `state` says of it."""
        fields = dataclasses.asdict(self)
        oldest_s = fields["oldest_s"]
        return {**fields, "oldest_s": None if oldest_s is None else round(oldest_s, 1)}


class SteadyClock:
    """Unix seconds that never jump: the time of day at the start, and what has passed since."""

    def __init__(self) -> None:
        self._anchor = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Return unix seconds."""
        return self._anchor + time.monotonic()


class Outbox(Protocol):
    """Keeps transcripts until the broker has them. Of one thread, `stats`, `now` and `close` of any."""

    @property
    def synced_to(self) -> int:
        """The highest `seq` known to be on stable storage."""

    def add(self, offered: Sequence[tuple[str, str]]) -> list[Row]:
        """Record (id, payload) pairs, in order; never raises because of the disk."""

    def pending(self, after: Row | None, limit: int, replay: range = NO_SEQS) -> list[Row]:
        """Return at most `limit` rows to publish behind `after`, in order: what is pending, or has its seq in `replay`.

        What was set aside is never among them.
        """

    def acknowledge(self, rows: Iterable[Row]) -> None:
        """Mark rows that the broker has; a second time is harmless."""

    def refuse(self, row: Row, why: str) -> None:
        """Set a row aside that the broker will never take."""

    def first_kept(self, from_seq: int) -> tuple[int, int, int] | None:
        """Return first seq, last seq and number of the rows from `from_seq` on that can be replayed."""

    def tend(self, online: bool) -> bool:
        """Do the housekeeping; to be called about once a second. True: all was erased, what was given out too."""

    def sync(self) -> None:
        """Ask for everything recorded to be put on stable storage as soon as possible."""

    def stats(self) -> OutboxStats:
        """Return how it is doing."""

    def now(self) -> float:
        """Return unix seconds by the clock that `recorded_at` comes from."""

    def close(self) -> None:
        """Put everything on stable storage and let go of the file."""


class MemoryOutbox:
    """Keeps the newest transcripts in memory; they are lost when the process ends, and cannot be replayed."""

    synced_to = -1

    def __init__(self, clock: SteadyClock | None = None, limit: int = MEMORY_LIMIT) -> None:
        self.now = clock or SteadyClock()
        self.limit = limit
        self._rows: deque[Row] = deque()
        self.places = 0
        """Rows taken so far."""
        self.dropped = self.refused = 0
        self._full = False
        """It has been said that the oldest are dropped."""

    @property
    def rows(self) -> Sequence[Row]:
        """What is held, in order."""
        return self._rows

    def add(self, offered: Sequence[tuple[str, str]]) -> list[Row]:
        """Take (id, payload) pairs; the oldest go where there is no room, counted."""
        added = []
        for identity, payload in offered:
            self.places += 1
            added.append(Row(None, identity, self.now(), payload, place=self.places))
        self._rows.extend(added)
        self._drop(len(self._rows) - self.limit)
        return added

    def _drop(self, count: int) -> None:
        if count > 0 and not self._full:
            log.warning("%d transcripts wait for the broker: from now on the oldest are dropped", self.limit)
        self._full = count > 0 or (self._full and bool(self._rows))
        for _ in range(count):
            self._rows.popleft()
            self.dropped += 1
            metrics.DROPPED_TRANSCRIPTS.inc()

    def pending(self, after: Row | None, limit: int, replay: range = NO_SEQS) -> list[Row]:
        """Return at most `limit` rows behind `after`; there is nothing to replay."""
        place = 0 if after is None else after.place
        return [row for row in self._rows if row.place > place][:limit]

    def acknowledge(self, rows: Iterable[Row]) -> None:
        """Forget rows that the broker has."""
        places = {row.place for row in rows}
        self._rows = deque(row for row in self._rows if row.place not in places)

    def refuse(self, row: Row, why: str) -> None:
        """Forget a row that the broker will never take, counted."""
        if row in self._rows:
            self.refused += 1
            metrics.OUTBOX_REFUSED.inc()
            self.acknowledge([row])

    def first_kept(self, from_seq: int) -> tuple[int, int, int] | None:
        """Return None: nothing is kept that could be replayed."""

    def tend(self, online: bool) -> bool:
        """Show the metrics."""
        show(self.stats())
        return False

    def sync(self) -> None:
        """Do nothing: there is no storage."""

    def stats(self) -> OutboxStats:
        """Return how it is doing."""
        rows = tuple(self._rows)
        oldest_s = self.now() - rows[0].recorded_at if rows else None
        return OutboxStats(len(rows), len(rows), None, None, oldest_s, self.dropped, self.refused, "")

    def close(self) -> None:
        """Give up what is left, counted."""
        self.limit = 0
        self._full = True
        self._drop(len(self._rows))


def show(stats: OutboxStats) -> None:
    """Put what an outbox tells into the metrics."""
    metrics.OUTBOX_ROWS.set(stats.rows)
    metrics.OUTBOX_PENDING.set(stats.pending)
    metrics.OUTBOX_OLDEST.set(stats.oldest_s or 0.0)
