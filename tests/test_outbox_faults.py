"""What the outbox does when the disk does not play along: it goes on in memory, says so, and loses nothing."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edge_asr.config_mqtt import OutboxConfig
from edge_asr.publish import outbox as outbox_module
from edge_asr.publish.outbox import DiskOutbox, Row
from edge_asr.publish.outbox_rows import MEMORY_LIMIT

Make = Callable[[], DiskOutbox]
PATIENCE_S = 20.0


class Disk:
    """A disk that fails on command: `broken` is what SQLite says to statements that contain `word`."""

    def __init__(self) -> None:
        self.broken: str | None = None
        self.word = ""
        self.max_pages: int | None = None
        self.connections: list[sqlite3.Connection] = []

    def connect(self, *values: Any, **keys: Any) -> sqlite3.Connection:
        """Connect as `sqlite3.connect` does."""
        disk = self

        class Connection(sqlite3.Connection):
            def execute(self, query: str, *parameters: Any) -> sqlite3.Cursor:
                disk.check(query)
                return super().execute(query, *parameters)

            def executemany(self, query: str, parameters: Any) -> sqlite3.Cursor:
                disk.check(query)
                return super().executemany(query, parameters)

        self.check("CONNECT")
        connection = sqlite3.connect(*values, factory=Connection, **keys)
        self.connections.append(connection)
        return connection

    def check(self, query: str) -> None:
        """Fail where that was ordered."""
        if self.broken is not None and self.word in query and not query.startswith("ROLLBACK"):
            raise sqlite3.OperationalError(self.broken)

    def limit_pages(self, pages: int) -> None:
        """Let the file grow to so many pages, and no further."""
        for connection in self.connections:
            connection.execute(f"PRAGMA max_page_count = {pages}")


@pytest.fixture
def disk() -> Disk:
    """Return a disk that works so far."""
    return Disk()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the file of the outbox goes."""
    return tmp_path / "state" / "outbox.sqlite3"


