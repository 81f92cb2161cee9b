"""The outbox's file: new releases' and old ones', damaged ones, and those of others."""

from __future__ import annotations

import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from edge_asr.config_mqtt import OutboxConfig
from edge_asr.publish import outbox_schema
from edge_asr.publish.outbox import DiskOutbox
from edge_asr.publish.outbox_schema import APPLICATION_ID

SECOND = ("ALTER TABLE transcripts ADD COLUMN device TEXT NOT NULL DEFAULT 'hall'",)
"""A step that a later release could bring."""
COUNT = 300
Open = Callable[[], DiskOutbox]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the file of the outbox is."""
    return tmp_path / "outbox.sqlite3"


@pytest.fixture
def reopen(path: Path) -> Iterator[Open]:
    """Return what opens the outbox; at the end all are closed."""
    opened: list[DiskOutbox] = []

    def run() -> DiskOutbox:
        opened.append(DiskOutbox(OutboxConfig(), path))
        return opened[-1]

    yield run
    for outbox in opened:
        outbox.close()


@pytest.fixture
def filled(path: Path) -> None:
    """Leave a file with rows in it, of which the last ten are acknowledged."""
    outbox = DiskOutbox(OutboxConfig(), path)
    rows = outbox.add([(f"id-{number}", f'{{"text": "{number} {"x" * 300}"}}') for number in range(1, COUNT + 1)])
    outbox.acknowledge(rows[-10:])
    outbox.close()


def read(path: Path, query: str) -> list[tuple[object, ...]]:
    """Return the answer to a query on the file."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.usefixtures("filled")
def test_a_file_of_an_older_release_is_brought_up_to_date_with_all_its_rows(
    path: Path, reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(path, "SELECT * FROM transcripts")
    monkeypatch.setattr(outbox_schema, "STEPS", [*outbox_schema.STEPS, SECOND])

    outbox = reopen()

    assert read(path, "PRAGMA user_version") == [(2,)]
    assert read(path, "SELECT * FROM transcripts") == [(*row, "hall") for row in before]
    assert outbox.add([("later", "{}")])[0].seq == COUNT + 1
    assert outbox.stats().trouble == ""


@pytest.mark.usefixtures("filled")
def test_a_step_that_fails_in_the_middle_leaves_the_older_file_whole(
    path: Path, reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(path, "SELECT * FROM transcripts")
    steps = [*outbox_schema.STEPS, (*SECOND, "INSERT INTO nowhere VALUES (1)")]
    monkeypatch.setattr(outbox_schema, "STEPS", steps)

    outbox = reopen()

    assert "nowhere" in outbox.stats().trouble
    assert read(path, "PRAGMA user_version") == [(1,)]
    assert read(path, "SELECT * FROM transcripts") == before
    assert outbox.add([("later", "{}")])[0].seq is None


KILLED_IN_A_STEP = """
import os, pathlib, signal, sqlite3, sys
from edge_asr.publish import outbox_schema

class Killed(sqlite3.Connection):
    def execute(self, query, *values):
        if query == "PRAGMA user_version = 2":
            super().execute("PRAGMA cache_size = 1")
            super().execute("UPDATE transcripts SET payload = payload || ' '")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(query, *values)

outbox_schema.STEPS.append((sys.argv[2],))
path = pathlib.Path(sys.argv[1])
outbox_schema.open_file(path, lambda *values, **keys: sqlite3.connect(*values, factory=Killed, **keys))
"""


@pytest.mark.usefixtures("filled")
def test_a_step_in_which_the_process_is_killed_leaves_the_older_file_whole(path: Path, reopen: Open) -> None:
    before = read(path, "SELECT * FROM transcripts")

    child = subprocess.run([sys.executable, "-c", KILLED_IN_A_STEP, path, SECOND[0]], check=False)

    assert child.returncode == -signal.SIGKILL
    assert read(path, "PRAGMA user_version") == [(1,)]
    assert read(path, "SELECT * FROM transcripts") == before
    assert reopen().stats().rows == COUNT


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    ("statement", "words"),
    [("PRAGMA user_version = 9", "of a newer release"), ("PRAGMA application_id = 7", "belongs to another program")],
)
def test_a_file_that_is_not_ours_is_left_alone(
    path: Path, reopen: Open, caplog: pytest.LogCaptureFixture, statement: str, words: str
) -> None:
    read(path, statement)
    before = path.read_bytes()

    outbox = reopen()
    rows = outbox.add([("later", "{}")])

    assert words in outbox.stats().trouble
    assert "set outbox.file to another" in outbox.stats().trouble
    assert outbox.pending(None, 10) == rows
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    outbox.close()
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["outbox.sqlite3", "outbox.sqlite3.lock"]


def test_a_database_of_another_program_without_a_number_is_left_alone(path: Path, reopen: Open) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()

    assert "belongs to another program" in reopen().stats().trouble
    assert path.read_bytes() == before


def aside(path: Path) -> list[Path]:
    """Return the damaged files that were set aside."""
    return sorted(file for file in path.parent.glob("*.damaged-*") if not file.name.endswith(("-wal", "-shm")))


def random_bytes(data: bytearray) -> None:
    """Replace everything."""
    data[:] = random.Random(0).randbytes(len(data))


def zeroed_header(data: bytearray) -> None:
    """Erase the first page."""
    data[:4096] = bytes(4096)


def truncated(data: bytearray) -> None:
    """Cut off the second half."""
    del data[len(data) // 2 // 4096 * 4096 :]


def overwritten_page(data: bytearray) -> None:
    """Put noise into the middle."""
    data[len(data) // 2 : len(data) // 2 + 4096] = random.Random(0).randbytes(4096)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    ("damage", "least_saved"), [(random_bytes, 0), (zeroed_header, 0), (truncated, 10), (overwritten_page, 100)]
)
def test_a_damaged_file_is_set_aside_and_what_can_be_read_is_saved(
    path: Path,
    reopen: Open,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytearray], None],
    least_saved: int,
) -> None:
    before = {row[0]: row for row in read(path, "SELECT seq, id, recorded_at, payload FROM transcripts")}
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)

    outbox = reopen()

    saved = read(path, "SELECT seq, id, recorded_at, payload FROM transcripts ORDER BY seq")
    assert len(saved) >= least_saved
    assert all(row == before[row[0]] for row in saved)
    assert [file.read_bytes().rstrip(b"\0") for file in aside(path)] == [data.rstrip(b"\0")]
    assert outbox.stats().trouble == ""
    assert outbox.stats().rows == len(saved)
    seq = outbox.add([("later", "{}")])[0].seq
    assert seq is not None
    assert seq > 1_700_000_000
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert f"{len(saved)} transcripts saved" in caplog.text


