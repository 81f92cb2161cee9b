"""The outbox's file in SQL: every statement on its rows; what fails is raised."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edge_asr.errors import ConfigError
from edge_asr.publish.outbox_rows import NO_SEQS, Row
from edge_asr.publish.outbox_schema import Connect, open_file
from edge_asr.publish.outbox_sync import OutboxSync

CLOCK_SET = 1_735_689_600.0
"""2025: an earlier time comes from a clock that was not set, and tells no age."""
PRUNED_AT_ONCE = 200
"""Rows deleted in one transaction."""

_ROW = "SELECT seq, id, recorded_at, payload, settled_at IS NOT NULL AND refused IS NULL FROM transcripts"
PENDING = f"{_ROW} INDEXED BY pending WHERE settled_at IS NULL AND seq > ? ORDER BY seq LIMIT ?"
REPLAYED = (
    f"{_ROW} WHERE seq > ? AND seq >= ? AND seq < ? AND settled_at IS NOT NULL AND refused IS NULL ORDER BY seq LIMIT ?"
)
OLDEST = "SELECT recorded_at FROM transcripts INDEXED BY pending WHERE settled_at IS NULL ORDER BY seq LIMIT 1"
_SETTLED = "SELECT seq FROM transcripts INDEXED BY settled WHERE settled_at IS NOT NULL"
_UNSETTLED = "SELECT seq FROM transcripts INDEXED BY pending WHERE settled_at IS NULL"
_OLD = f"BETWEEN {CLOCK_SET} AND ?"


class OutboxOwnedError(ConfigError):
    """Another process has the outbox's file."""


