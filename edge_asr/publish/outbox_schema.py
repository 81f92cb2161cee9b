"""The outbox's file: making it, bringing it up to date, and what to do with one that is damaged."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Connect = Callable[..., sqlite3.Connection]
Saved = tuple[int, str, float, str, "float | None", "str | None"]
"""The columns of a row."""

DAMAGED = ".damaged-"
MAGIC = b"SQLite format 3\0"
APPLICATION_ID = 0x65_41_53_52
"""`eASR`, in the header of the file."""
BUSY_S = 0.25
"""How long to wait for another program that writes to the file."""
CHECKED_BYTES = 256_000_000
"""A larger file is not read through when it is opened: that would take too long."""
STEPS: list[tuple[str, ...]] = [
    (
        """CREATE TABLE transcripts (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL,
            recorded_at REAL NOT NULL,  -- unix seconds
            payload TEXT NOT NULL,      -- JSON
            settled_at REAL,            -- unix seconds; null: pending
            refused TEXT                -- why the broker will never take it
        )""",
        "CREATE INDEX pending ON transcripts (seq, recorded_at) WHERE settled_at IS NULL",
        "CREATE INDEX settled ON transcripts (settled_at) WHERE settled_at IS NOT NULL",
        f"PRAGMA application_id = {APPLICATION_ID}",
    ),
]
"""Step n leads from schema n to schema n + 1, in one transaction; a file of any older schema goes through the rest."""
INSERT = "INSERT INTO transcripts (seq, id, recorded_at, payload, settled_at, refused) VALUES (?, ?, ?, ?, ?, ?)"
COLUMNS = "SELECT seq, id, recorded_at, payload, settled_at, refused FROM transcripts"


class DamagedFileError(sqlite3.DatabaseError):
    """The file is no database, or not a whole one."""


class ForeignFileError(sqlite3.DatabaseError):
    """The file is not for us to touch: a newer release's, or another program's."""


def wal_of(path: Path) -> Path:
    """Return where SQLite keeps the newest transactions of a file."""
    return path.with_name(f"{path.name}-wal")


def open_file(path: Path, connect: Connect = sqlite3.connect, last_seq: int = 0) -> sqlite3.Connection:
    """Open the outbox's file, make it where there is none, and bring it up to date; its folder must exist.

    A damaged file is set aside, and what can be read of it goes into a new one, which continues above `last_seq` and
    all that was used. Raises ForeignFileError, and sqlite3.Error or OSError where the disk does not play along.
    """
    try:
        return _open(path, connect)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        saved = _salvage(path)
        aside = _set_aside(path)
        log.error("%s was damaged (%s): set aside as %s; %d transcripts saved", path, error, aside.name, len(saved))
    connection = _open(path, connect)
    try:
        _restore(connection, saved, last_seq)
    except BaseException:  # whatever it is: the connection must not be left open
        connection.close()
        raise
    return connection


def _open(path: Path, connect: Connect) -> sqlite3.Connection:
    _look_at(path)
    with contextlib.suppress(FileExistsError):  # SQLite would make it as the umask says; it holds what was said
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    connection = make_connection(path, connect)
    try:
        _check(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA secure_delete = ON")
        bring_up_to_date(connection)
    except BaseException:  # whatever it is: the connection must not be left open
        connection.close()
        raise
    return connection


def make_connection(path: Path, connect: Connect) -> sqlite3.Connection:
    """Return a connection that never checkpoints by itself, and so never waits for the disk in a commit."""
    connection = connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        for setting in ("wal_autocheckpoint = 0", "synchronous = NORMAL", "temp_store = MEMORY"):
            connection.execute(f"PRAGMA {setting}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def is_damage(error: BaseException) -> bool:
    """Tell whether SQLite says that a file is no database, or not a whole one."""
    words = ("malformed", "not a database", "corrupt", "unsupported file format")
    return isinstance(error, DamagedFileError) or any(word in str(error) for word in words)


def _look_at(path: Path) -> None:
    """Raise ForeignFileError for a file that is not ours, by its first bytes: it is not even opened as a database."""
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return
    if len(header) == 100 and header.startswith(MAGIC):
        _know(path, *(int.from_bytes(header[at : at + 4], "big") for at in (68, 60)))


def _know(path: Path, application_id: int, version: int) -> None:
    if application_id not in (0, APPLICATION_ID):
        raise ForeignFileError(f"{path} belongs to another program; set outbox.file to another file")
    if version > len(STEPS):
        raise ForeignFileError(
            f"{path} is of a newer release (schema {version}, known up to {len(STEPS)}); "
            "install that release again, or set outbox.file to another file"
        )


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Raise DamagedFileError or ForeignFileError for a file that cannot be used."""
    application_id = _value(connection, "PRAGMA application_id")
    version = _value(connection, "PRAGMA user_version")
    _know(path, application_id, version)
    if not application_id and _value(connection, "SELECT count(*) FROM sqlite_master"):
        raise ForeignFileError(f"{path} belongs to another program; set outbox.file to another file")
    if path.stat().st_size <= CHECKED_BYTES and (found := _value(connection, "PRAGMA quick_check(1)")) != "ok":
        raise DamagedFileError(" ".join(str(found).split()))
    if version and not _value(connection, "SELECT count(*) FROM sqlite_master WHERE name = 'transcripts'"):
        raise DamagedFileError("its table is missing")


