"""The thread that puts what the outbox has committed on stable storage, so that nobody else waits for the disk."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from pathlib import Path

from edge_asr import metrics
from edge_asr.publish.outbox_schema import Connect, make_connection, wal_of

EVERY_S = 1.0
"""One fsync in so many seconds, as long as the broker answers."""
CHECKPOINT_BYTES = 4_000_000
"""A longer write-ahead log is copied into the file."""
LOG_LIMIT_BYTES = 64_000_000
"""A log that has grown so long, because something was written all the time, is copied while the publisher waits."""
QUIET_S = 0.3
"""It is copied when nothing has been written for so long: what is written meanwhile cannot be copied with it."""
IDLE_S = 60.0
"""So is any, when nothing has been written for so long."""
CHECKPOINT_SYNCS = 3
"""Fsyncs of a checkpoint: SQLite's of the log and of the file, and ours of the emptied log."""
RETRY_S = 1.0


class OutboxSync:
    """Owns the thread `outbox-sync` and its connection.

    A commit of the publisher's connection writes to the write-ahead log and does not wait for the disk. This thread
    syncs the log for it, for all commits since the last time at once, and copies it into the file now and then.
    """

    def __init__(self, path: Path, connect: Connect, synced_to: int) -> None:
        """Start; everything up to seq `synced_to` is taken to be on stable storage."""
        self.writing = threading.RLock()
        """Held while the publisher writes, and while this thread empties the log."""
        self.emptied = False
        """The log is empty, so that its new header cannot make old transactions come back; under `writing`."""
        self.emptied_by = 0
        """So many commits had been made when the log was emptied last, on the disk too."""
        self.synced_to = synced_to
        self.failure: Exception | None = None
        """Why the last attempt failed."""
        self._path, self._connect = path, connect
        self._bell = threading.Condition()  # guards the rest
        self._committed_to = synced_to
        self._commits = self._synced_commits = self._copied_commits = 0
        self._committed_at = time.monotonic()
        self._online = self._hurried = False
        self._folder_due = True
        self._closing = self._copy_wanted = False
        self._next_at = 0.0
        self._thread = threading.Thread(target=self._run, name="outbox-sync", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """The thread still has its connection."""
        return self._thread.is_alive()

    def committed(self, last_seq: int) -> int:
        """Say that something was committed, the rows up to `last_seq` among it; return how often that was said."""
        with self._bell:
            self._commits += 1
            self._committed_to = max(self._committed_to, last_seq)
            self._committed_at = time.monotonic()
            self._bell.notify()
            return self._commits

    def set_online(self, online: bool) -> None:
        """Say whether the broker answers: what it has not got is synced at once."""
        with self._bell:
            if online != self._online:
                self._online = online
                self._bell.notify()

    def hurry(self) -> None:
        """Sync at once, this time."""
        with self._bell:
            self._hurried = True
            self._bell.notify()

    def copy_soon(self) -> None:
        """Copy the log into the file as soon as possible: emptied, it takes no room on a full disk."""
        with self._bell:
            self._copy_wanted = True
            self._bell.notify()

    def empty_soon(self) -> None:
        """Do that also where all is copied, but somebody who read the log kept it from being emptied."""
        with self._bell:
            self._copied_commits = min(self._copied_commits, self._commits - 1)
        self.copy_soon()

    def close(self, timeout_s: float) -> bool:
        """Sync, let go of the file, and end; return whether that was done within `timeout_s`."""
        with self._bell:
            self._closing = True
            self._bell.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        while self._wait():
            try:
                if self._is_copy_due():
                    connection = connection or self._make_connection()
                    with self.writing if self._is_long(LOG_LIMIT_BYTES) else contextlib.nullcontext():
                        self._copy(connection)
                else:
                    self._sync()
                self.failure = None
            except (sqlite3.Error, OSError) as error:
                self._defer(error)
        with contextlib.suppress(sqlite3.Error, OSError):
            self._sync()
        # The last connection to a file copies the log into it: this one syncs while it does so.
        with (
            contextlib.suppress(sqlite3.Error, OSError),
            contextlib.closing(connection or self._make_connection()) as last,
        ):
            last.execute("SELECT count(*) FROM sqlite_master").fetchone()

    def _make_connection(self) -> sqlite3.Connection:
        connection = make_connection(self._path, self._connect)
        connection.execute("PRAGMA busy_timeout = 0")  # the publisher would wait as well
        return connection

    def _wait(self) -> bool:
        """Sleep until something is due; return False when it is the end."""
        with self._bell:
            while not self._closing:
                wait_s = self._due_in()
                if wait_s is not None and wait_s <= 0:
                    return True
                self._bell.wait(wait_s)
            return False

    def _due_in(self) -> float | None:
        """Return the seconds until something is to be done; None: there is nothing to do."""
        now = time.monotonic()
        if self._commits > self._synced_commits:
            at_once = (self._hurried or not self._online) and self.failure is None
            return 0.0 if at_once else self._next_at - now
        self._hurried = False
        if self._commits > self._copied_commits:
            idle_at = self._committed_at + (QUIET_S if self._copy_wanted or self._is_long() else IDLE_S)
            return max(self._next_at, idle_at) - now
        return None

    def _is_long(self, limit: int | None = None) -> bool:
        with contextlib.suppress(OSError):
            return wal_of(self._path).stat().st_size >= (limit or CHECKPOINT_BYTES)
        return False

    def _is_copy_due(self) -> bool:
        with self._bell:
            idle_s = time.monotonic() - self._committed_at
            # After a failed fsync the kernel may call the next one a success: copying writes everything once more.
            wanted = self._copy_wanted or self.failure is not None or idle_s >= IDLE_S or self._is_long()
            quiet = idle_s >= QUIET_S or self._is_long(LOG_LIMIT_BYTES)
            return self._commits > self._copied_commits and wanted and quiet

    def _sync(self) -> None:
        with self._bell:
            commits, seq = self._commits, self._committed_to
            self._hurried = False
        if commits > self._synced_commits:
            started = time.monotonic()
            syncs = self._sync_log()
            self._done(commits, seq, started, syncs)

    def _sync_log(self) -> int:
        _sync_file(wal_of(self._path), os.O_RDWR)
        if not self._folder_due:
            return 1
        _sync_file(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self._folder_due = False
        return 2

    def _copy(self, connection: sqlite3.Connection) -> None:
        """Copy the log into the file; empty the log where nothing was written meanwhile."""
        for _ in range(2):  # what was written just before is copied, what was written after is not: look again
            with self._bell:
                commits, seq = self._commits, self._committed_to
                self._copy_wanted = False
            started = time.monotonic()
            busy, length, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self._done(commits, seq, started, CHECKPOINT_SYNCS)
            if busy or length != copied or self._empty(connection, commits):
                break

    def _empty(self, connection: sqlite3.Connection, commits: int) -> bool:
        """Empty the log after everything was copied; return False where something was written meanwhile."""
        with self.writing:
            if commits != self._commits:
                return False
            # Waits for no disk: all is copied. Without it SQLite would sync the log's new header in a commit.
            emptied = self.emptied = not connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            self._copied_commits = commits
        _sync_file(wal_of(self._path), os.O_RDWR)
        if emptied:
            self.emptied_by = commits
        return True

    def _done(self, commits: int, seq: int, started: float, syncs: int) -> None:
        with self._bell:
            self._synced_commits = commits
            self.synced_to = seq
            # What was synced at once while the broker was away is no debt: it would delay all that comes after it.
            earliest = max(self._next_at, started) if self._online else started
            self._next_at = earliest + syncs * EVERY_S
        metrics.OUTBOX_SYNC.observe(time.monotonic() - started)

    def _defer(self, error: Exception) -> None:
        with self._bell:
            self.failure = error
            self._next_at = time.monotonic() + RETRY_S


def _sync_file(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fdatasync(handle)
    finally:
        os.close(handle)
