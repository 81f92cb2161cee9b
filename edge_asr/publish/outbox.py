"""The outbox: transcripts on disk until the broker has them, in memory while the disk does not play along."""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from edge_asr import metrics
from edge_asr.config_mqtt import OutboxConfig
from edge_asr.errors import ConfigError
from edge_asr.publish.outbox_erasure import Erased, Wish, remove_damaged
from edge_asr.publish.outbox_file import PRUNED_AT_ONCE, OutboxFile, Owner
from edge_asr.publish.outbox_rows import NO_SEQS, MemoryOutbox, Outbox, OutboxStats, Row, SteadyClock, show
from edge_asr.publish.outbox_schema import Connect, is_damage
from edge_asr.publish.outbox_trouble import in_words, is_full, leaves_file_usable

__all__ = ["DiskOutbox", "MemoryOutbox", "Outbox", "OutboxStats", "Row", "outbox_path"]

log = logging.getLogger(__name__)

RETRY_S = 10.0
"""The disk is tried again so often while it does not play along."""
AGES_EVERY_S = 60.0
"""How often the ages of all pending rows are looked at."""
CLOSE_S = 5.0
"""How long `close` waits for the disk."""
BOUNDS = 2000
FAULTS = (sqlite3.Error, OSError)
T = TypeVar("T")


def outbox_path(config: OutboxConfig, state_dir: Path) -> Path:
    """Return where the outbox's file is."""
    return config.file or state_dir / "outbox.sqlite3"