def _value(connection: sqlite3.Connection, query: str) -> Any:
    return connection.execute(query).fetchone()[0]


def bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Take the steps that the file has not seen yet; each is taken as a whole or not at all."""
    for version in range(_value(connection, "PRAGMA user_version"), len(STEPS)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in STEPS[version]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute("COMMIT")
        except BaseException:  # whatever it is: half a step must not stay open
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _salvage(path: Path) -> list[Saved]:
    """Return what can be read of a damaged file, in order: from its beginning, and from its end."""
    with contextlib.suppress(OSError):
        _lengthen(path)
    saved: dict[int, Saved] = {}
    for order in ("ASC", "DESC"):
        with contextlib.suppress(sqlite3.Error, OSError), contextlib.closing(sqlite3.connect(path)) as connection:
            connection.text_factory = lambda data: data.decode(errors="replace")
            for row in connection.execute(f"{COLUMNS} NOT INDEXED ORDER BY seq {order}"):
                if row[0] in saved:
                    break
                if _is_whole(row):
                    saved[row[0]] = row
    return [saved[seq] for seq in sorted(saved)]


def _lengthen(path: Path) -> None:
    """Give a file that was cut off its length again, empty: SQLite reads nothing of one that is too short."""
    with path.open("rb") as file:
        header = file.read(32)
    length = int.from_bytes(header[16:18], "big") * int.from_bytes(header[28:32], "big")
    if header.startswith(MAGIC) and path.stat().st_size < length <= CHECKED_BYTES:
        os.truncate(path, length)


def _is_whole(row: tuple[Any, ...]) -> bool:
    """Tell whether a row of a damaged file is what was once written."""
    kinds = (int, str, float, str, (float, type(None)), (str, type(None)))
    if not all(isinstance(value, kind) for value, kind in zip(row, kinds, strict=True)):  # type: ignore[arg-type]
        return False
    try:
        return isinstance(json.loads(row[3]), dict)
    except ValueError:
        return False


def _set_aside(path: Path) -> Path:
    """Rename a damaged file, and what belongs to it; return its new name."""
    aside = path.with_name(f"{path.name}{DAMAGED}{int(time.time())}")
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).replace(aside.with_name(aside.name + suffix))
    return aside


def is_there(path: Path) -> bool:
    """Tell whether there is a file; raise PermissionError where that is not for us to know."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def damaged_copies(path: Path) -> list[Path]:
    """Return the files that were set aside, and what belongs to each."""
    if not is_there(path.parent):
        return []
    return sorted(other for other in path.parent.iterdir() if other.name.startswith(f"{path.name}{DAMAGED}"))


def _restore(connection: sqlite3.Connection, saved: list[Saved], last_seq: int) -> None:
    """Put the rows that were saved into a new file; its next seq is above all that may have been used."""
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(INSERT, saved)
    connection.execute("DELETE FROM sqlite_sequence")
    highest = max([int(time.time()), last_seq, *(row[0] for row in saved)])
    connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('transcripts', ?)", (highest,))
    connection.execute("COMMIT")