class Owner:
    """The lock on an outbox's file: it has one owner."""

    def __init__(self, path: Path) -> None:
        """Take the lock; raise OutboxOwnedError if another process has it, OSError if the disk does not play along."""
        lock = path.with_name(f"{path.name}.lock")
        self._handle = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._handle, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._handle)
            raise OutboxOwnedError(
                f"{path} is in use by process {owner}; give this one a state_dir (or outbox.file) of its own"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: then the other one cannot tell who has it
            os.truncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another process have the file."""
        os.close(self._handle)


class OutboxFile:
    """Rows in an SQLite file. Of one thread; raises sqlite3.Error and OSError."""

    def __init__(self, path: Path, connect: Connect = sqlite3.connect, last_seq: int = 0) -> None:
        """Open it, see `open_file`; the folder must exist."""
        self._connection = open_file(path, connect, last_seq)
        try:
            self.last_seq = self._value("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'transcripts'")
            self.pending_count = self._value("SELECT count(*) FROM transcripts WHERE settled_at IS NULL")
            self.count = (
                self._value("SELECT count(*) FROM transcripts WHERE settled_at IS NOT NULL") + self.pending_count
            )
            self.page_bytes = self._value("PRAGMA page_size")
        except sqlite3.Error:
            self._connection.close()
            raise
        self.syncing = OutboxSync(path, connect, self.last_seq)
        self._erased_by = 0  # commits

    def close(self) -> None:
        """Close the connection; the sync thread still syncs what is committed, and then ends."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def _value(self, query: str, values: Sequence[float] = ()) -> int:
        found: int = self._connection.execute(query, values).fetchone()[0]
        return found

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit what is done inside, or nothing of it."""
        connection, syncing, last_seq = self._connection, self.syncing, self.last_seq
        with syncing.writing:
            if syncing.emptied:
                connection.execute("PRAGMA synchronous = OFF")
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
                syncing.committed(self.last_seq)
            except BaseException:  # whatever it is: half a transaction must not stay open
                self.last_seq = last_seq
                if connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                raise
            finally:
                if syncing.emptied:
                    syncing.emptied = False
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute("PRAGMA synchronous = NORMAL")

    def add(self, rows: Iterable[tuple[str, float, str]]) -> list[Row]:
        """Record (id, unix seconds, payload), in order."""
        added = []
        with self._transaction() as connection:
            for identity, recorded_at, payload in rows:
                cursor = connection.execute(
                    "INSERT INTO transcripts (id, recorded_at, payload) VALUES (?, ?, ?)",
                    (identity, recorded_at, payload),
                )
                added.append(Row(cursor.lastrowid, identity, recorded_at, payload))
                self.last_seq = cursor.lastrowid or 0
        self.count += len(added)
        self.pending_count += len(added)
        return added

    def pending(self, after: int, limit: int, replay: range = NO_SEQS) -> list[Row]:
        """Return at most `limit` rows above seq `after`: what is pending, or replayed."""
        found = self._connection.execute(PENDING, (after, limit)).fetchall()
        if replay:
            again = self._connection.execute(REPLAYED, (after, replay.start, replay.stop, limit)).fetchall()
            found = sorted(found + again)[:limit]
        return [Row(seq, identity, at, payload, bool(settled)) for seq, identity, at, payload, settled in found]

    def settle(self, seqs: Iterable[int], now: float, refused: str | None = None) -> int:
        """Mark rows as acknowledged, or refused; return how many were pending."""
        count = 0
        with self._transaction() as connection:
            for seq in seqs:
                count += connection.execute(
                    "UPDATE transcripts SET settled_at = ?, refused = ? WHERE seq = ? AND settled_at IS NULL",
                    (now, refused, seq),
                ).rowcount
        self.pending_count -= count
        return count

    def first_kept(self, from_seq: int) -> tuple[int, int, int] | None:
        """Return first seq, last seq and number of the rows from `from_seq` on, without those set aside."""
        found: tuple[int, int, int] = self._connection.execute(
            "SELECT min(seq), max(seq), count(*) FROM transcripts WHERE seq >= ? AND refused IS NULL", (from_seq,)
        ).fetchone()
        return found if found[2] else None

    def seqs_above(self, seq: int) -> dict[str, int]:
        """Return the seqs above `seq`, by id."""
        return dict(self._connection.execute("SELECT id, seq FROM transcripts WHERE seq > ?", (seq,)).fetchall())

    def first_seq(self) -> int | None:
        """Return the lowest seq that is kept."""
        found: int | None = self._connection.execute("SELECT min(seq) FROM transcripts").fetchone()[0]
        return found

    def oldest_at(self) -> float | None:
        """Return when the oldest pending row was recorded."""
        found = self._connection.execute(OLDEST).fetchone()
        return None if found is None else found[0]

    def used_bytes(self) -> int:
        """Return the size of the pages in use; the file may be larger, and uses the others again."""
        return (self._value("PRAGMA page_count") - self._value("PRAGMA freelist_count")) * self.page_bytes

    def date_anew(self, now: float) -> None:
        """Give rows that were settled by a clock that was not right the time of now, so that they age at all."""
        wrong = f"settled_at IS NOT NULL AND (settled_at < {CLOCK_SET} OR settled_at > ?)"
        if self._connection.execute(f"{_SETTLED} AND {wrong} LIMIT 1", (now,)).fetchone():
            with self._transaction() as connection:
                connection.execute(f"UPDATE transcripts SET settled_at = ? WHERE {wrong}", (now, now))

    def prune_settled(self, before: float | None = None, limit: int = PRUNED_AT_ONCE) -> int:
        """Delete the oldest that the broker has, at most `limit`; where given, only from before that time."""
        aged, values = ("", ()) if before is None else ("AND settled_at <= ?", (before,))
        return self._delete(f"{_SETTLED} {aged} ORDER BY settled_at LIMIT ?", (*values, limit))

    def prune_pending(self, before: float | None = None, limit: int = PRUNED_AT_ONCE) -> int:
        """Delete the oldest that the broker has not, at most `limit`; where given, only from before that time."""
        aged, values = ("", ()) if before is None else (f"AND recorded_at {_OLD}", (before,))
        deleted = self._delete(f"{_UNSETTLED} {aged} ORDER BY seq LIMIT ?", (*values, limit))
        self.pending_count -= deleted
        return deleted

    def drop_pending(self, seqs: Sequence[int]) -> None:
        """Delete these rows, which are pending as far as the file knows."""
        for start in range(0, len(seqs), PRUNED_AT_ONCE):
            part = seqs[start : start + PRUNED_AT_ONCE]
            marks = ",".join("?" * len(part))
            self.pending_count -= self._delete(f"{_UNSETTLED} AND seq IN ({marks})", tuple(part))

    def erase(self) -> tuple[int, int]:
        """Delete every row, and what the file still holds of deleted ones; return how many there were, and pending.

        The numbers go on. The log holds the rows until `is_erased` says so.
        """
        with self.syncing.writing:
            with self._transaction() as connection:
                connection.execute("DELETE FROM transcripts")
            erased = self.count, self.pending_count
            self.count = self.pending_count = 0
            self._connection.execute("VACUUM")
            self._erased_by = self.syncing.committed(self.last_seq)
        self.syncing.copy_soon()
        return erased

    def is_erased(self) -> bool:
        """Tell whether the log no longer holds what was erased either; if not, have it emptied soon."""
        if self.syncing.emptied_by >= self._erased_by:
            return True
        self.syncing.empty_soon()
        return False

    def _delete(self, query: str, values: tuple[float, ...]) -> int:
        seqs = self._connection.execute(query, values).fetchall()
        if seqs:
            with self._transaction() as connection:
                connection.executemany("DELETE FROM transcripts WHERE seq = ?", seqs)
            self.count -= len(seqs)
        return len(seqs)