def test_a_log_torn_in_its_middle_costs_only_what_was_not_on_the_disk(path: Path, reopen: Open) -> None:
    outbox = DiskOutbox(OutboxConfig(), path)
    for number in range(1, 51):
        outbox.add([(f"id-{number}", "{}")])
    wal = outbox_schema.wal_of(path)
    copy, log = path.read_bytes(), bytearray(wal.read_bytes())
    outbox.close()
    path.write_bytes(copy)
    log[len(log) // 2 :] = random.Random(0).randbytes(len(log) - len(log) // 2)
    wal.write_bytes(log)

    again = reopen()

    kept = [row.id for row in again.pending(None, 100)]
    assert 10 < len(kept) < 50
    assert kept == [f"id-{number}" for number in range(1, len(kept) + 1)]
    assert again.stats().trouble == ""
    assert again.add([("later", "{}")])[0].seq == len(kept) + 1
    assert aside(path) == []


def test_an_empty_file_is_a_new_one(path: Path, reopen: Open) -> None:
    path.touch()

    assert reopen().add([("id-1", "{}")])[0].seq == 1
    assert read(path, "PRAGMA application_id") == [(APPLICATION_ID,)]


def add_until_killed(folder: Path, prefix: str, after: int) -> list[str]:
    """Let a process record, kill it once it has said `after` ids; return all that it said."""
    program = Path(__file__).parent / "outbox_children.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, program, "add", folder, prefix], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    with child:
        said = [child.stdout.readline() for _ in range(after)]
        child.kill()
        rest = child.stdout.read()
    # The last line may be cut off: then it has not been said.
    return [line.strip() for line in [*said, *rest.splitlines(keepends=True)] if line.endswith("\n")]


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_what_was_recorded_survives_a_sigkill(tmp_path: Path, times: int) -> None:
    chance, said = random.Random(times), list[str]()

    for number in range(times):
        said += add_until_killed(tmp_path, f"run{number}", chance.randint(1, 300))

    outbox = DiskOutbox(OutboxConfig(), tmp_path / "outbox.sqlite3")
    kept = [row.id for row in outbox.pending(None, 10**9)]
    outbox.close()
    assert set(said) <= set(kept)
    assert len(kept) - len(said) <= times  # at most one a run was recorded and not said yet
    assert [identity for identity in kept if identity in set(said)] == said