class DiskOutbox:
    """Keeps transcripts in an SQLite file; nothing that the disk does is raised, see `trouble` in the statistics.

    What cannot be written is kept in memory (the newest 1000), and moves to the file in order when it can be.
    """

    def __init__(self, config: OutboxConfig, path: Path, *, connect: Connect = sqlite3.connect) -> None:
        """Open or make the file; raise ConfigError if another process has it."""
        self.now = SteadyClock()
        self._config, self._path, self._connect = config, path, connect
        self._max_bytes = int(config.max_mb * 1e6)
        self._memory = MemoryOutbox(self.now)
        self._moved: dict[int, tuple[int, str]] = {}  # rows that went to the file: seq and id, by their place in memory
        self._bounds: list[tuple[int, int]] = []  # of those that did, place and seq, rising: what is behind a place
        self._owed: dict[int, str | None] = {}  # settled, and the disk has not taken it: why refused, by seq
        self._offered_to = 0  # seq of the last row that `pending` gave out
        self._owner: Owner | None = None
        self._file: OutboxFile | None = None
        self._left: OutboxFile | None = None  # closed because of a fault; its thread may still be busy
        self._last_seq = self._synced_to = 0
        self._online = False
        self._dropped = self._refused = 0
        self._kept = 0  # pending in the file, while that is closed
        self._dropping = False
        self._wish = Wish(path)
        self._heeded: tuple[int, int] | None = None  # the wish that was there last
        self._erased = (0, 0)  # for that: rows, and those pending; the log may still hold them
        self._trouble = self._sync_trouble = ""
        self._retry_at = self._ages_at = -math.inf
        try:
            self._last_seq = self._open().last_seq
        except FAULTS as error:
            self._fail(error)
        self._look()

    def _open(self) -> OutboxFile:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._owner is None:
            self._owner = Owner(self._path)
        self._file = OutboxFile(self._path, self._connect, self._last_seq)
        self._file.syncing.set_online(self._online)
        self._file.date_anew(self.now())
        return self._file

    @property
    def synced_to(self) -> int:
        """The highest `seq` known to be on stable storage."""
        file = self._file
        return self._synced_to if file is None else file.syncing.synced_to

    def add(self, offered: Sequence[tuple[str, str]]) -> list[Row]:
        """Record (id, payload) pairs, in order, in one transaction."""
        recorded_at = self.now()
        rows = self._write(lambda file: file.add((identity, recorded_at, payload) for identity, payload in offered))
        if rows is None:
            rows = self._memory.add(offered)
        else:
            self._prune_size()
        self._look()
        return rows

    def pending(self, after: Row | None, limit: int, replay: range = NO_SEQS) -> list[Row]:
        """Return at most `limit` rows behind `after`: those in the file by seq, then those in memory."""
        seq, last = self._locate(after)
        found = [] if seq is None else self._read_pending(seq, limit, replay)
        if found:
            self._offered_to = max(self._offered_to, found[-1].seq or 0)
        return found + self._memory.pending(last, limit - len(found))

    def _locate(self, after: Row | None) -> tuple[int | None, Row | None]:
        """Return the seq and the row in memory behind which it goes on; no seq: behind all that is in the file."""
        if after is None:
            return 0, None
        if after.seq is not None:
            return after.seq, None
        if not self._bounds or after.place > self._bounds[-1][0]:
            return None, after
        index = bisect_right(self._bounds, (after.place, math.inf))
        return (self._bounds[index - 1][1] if index else self._bounds[0][1] - 1), None

    def _read_pending(self, after: int, limit: int, replay: range) -> list[Row]:
        rows: list[Row] = []
        while self._file is not None and len(rows) < limit:
            try:
                found = self._file.pending(after, limit, replay)
            except FAULTS as error:
                self._fail(error)
                break
            rows += [row for row in found if not self._is_settled(row, replay)]
            if len(found) < limit:
                break
            after = found[-1].seq or 0
        return rows[:limit]

    def _is_settled(self, row: Row, replay: range) -> bool:
        """Tell whether a row is settled, which the disk has not taken yet, and not to be offered."""
        if row.seq not in self._owed:
            return False
        return self._owed[row.seq] is not None or row.seq not in replay

    def acknowledge(self, rows: Iterable[Row]) -> None:
        """Mark rows that the broker has, in one transaction."""
        self._settle(rows)
        self._look()

    def refuse(self, row: Row, why: str) -> None:
        """Set a row aside that the broker will never take, counted."""
        before = self._count_pending()
        self._settle([row], why)
        if self._count_pending() < before:
            self._refused += 1
            metrics.OUTBOX_REFUSED.inc()
        self._look()

    def _count_pending(self) -> int:
        in_file = self._kept if self._file is None else self._file.pending_count
        return in_file - len(self._owed) + len(self._memory.rows)

    def _settle(self, rows: Iterable[Row], refused: str | None = None) -> None:
        seqs, in_memory = [], []
        for row in rows:
            seq, identity = (row.seq, row.id) if row.seq is not None else self._moved.get(row.place, (None, ""))
            if seq is not None and identity == row.id:
                seqs.append(seq)
            else:
                in_memory.append(row)
        if in_memory:
            self._memory.acknowledge(in_memory)
        if seqs and self._write(lambda file: file.settle(seqs, self.now(), refused)) is None:
            for seq in seqs:
                self._owed.setdefault(seq, refused)

    def first_kept(self, from_seq: int) -> tuple[int, int, int] | None:
        """Return first seq, last seq and number of the rows from `from_seq` on that can be replayed."""
        if self._file is None:
            return None
        try:
            return self._file.first_kept(from_seq)
        except FAULTS as error:
            self._fail(error)
            return None

    def tend(self, online: bool) -> bool:
        """Try the disk again, drop what is too old or too much, a few hundred rows a call, and show the metrics.

        Return whether all was erased, because somebody asked for that.
        """
        self._online = online
        if self._file is not None:
            self._file.syncing.set_online(online)
        if self._trouble and time.monotonic() >= self._retry_at:
            self._revive()
        erased = self._heed_wish()
        self._prune_ages()
        self._prune_size()
        self._watch()
        self._look()
        show(self.stats())
        return erased

    def _heed_wish(self) -> bool:
        """Erase everything where somebody asks for that, and answer once the log holds nothing of it either."""
        try:
            wish, self._heeded = self._heeded, self._wish.seen()
            if self._heeded is None:
                return False
            if self._heeded != wish:
                return self._erase()
            if self._file is None:
                self._wish.answer(self._trouble)
            elif self._file.is_erased():
                self._wish.answer(Erased(*self._erased, remove_damaged(self._path)))
        except OSError as error:
            self._heeded = None
            log.warning("%s cannot be erased as asked for: %s", self._path, in_words(error, self._path))
        return False

    def _erase(self) -> bool:
        erased = self._write(lambda file: file.erase())
        if erased is None:
            self._wish.answer(self._trouble)
            return True  # it may have come half way
        waiting = list(self._memory.rows)
        self._memory.acknowledge(waiting)
        self._owed.clear()
        self._erased = erased[0] + len(waiting), erased[1] + len(waiting)
        log.info("%s: %d transcripts erased as asked for, %d of them pending", self._path, *self._erased)
        return True

    def sync(self) -> None:
        """Ask for everything recorded to be put on stable storage as soon as possible."""
        if self._file is not None:
            self._file.syncing.hurry()

    def close(self) -> None:
        """Put everything on stable storage and let go of the file."""
        file, self._file = self._file, None
        self._trouble = self._trouble or "closed"
        self._retry_at = math.inf
        if file is not None:
            self._kept = file.pending_count
            file.close()
            if not file.syncing.close(CLOSE_S):
                log.warning("%s: the disk has not answered for %g s; the last second may be lost", self._path, CLOSE_S)
            self._synced_to = file.syncing.synced_to
        if self._owner is not None and not (file is not None and file.syncing.alive):  # it has the file open
            self._owner.release()
            self._owner = None
        self._memory.close()
        self._look()

    def stats(self) -> OutboxStats:
        """Return how it is doing, from any thread."""
        stats, oldest_at = self._shown
        oldest_s = None if oldest_at is None else max(0.0, self.now() - oldest_at)
        return replace(stats, oldest_s=oldest_s)

    def _look(self) -> None:
        """Take what `stats` tells."""
        file, memory = self._file, self._memory.rows
        first_seq = oldest_at = None
        if file is not None:
            try:
                first_seq, oldest_at = file.first_seq(), file.oldest_at()
            except FAULTS as error:
                self._fail(error)
        if oldest_at is None and memory:
            oldest_at = memory[0].recorded_at
        in_file = 0 if file is None else file.count
        stats = OutboxStats(
            rows=in_file + len(memory),
            pending=self._count_pending(),
            first_seq=first_seq,
            last_seq=self._last_seq or None,
            oldest_s=None,
            dropped=self._dropped + self._memory.dropped,
            refused=self._refused,
            trouble=self._trouble or self._sync_trouble,
        )
        self._shown = stats, oldest_at

    def _write(self, work: Callable[[OutboxFile], T]) -> T | None:
        """Do something to the file; return None where that cannot be."""
        if self._file is None or self._trouble:
            return None
        try:
            try:
                done = work(self._file)
            except sqlite3.Error as error:
                if not is_full(error) or not self._file.prune_settled():
                    raise
                done = work(self._file)
        except FAULTS as error:
            self._fail(error)
            return None
        self._last_seq = self._file.last_seq
        return done

    def _fail(self, error: Exception) -> None:
        """Go on in memory."""
        file, self._retry_at = self._file, time.monotonic() + (0.0 if is_damage(error) else RETRY_S)
        if file is not None and leaves_file_usable(error):
            file.syncing.copy_soon()
        elif file is not None:
            self._leave(file)
        self._say(in_words(error, self._path))

    def _leave(self, file: OutboxFile) -> None:
        self._synced_to, self._kept = file.syncing.synced_to, file.pending_count
        file.close()
        file.syncing.close(0.0)
        self._file, self._left = None, file

    def _say(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.warning("%s; transcripts are kept in memory only, the newest %d", trouble, self._memory.limit)
        self._trouble = trouble

    def _revive(self) -> None:
        """Try the disk again, and move to it what is in memory."""
        if self._left is not None and self._left.syncing.alive:
            return  # it would delete the new file's log
        self._left = None
        reopened = self._file is None
        try:
            if reopened:
                self._open()
            self._move(reopened)
        except FAULTS as error:
            self._fail(error)
        except ConfigError as error:
            self._retry_at = time.monotonic() + RETRY_S
            self._say(str(error))
        else:
            self._trouble = ""
            log.info("%s: transcripts are kept on disk again", self._path)

    def _move(self, reopened: bool) -> None:
        """Move the rows in memory to the file, in order, and tell it what was settled meanwhile."""
        file = self._file
        assert file is not None
        rows = list(self._memory.rows)
        ids, above = {row.id for row in rows}, file.seqs_above(self._last_seq)
        # A commit that failed may have come through all the same.
        known = {identity: seq for identity, seq in above.items() if identity in ids}
        missed = reopened and any(row.id not in known for row in file.pending(self._offered_to, 1))
        new = [row for row in rows if row.id not in known]
        self._settle_owed(file)  # first: what the broker has makes room
        known.update((row.id, row.seq or 0) for row in self._add(file, new))
        self._last_seq = file.last_seq
        moved = {row.place: (known[row.id], row.id) for row in rows}
        self._moved = dict(list({**self._moved, **moved}.items())[-BOUNDS:])
        places = self._memory.places
        if missed:  # go on with what was pending in the file, whatever was given out from memory meanwhile
            self._bounds = [(0, self._offered_to), (places, self._offered_to)]
        else:
            behind = [(place, seq) for place, (seq, _) in moved.items()]
            self._bounds = [*self._bounds, *behind, (places, file.last_seq)][-BOUNDS:]
        self._memory.acknowledge(rows)

    def _add(self, file: OutboxFile, rows: Sequence[Row]) -> list[Row]:
        """Add rows of the memory to the file, at the cost of the oldest that the broker has where it is full."""
        offered = [(row.id, row.recorded_at, row.payload) for row in rows]
        try:
            return file.add(offered)
        except sqlite3.Error as error:
            if not is_full(error) or not file.prune_settled():
                raise
            return file.add(offered)

    def _settle_owed(self, file: OutboxFile) -> None:
        """Tell the file what was settled meanwhile."""
        owed, self._owed = self._owed, {}
        try:
            for why in set(owed.values()):
                seqs = [seq for seq in owed if owed[seq] == why]
                try:
                    file.settle(seqs, self.now(), why)
                except sqlite3.Error as error:
                    if why is not None or not is_full(error):
                        raise
                    file.drop_pending(seqs)  # to mark them takes room; the broker has them
        except BaseException:  # whatever it is: it is still owed; a second time is harmless
            self._owed = owed
            raise

    def _prune_ages(self) -> None:
        """Drop what is too old."""
        now = self.now()
        self._write(lambda file: file.prune_settled(now - self._config.keep))
        if time.monotonic() >= self._ages_at:
            deleted = self._write(lambda file: file.prune_pending(now - self._config.max_age)) or 0
            self._count_dropped(deleted, "older than outbox.max_age")
            if deleted < PRUNED_AT_ONCE:
                self._ages_at = time.monotonic() + AGES_EVERY_S

    def _prune_size(self) -> None:
        """Drop what is too much: the oldest that the broker has, then the oldest that it has not."""
        file = self._file
        if file is None or self._trouble:
            return
        try:
            excess = file.used_bytes() - self._max_bytes
        except FAULTS as error:
            self._fail(error)
            return
        if excess <= 0 or not file.count:
            return
        count = min(PRUNED_AT_ONCE, 1 + excess * file.count // file.used_bytes())
        if not self._write(lambda file: file.prune_settled(limit=count)):
            deleted = self._write(lambda file: file.prune_pending(limit=count)) or 0
            self._count_dropped(deleted, "beyond outbox.max_mb")

    def _count_dropped(self, count: int, why: str) -> None:
        if count:
            self._dropped += count
            metrics.DROPPED_TRANSCRIPTS.inc(count)
            if not self._dropping:
                log.warning("%s: transcripts that the broker never got are given up: %s", self._path, why)
        self._dropping = bool(count) or (self._dropping and self._count_pending() > 0)

    def _watch(self) -> None:
        """Say so when the disk does not sync."""
        failure = None if self._file is None else self._file.syncing.failure
        trouble = "" if failure is None else in_words(failure, self._path)
        if trouble and not self._sync_trouble:
            log.warning("%s; what is recorded now may not survive a power cut", trouble)
        elif self._sync_trouble and not trouble:
            log.info("%s: the disk syncs again", self._path)
        self._sync_trouble = trouble
