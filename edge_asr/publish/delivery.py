"""Delivers what the outbox holds: in order, a few at a time, until the broker has acknowledged it."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from edge_asr import metrics
from edge_asr.publish.connection import Connection
from edge_asr.publish.dialect import Message
from edge_asr.publish.outbox import Outbox, Row
from edge_asr.publish.payload import delivered, to_payload
from edge_asr.publish.reasons import Refusal

log = logging.getLogger(__name__)

NOTED = 100
"""Transcripts of which it is known how long recording them took."""
READ = 100
"""Rows read from the outbox at a time."""
HOLD_S = 60.0
"""A broker that refuses transcripts is offered the next one after so long."""
FLUSH_S = 10.0
"""A flush is answered after this time at the latest."""
CUT_S = 1.0
"""A connection that ends so soon after a transcript was sent may have ended because of it."""
CUTS = 3
"""So many connections in a row are given for a transcript that was alone in flight each time."""


@dataclass(frozen=True, slots=True)
class _Flush:
    """Somebody waits until everything up to here is acknowledged and on the disk."""

    to_seq: int
    by: float
    """Monotonic seconds."""
    done: Future[Mapping[str, Any]]


class Delivery:
    """The way of the transcripts to the broker; for the publisher thread."""

    def __init__(self, outbox: Outbox, topic: str) -> None:
        self.outbox = outbox
        self.sent = 0
        """Transcripts that the broker has acknowledged."""
        self.trouble = ""
        """Why transcripts are held back, in words."""
        self._topic = topic
        self._ahead: deque[Row] = deque()  # read and not yet published, at most READ
        self._last: Row | None = None  # read last
        self._more = True  # there may be rows behind it
        self._in_flight: dict[int, tuple[Row, float]] = {}
        self._acknowledged: list[Row] = []
        self._fresh_from = math.inf
        self._replay = range(0)
        """What is published once more, though the broker has acknowledged it."""
        self._held_until = 0.0
        self._one_at_a_time = False
        self._cuts: dict[str, int] = {}  # at most one: that of the transcript that was alone in flight
        self._flushes: list[_Flush] = []  # each answers a command, of which few are obeyed at a time
        self._passed = 0  # bytes of the largest that the broker has taken
        self._failed: str | None = None  # the one whose publishing raised last
        self._recorded_ms: dict[str, float] = {}  # of the latest NOTED

    @property
    def caught_up(self) -> bool:
        """Everything that may go out now is out."""
        return not (self._ahead or self._more)

    @property
    def busy(self) -> bool:
        """Something is in flight."""
        return bool(self._in_flight)

    def record(self, offered: list[tuple[str, str]]) -> list[Row]:
        """Put transcripts, as id and payload, into the outbox."""
        began = time.perf_counter()
        rows = self.outbox.add(offered)
        took_ms = (time.perf_counter() - began) * 1e3
        self._recorded_ms.update((row.id, took_ms) for row in rows)
        while len(self._recorded_ms) > NOTED:
            del self._recorded_ms[next(iter(self._recorded_ms))]
        self._more = True
        return rows

    def content(self, row: Row, **extra: str) -> dict[str, Any]:
        """Return the JSON object of a transcript as of now."""
        age_s = self.outbox.now() - row.recorded_at
        replayed = not extra and not self._is_fresh(row)  # `said` never is, though a replay may have come to its row
        content = {**extra, **delivered(row.payload, seq=row.seq, replayed=replayed, age_s=age_s)}
        if (recorded_ms := self._recorded_ms.get(row.id)) is not None:
            content["latency_ms"]["outbox"] = round(recorded_ms, 2)
        return content

    def forget(self) -> None:
        """Publish nothing any more of what was read so far: the outbox has been erased."""
        self._replay = range(0)
        self._rewind(None)

    def begin(self) -> None:
        """Start anew on a connection: what is recorded from now on is fresh, the rest is offered again."""
        self._fresh_from = self.outbox.now()

    def send(self, connection: Connection) -> None:
        """Publish what may go out."""
        if self._held_until and (self._in_flight or time.monotonic() < self._held_until):
            return
        limit = 1 if self._one_at_a_time else connection.in_flight_limit
        while connection.up and len(self._in_flight) < limit and (row := self._next()) is not None:
            self._publish(connection, row)

    def _next(self) -> Row | None:
        if not self._ahead and self._more:
            rows = self.outbox.pending(self._last, READ, self._replay)
            self._more = len(rows) == READ
            if rows:
                self._last = rows[-1]
                flying = {row.id for row, _ in self._in_flight.values()}
                self._ahead.extend(row for row in rows if row.id not in flying)
        return self._ahead[0] if self._ahead else None

    def _publish(self, connection: Connection, row: Row) -> None:
        """Publish the row that is next; one that raises again on the next connection is set aside."""
        try:
            payload = to_payload(self.content(row))
            message_id = connection.publish(Message(self._topic, payload, qos=1))
            self._in_flight[message_id] = row, time.monotonic()
        except Exception:  # whatever it is, the transcripts behind this one must go out
            if self._failed != row.id:
                self._failed = row.id
                raise
            log.exception("the transcript %s cannot be published", row.id)
            self._set_aside(row, "it cannot be published")
        self._ahead.popleft()

    def acknowledge(self, message_id: int) -> None:
        """Note that the broker has taken what this message brought, if it was one of ours."""
        if (found := self._in_flight.pop(message_id, None)) is None:
            return
        row, sent_at = found
        metrics.ACKNOWLEDGEMENT.observe(time.monotonic() - sent_at)
        self._acknowledged.append(row)
        self._passed = max(self._passed, _size(row))
        self.sent += 1
        self._one_at_a_time = False
        self._cuts.clear()
        if self._held_until:
            log.info("the broker takes transcripts again")
            self._held_until, self.trouble = 0.0, ""

    def refuse(self, message_id: int, refusal: Refusal) -> bool:
        """Do what a refusal asks for, if it was about one of ours: hold all back for a while, or set this one aside."""
        if (found := self._in_flight.pop(message_id, None)) is None:
            return False
        row, _ = found
        if refusal.permanent:
            self._set_aside(row, refusal.why)
            return True
        if not self._held_until:
            log.warning(
                "the broker refuses transcripts: %s; they are kept, and tried every %.0f s", refusal.why, HOLD_S
            )
        self.trouble = f"the broker refuses transcripts: {refusal.why}"
        self._held_until = time.monotonic() + HOLD_S
        self._one_at_a_time = True
        self._take_back([row])
        return True

    def note(self) -> None:
        """Mark in the outbox what was acknowledged since the last call, all at once."""
        if self._acknowledged:
            self.outbox.acknowledge(self._acknowledged)
            self._acknowledged = []
        self._finish_flushes()

    def lose(self, connection: Connection | None) -> None:
        """Take back what a connection that is over had in flight: all of it is offered again."""
        self.note()
        flying = list(self._in_flight.values())
        self._in_flight.clear()
        if flying and connection is not None and connection.proven_at > -math.inf:
            self._suspect(flying)
        self._take_back([row for row, _ in flying])
        self._fresh_from = math.inf
        if self._held_until:
            self._held_until, self.trouble = 0.0, ""  # another connection may be another user

    def _take_back(self, rows: list[Row]) -> None:
        """Offer these again, and all that is pending; of a replay only what has not been acknowledged once more."""
        left = min([self._position, *(row.seq for row in rows if row.seq is not None and row.seq in self._replay)])
        self._replay = range(max(self._replay.start, left), self._replay.stop)
        self._rewind(None)

    def _suspect(self, flying: list[tuple[Row, float]]) -> None:
        """Find out whether it is a transcript that the broker hangs up on: send one alone, and count."""
        row, sent_at = flying[-1]
        if time.monotonic() - sent_at > CUT_S or all(_size(row) <= self._passed for row, _ in flying):
            return  # what is no larger than what has passed is not the reason
        self._one_at_a_time = True
        if len(flying) > 1:
            return
        self._cuts = {row.id: self._cuts.get(row.id, 0) + 1}
        if self._cuts[row.id] >= CUTS:
            self._cuts.clear()
            self._set_aside(row, f"the broker hangs up on its {_size(row)} bytes")

    def replay(self, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        """Publish everything that is kept from row `from_seq` on once more, in order; return what that is."""
        done: Future[Mapping[str, Any]] = Future()
        from_seq = arguments["from_seq"]
        kept = self.outbox.first_kept(from_seq)
        if kept is None:
            done.set_result({"asked": from_seq, "rows": 0, "from_seq": None, "to_seq": None})
            return done
        first, last, count = kept
        under_way = self._position < self._replay.stop
        self._replay = range(min(first, self._replay.start) if under_way else first, last + 1)
        if self._position > first:
            self._rewind(Row(seq=first - 1, id="", recorded_at=0.0, payload="{}"))
        done.set_result({"asked": from_seq, "rows": count, "from_seq": first, "to_seq": last})
        return done

    def flush(self, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        """Return what is done once everything recorded so far is acknowledged and on the disk, or after `FLUSH_S`."""
        self.outbox.sync()
        flush = _Flush(self.outbox.stats().last_seq or 0, time.monotonic() + FLUSH_S, Future())
        self._flushes.append(flush)
        return flush.done

    @property
    def flushing(self) -> bool:
        """Somebody waits for a flush; the disk wakes nobody."""
        return bool(self._flushes)

    def _finish_flushes(self) -> None:
        for flush in list(self._flushes):
            synced = self.outbox.synced_to >= flush.to_seq and not self.outbox.stats().trouble
            if (synced and self._has_delivered(flush.to_seq)) or time.monotonic() > flush.by:
                self._flushes.remove(flush)
                flush.done.set_result({"pending": self.outbox.stats().pending, "synced": synced})

    def _has_delivered(self, seq: int) -> bool:
        """Tell whether the broker has acknowledged everything up to this row."""
        left = self.outbox.pending(None, 1)
        return not left or (left[0].seq or 0) > seq

    def _is_fresh(self, row: Row) -> bool:
        return row.recorded_at >= self._fresh_from and row.seq not in self._replay

    def _set_aside(self, row: Row, why: str) -> None:
        log.warning("the transcript %s is set aside and not offered again: %s", row.id, why)
        self.outbox.refuse(row, why)

    def _rewind(self, after: Row | None) -> None:
        """Read on behind this row."""
        self._ahead.clear()
        self._last, self._more = after, True

    @property
    def _position(self) -> int:
        """The lowest row that may be published next; 0: any."""
        if self._ahead:
            return self._ahead[0].seq or 0
        if not self._more:
            return sys.maxsize
        return 0 if self._last is None else (self._last.seq or 0) + 1


def _size(row: Row) -> int:
    return len(row.payload.encode())