@pytest.fixture
def make(path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Return what opens the outbox, which tries a disk again each time that it is tended; all are closed at the end."""
    monkeypatch.setattr(outbox_module, "RETRY_S", 0.0)
    made: list[DiskOutbox] = []

    def run() -> DiskOutbox:
        made.append(DiskOutbox(OutboxConfig(), path, connect=disk.connect))
        return made[-1]

    yield run
    for outbox in made:
        outbox.close()


def add(outbox: DiskOutbox, *numbers: int, size: int = 2) -> list[Row]:
    """Record one after the other."""
    return [row for number in numbers for row in outbox.add([(f"id-{number}", f'{{"text": "{"x" * size}"}}')])]


def ids(rows: list[Row]) -> list[int]:
    """Return the numbers of rows that were recorded by `add`."""
    return [int(row.id.removeprefix("id-")) for row in rows]


def tend_until_well(outbox: DiskOutbox) -> None:
    """Tend until there is no trouble any more: a thread may have to end first."""
    for _ in range(int(PATIENCE_S / 0.01)):
        outbox.tend(online=True)
        if not outbox.stats().trouble:
            return
        threading.Event().wait(0.01)
    pytest.fail(outbox.stats().trouble)


def test_a_full_disk_keeps_all_in_memory_and_moves_it_in_order_when_there_is_room(
    make: Make, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    outbox = make()
    on_disk = add(outbox, 1, 2, 3, size=2000)
    disk.limit_pages(1)  # as many as there are

    in_memory = [row for row in add(outbox, *range(4, 20), size=2000) if row.seq is None]

    assert len(in_memory) > 10
    assert ids(outbox.pending(None, 100)) == list(range(1, 20))
    assert "is full; free some space" in outbox.stats().trouble
    assert [record.levelname for record in caplog.records] == ["WARNING"]

    outbox.acknowledge([*on_disk[:2], in_memory[0]])
    assert ids(outbox.pending(None, 100)) == [3, *ids(in_memory[1:])] or ids(outbox.pending(None, 100))[0] == 3
    assert outbox.pending(in_memory[-1], 10) == []
    disk.limit_pages(100_000)
    outbox.tend(online=True)
    later = add(outbox, 20)

    rows = outbox.pending(None, 100)
    assert outbox.stats().trouble == ""
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert ids(rows) == [number for number in range(3, 21) if number != ids(in_memory)[0]]
    assert None not in [row.seq for row in rows]
    assert [row.seq for row in rows] == sorted(row.seq or 0 for row in rows)
    # A row that was given out while it was in memory is still known by that.
    assert outbox.pending(in_memory[-1], 10) == later
    assert outbox.pending(in_memory[-2], 10)[0].id == in_memory[-1].id
    outbox.acknowledge(in_memory)
    assert ids(outbox.pending(None, 100)) == [row for row in ids(rows) if row not in ids(in_memory)]
    assert outbox.stats().pending == len(outbox.pending(None, 100))


def test_a_full_disk_gives_up_what_the_broker_has_first(make: Make, disk: Disk) -> None:
    outbox = make()
    outbox.acknowledge(add(outbox, *range(1, 50), size=2000))
    disk.limit_pages(1)

    rows = add(outbox, *range(50, 80), size=2000)

    assert outbox.stats().trouble == ""
    assert None not in [row.seq for row in rows]
    assert outbox.stats().dropped == 0


def test_a_full_disk_takes_what_is_in_memory_once_the_broker_has_what_is_on_it(make: Make, disk: Disk) -> None:
    outbox = make()
    on_disk = add(outbox, *range(1, 50), size=2000)
    disk.limit_pages(1)
    rows = add(outbox, *range(50, 70), size=2000)
    assert None in [row.seq for row in rows]

    outbox.acknowledge([*on_disk, *(row for row in rows if row.seq is not None)])
    tend_until_well(outbox)

    left = outbox.pending(None, 100)
    assert ids(left) == ids([row for row in rows if row.seq is None])
    assert None not in [row.seq for row in left]
    assert outbox.stats().dropped == 0


def test_what_is_on_a_disk_that_fails_is_still_pending(make: Make, disk: Disk) -> None:
    outbox = make()
    add(outbox, *range(50))
    disk.broken = "disk I/O error"
    add(outbox, 50)
    assert outbox.stats().pending == 51
    outbox.close()
    assert outbox.stats().pending == 50, "what was in memory only is given up"


MESSAGES = ["disk I/O error", "database or disk is full", "attempt to write a readonly database"]
STATEMENTS = ["BEGIN", "INSERT", "COMMIT", "UPDATE", "SELECT", "DELETE", "PRAGMA", ""]


@pytest.mark.parametrize(
    "message", ["disk I/O error", "database or disk is full", "attempt to write a readonly database"]
)
@pytest.mark.parametrize("word", STATEMENTS)
def test_whatever_statement_fails_nothing_is_raised_or_lost(make: Make, disk: Disk, word: str, message: str) -> None:
    outbox = make()
    first = add(outbox, 1, 2, 3)
    assert outbox.pending(None, 100) == first
    disk.broken, disk.word = message, word

    second = add(outbox, 4, 5)
    outbox.acknowledge([first[0], second[0]])
    outbox.refuse(first[1], "too large")
    outbox.refuse(second[1], "too large")
    outbox.tend(online=True)
    third = add(outbox, 6)
    outbox.pending(None, 100)
    outbox.first_kept(1)
    outbox.sync()

    disk.broken = None
    tend_until_well(outbox)
    assert ids(outbox.pending(None, 100)) == [3, 6]
    assert ids(outbox.pending(first[2], 100)) == [6]
    add(outbox, 7)
    assert ids(outbox.pending(third[0], 100)) in ([7], [6, 7])  # it may not have been given out before
    assert outbox.stats().pending == 3
    assert outbox.stats().dropped == 0


def test_a_commit_that_fails_after_all_was_written_records_nothing_twice(make: Make, disk: Disk) -> None:
    outbox = make()
    assert add(outbox, 1) == outbox.pending(None, 10)
    failed = threading.Event()

    def check(query: str) -> None:
        if query == "COMMIT" and not failed.is_set():
            failed.set()
            sqlite3.Connection.execute(disk.connections[0], "COMMIT")
            raise sqlite3.OperationalError("disk I/O error")

    disk.check = check  # type: ignore[method-assign]
    row = add(outbox, 2)[0]
    assert row.seq is None
    tend_until_well(outbox)

    rows = outbox.pending(None, 10)
    assert ids(rows) == [1, 2]
    assert outbox.pending(row, 10) == []
    outbox.acknowledge([row])
    assert ids(outbox.pending(None, 10)) == [1]


def test_memory_keeps_the_newest_and_counts_the_others(make: Make, disk: Disk) -> None:
    outbox = make()
    disk.broken = "disk I/O error"

    add(outbox, *range(1, MEMORY_LIMIT + 11))

    assert outbox.stats().dropped == 10
    assert outbox.stats().pending == MEMORY_LIMIT
    disk.broken = None
    tend_until_well(outbox)
    assert ids(outbox.pending(None, 2000)) == list(range(11, MEMORY_LIMIT + 11))


def test_what_was_on_a_disk_that_comes_late_is_offered_behind_what_was_given_out_meanwhile(
    make: Make, disk: Disk
) -> None:
    before = make()
    add(before, 1, 2)
    before.close()
    disk.broken = "unable to open database file"
    outbox = make()
    row = add(outbox, 3)[0]
    assert outbox.pending(None, 10) == [row]
    outbox.acknowledge([row])

    disk.broken = None
    tend_until_well(outbox)

    assert ids(outbox.pending(row, 10)) == [1, 2]


def test_a_folder_that_cannot_be_made_is_made_later(make: Make, path: Path) -> None:
    path.parent.write_text("a file where the folder should be")
    outbox = make()
    row = add(outbox, 1)[0]
    assert row.seq is None
    assert str(path) in outbox.stats().trouble

    path.parent.unlink()
    tend_until_well(outbox)

    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [row.seq for row in outbox.pending(None, 10)] == [1]


def test_a_lock_of_another_program_is_waited_for_in_memory(make: Make, path: Path) -> None:
    outbox = make()
    add(outbox, 1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert add(outbox, 2)[0].seq is None
        assert "another program holds a lock" in outbox.stats().trouble
        outbox.tend(online=True)
        other.execute("ROLLBACK")

    outbox.tend(online=True)

    assert ids(outbox.pending(None, 10)) == [1, 2]
    assert outbox.stats().trouble == ""


def test_an_owner_that_came_first_while_the_disk_was_away_is_named(make: Make, path: Path) -> None:
    path.parent.write_text("a file where the folder should be")
    outbox = make()
    path.parent.unlink()
    path.parent.mkdir()
    with path.with_name("outbox.sqlite3.lock").open("w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        outbox.tend(online=True)
        assert "in use by process 4711" in outbox.stats().trouble

    tend_until_well(outbox)


def test_a_file_damaged_while_it_is_in_use_is_set_aside_and_read(make: Make, disk: Disk, path: Path) -> None:
    outbox = make()
    rows = add(outbox, 1, 2, 3)
    disk.broken, disk.word = "database disk image is malformed", "INSERT"
    assert add(outbox, 4)[0].seq is None
    disk.broken = "database disk image is malformed"
    disk.word = "quick_check"
    failing = disk.check

    def once(query: str) -> None:
        if disk.word in query:
            disk.check = lambda query: None  # type: ignore[method-assign]
        failing(query)

    disk.check = once  # type: ignore[method-assign]
    tend_until_well(outbox)

    kept = outbox.pending(None, 10)
    assert kept[:3] == rows
    assert ids(kept) == [1, 2, 3, 4]
    assert (kept[3].seq or 0) > 1_700_000_000
    assert len(list(path.parent.glob("*.damaged-*"))) >= 1


def run_child(code: str, path: Path, prefix: Sequence[str] = ()) -> str:
    """Run a program on the outbox at `path`, by way of the command `prefix`; return what it says."""
    program = f"import sys, pathlib\npath = pathlib.Path(sys.argv[1])\n{IMPORTS}\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.run(
        [*prefix, sys.executable, "-c", program, path], capture_output=True, text=True, env=environment, check=False
    )
    assert child.returncode == 0, child.stderr
    said: str = child.stdout
    return said


IMPORTS = """
from edge_asr.config_mqtt import OutboxConfig
from edge_asr.publish import outbox
outbox.RETRY_S = 0
box = outbox.DiskOutbox(OutboxConfig(), path)
"""
FILL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
box.add([("id-0", "{}")])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
rows = [box.add([(f"id-{n}", '"' + "x" * 3000 + '"')])[0] for n in range(1, 200)]
box.tend(True)
assert rows[-1].seq is None and rows[0].seq == 2, rows
assert "is full" in box.stats().trouble or "the disk fails" in box.stats().trouble, box.stats()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
import time
ends = time.monotonic() + 20
while box.stats().trouble and time.monotonic() < ends:
    box.tend(True)
    time.sleep(0.01)
found = box.pending(None, 1000)
assert [r.id for r in found] == [f"id-{n}" for n in range(200)]
assert [r.seq for r in found] == list(range(1, 201))
box.close()
"""


def test_a_disk_that_really_takes_no_more_bytes_loses_nothing(path: Path) -> None:
    run_child(FILL, path)

    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM transcripts").fetchone() == (200,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


FILL_DISK = """
import os, time
box.add([("id-0", "{}")])
rows = [box.add([(f"id-{n}", '"' + "x" * 3000 + '"')])[0] for n in range(1, 600)]
box.tend(True)
assert rows[-1].seq is None and rows[0].seq == 2, rows
assert "is full; free some space" in box.stats().trouble, box.stats()
assert [r.id for r in box.pending(None, 1000)] == [f"id-{n}" for n in range(600)]
os.unlink(path.parent.parent / "ballast")
ends = time.monotonic() + 20
while box.stats().trouble and time.monotonic() < ends:
    box.tend(True)
    time.sleep(0.01)
found = box.pending(None, 1000)
assert [r.id for r in found] == [f"id-{n}" for n in range(600)]
assert [r.seq for r in found] == list(range(1, 601))
box.close()
"""


def test_a_disk_that_is_really_full_loses_nothing(path: Path) -> None:
    mounted = path.parents[1] / "disk"
    mounted.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "none", mounted], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        (mounted / "ballast").write_bytes(bytes(19_000_000))
        run_child(FILL_DISK, mounted / "state" / "outbox.sqlite3")
        with closing(sqlite3.connect(mounted / "state" / "outbox.sqlite3")) as connection:
            assert connection.execute("SELECT count(*) FROM transcripts").fetchone() == (600,)
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        subprocess.run(["umount", mounted], check=True)


READ_ONLY = """
row, = box.add([("id-2", "{}")])
assert row.seq is None
print(box.stats().trouble)
box.tend(True)
box.close()
"""


def held_back() -> list[str]:
    """Return the command by which permissions hold back even root."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("not installed: setpriv (Debian: apt install util-linux)")
    return ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search,-fowner"]


@pytest.mark.parametrize("readable", [True, False])
def test_a_folder_and_file_that_are_read_only_are_told_of(readable: bool, path: Path) -> None:
    prefix = held_back()
    run_child('box.add([("id-1", "{}")])\nbox.close()', path)
    for file in path.parent.iterdir():
        file.chmod(0o444 if readable else 0o000)
    path.parent.chmod(0o555)
    try:
        said = run_child(READ_ONLY, path, prefix)
    finally:
        path.parent.chmod(0o755)

    assert "cannot be written; let the appliance's user write to it and to its folder" in said
    assert len(said.splitlines()) == 1


def test_a_sync_that_fails_is_told_of_and_over_when_it_works_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    outbox, synced, real = make(), threading.Event(), os.fdatasync

    def fail(handle: int) -> None:
        synced.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    row = add(outbox, 1)[0]
    assert synced.wait(PATIENCE_S)
    for _ in range(int(PATIENCE_S / 0.01)):
        outbox.tend(online=False)
        if outbox.stats().trouble:
            break
        threading.Event().wait(0.01)
    assert "Input/output error" in outbox.stats().trouble
    assert row.seq == 1
    assert outbox.synced_to == 0

    monkeypatch.setattr(os, "fdatasync", real)
    tend_until_well(outbox)
    assert outbox.synced_to == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
