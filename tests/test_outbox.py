"""What an outbox promises: one body of tests for the one on disk and the one in memory."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from edge_asr import metrics
from edge_asr.config_mqtt import OutboxConfig
from edge_asr.errors import ConfigError
from edge_asr.publish import outbox_schema
from edge_asr.publish.outbox import DiskOutbox, MemoryOutbox, Outbox, Row
from edge_asr.publish.outbox_file import PENDING
from edge_asr.publish.outbox_rows import MEMORY_LIMIT
from edge_asr.publish.outbox_schema import INSERT

Make = Callable[..., DiskOutbox]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the file of the outbox goes; its folder is not there yet."""
    return tmp_path / "state" / "outbox.sqlite3"


@pytest.fixture
def make(path: Path) -> Iterator[Make]:
    """Return what makes an outbox on disk; at the end all are closed."""
    made: list[DiskOutbox] = []

    def run(connect: outbox_schema.Connect = sqlite3.connect, **config: float) -> DiskOutbox:
        made.append(DiskOutbox(OutboxConfig.model_validate(config), path, connect=connect))
        return made[-1]

    yield run
    for outbox in made:
        outbox.close()


@pytest.fixture(params=["disk", "memory"])
def outbox(request: pytest.FixtureRequest, make: Make) -> Outbox:
    """Return an outbox of each kind."""
    return make() if request.param == "disk" else MemoryOutbox()


def offered(first: int, last: int) -> list[tuple[str, str]]:
    """Return what is recorded as `id-<first>` to `id-<last>`."""
    return [(f"id-{number}", f'{{"text": "{number}"}}') for number in range(first, last + 1)]


def ids(rows: list[Row]) -> list[int]:
    """Return the numbers of rows that were `offered`."""
    return [int(row.id.removeprefix("id-")) for row in rows]


def test_what_is_added_is_pending_in_order_until_it_is_acknowledged(outbox: Outbox) -> None:
    first = outbox.add(offered(1, 3))
    outbox.add(offered(4, 4))

    assert ids(first) == [1, 2, 3]
    assert ids(outbox.pending(None, 10)) == [1, 2, 3, 4]
    assert outbox.pending(None, 10)[0].payload == '{"text": "1"}'

    outbox.acknowledge(first[:2])
    outbox.acknowledge(first[:2])

    assert ids(outbox.pending(None, 10)) == [3, 4]
    assert outbox.stats().pending == 2
    assert outbox.stats().trouble == ""


def test_pending_goes_on_behind_a_row_even_one_that_is_acknowledged(outbox: Outbox) -> None:
    rows = outbox.add(offered(1, 5))

    assert ids(outbox.pending(None, 2)) == [1, 2]
    outbox.acknowledge(rows[:2])

    assert ids(outbox.pending(rows[1], 2)) == [3, 4]
    assert outbox.pending(rows[4], 2) == []
    added = outbox.add(offered(6, 6))
    assert outbox.pending(rows[4], 2) == added


def test_what_the_broker_will_never_take_is_set_aside_and_counted_once(outbox: Outbox) -> None:
    rows = outbox.add(offered(1, 3))

    for _ in range(2):
        outbox.refuse(rows[1], "too large")

    assert ids(outbox.pending(None, 10)) == [1, 3]
    assert ids(outbox.pending(None, 10, range(1, 10))) == [1, 3]
    assert outbox.stats().refused == 1
    assert outbox.stats().dropped == 0


def test_the_statistics_tell_the_age_of_the_oldest_pending_one(outbox: Outbox) -> None:
    assert outbox.stats().oldest_s is None

    rows = outbox.add(offered(1, 1))
    outbox.tend(online=True)

    assert 0 <= (outbox.stats().oldest_s or -1) < 3600
    assert outbox.now() - rows[0].recorded_at < 3600
    assert outbox.stats().to_json()["pending"] == 1
    outbox.acknowledge(rows)
    assert outbox.stats().oldest_s is None


def test_what_nothing_was_added_to_is_empty(outbox: Outbox) -> None:
    assert outbox.add([]) == []
    assert outbox.pending(None, 10, range(1, 100)) == []
    assert outbox.first_kept(1) is None
    outbox.acknowledge([])
    outbox.sync()
    outbox.close()


def test_memory_drops_the_oldest_counted() -> None:
    outbox, before = MemoryOutbox(), metrics.DROPPED_TRANSCRIPTS._value.get()

    outbox.add(offered(1, MEMORY_LIMIT + 3))

    assert ids(outbox.pending(None, 1)) == [4]
    assert outbox.stats().dropped == 3
    assert metrics.DROPPED_TRANSCRIPTS._value.get() == before + 3


def test_the_disk_keeps_rows_and_numbers_over_a_restart(make: Make) -> None:
    first = make()
    rows = first.add(offered(1, 3))
    first.acknowledge(rows[2:])
    first.close()

    second = make()

    assert second.pending(None, 10) == rows[:2]
    assert [row.seq for row in rows] == [1, 2, 3]
    assert second.add(offered(4, 4))[0].seq == 4
    assert second.stats().rows == 4


def test_a_number_is_never_used_twice_even_when_its_row_is_gone(make: Make) -> None:
    first = make(keep=0)
    first.acknowledge(first.add(offered(1, 3)))
    first.tend(online=True)
    assert first.stats().rows == 0
    first.close()

    second = make()

    assert second.stats().last_seq == 3
    assert second.add(offered(4, 4))[0].seq == 4


def test_replay_offers_what_is_acknowledged_again_among_what_is_pending(make: Make) -> None:
    outbox = make()
    rows = outbox.add(offered(1, 6))
    outbox.acknowledge([rows[0], rows[1], rows[3]])

    again = outbox.pending(None, 10, range(2, 5))

    assert ids(again) == [2, 3, 4, 5, 6]
    assert [row.acknowledged for row in again] == [True, False, True, False, False]
    assert ids(outbox.pending(again[0], 2, range(2, 5))) == [3, 4]
    assert outbox.first_kept(2) == (2, 6, 5)
    assert outbox.first_kept(7) is None


def test_pending_rows_are_found_by_an_index_alone(make: Make, path: Path) -> None:
    make()
    with closing(sqlite3.connect(path)) as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {PENDING}", (0, 100)).fetchall()

    assert [step[3] for step in plan] == ["SEARCH transcripts USING INDEX pending (seq>?)"]


def test_a_second_owner_is_told_who_has_the_file(make: Make, path: Path) -> None:
    make()

    with pytest.raises(ConfigError, match=r"outbox\.sqlite3 is in use by process \d+; give this one a state_dir"):
        make()


def test_nobody_else_may_read_the_file(make: Make, path: Path) -> None:
    make().add(offered(1, 1))

    assert path.parent.stat().st_mode & 0o777 == 0o700
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file


def record(path: Path, seq: int, recorded_at: float, settled_at: float | None = None) -> None:
    """Put a row into the file that was recorded, and settled, then."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(INSERT, (seq, f"id-{seq}", recorded_at, "{}", settled_at, None))


def test_ages_are_told_only_by_a_clock_that_was_set(make: Make, path: Path) -> None:
    make().close()
    now = MemoryOutbox().now()
    record(path, 1, recorded_at=1000.0)  # by a clock that was not set
    record(path, 2, recorded_at=now - 7200)
    record(path, 3, recorded_at=now - 1800)
    record(path, 4, recorded_at=now + 100_000)

    outbox = make(max_age=3600)
    outbox.tend(online=True)

    assert ids(outbox.pending(None, 10)) == [1, 3, 4]
    assert outbox.stats().dropped == 1


def test_what_is_acknowledged_is_kept_for_a_while_whatever_the_clock_said(make: Make, path: Path) -> None:
    make().close()
    now = MemoryOutbox().now()
    record(path, 1, recorded_at=now - 900_000, settled_at=now - 1800)
    record(path, 2, recorded_at=now - 7200, settled_at=now - 7200)
    record(path, 3, recorded_at=1000.0, settled_at=1000.0)
    record(path, 4, recorded_at=now + 9e9, settled_at=now + 9e9)

    outbox = make(keep=3600)
    outbox.tend(online=True)

    assert ids(outbox.pending(None, 10, range(1, 10))) == [1, 3, 4]
    with closing(sqlite3.connect(path)) as connection:
        times = connection.execute("SELECT settled_at FROM transcripts WHERE seq > 2").fetchall()
    assert all(abs(settled_at - now) < 3600 for (settled_at,) in times)
    assert outbox.stats().dropped == 0


def test_beyond_its_size_the_oldest_goes_what_is_acknowledged_first(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    outbox, dropped_before = make(max_mb=0.25), metrics.DROPPED_TRANSCRIPTS._value.get()
    rows = outbox.add([(f"id-{number}", "x" * 1000) for number in range(1, 201)])
    outbox.acknowledge(rows[100:150])

    later = [row for number in range(201, 301) for row in outbox.add([(f"id-{number}", "x" * 1000)])]

    stats = outbox.stats()
    kept = ids(outbox.pending(None, 1000))
    assert stats.pending == len(kept) == stats.rows
    assert stats.dropped == 250 - len(kept) > 0
    assert kept == [*range(stats.dropped + 1, 101), *range(151, 301)]
    assert later[-1].seq == 300
    assert metrics.DROPPED_TRANSCRIPTS._value.get() - dropped_before == stats.dropped
    assert [record.message for record in caplog.records if "given up" in record.message] != []
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_a_large_surplus_is_dropped_a_few_hundred_rows_at_a_time(make: Make) -> None:
    make(max_mb=20).close()
    outbox = make(max_mb=20)
    outbox.add([(f"id-{number}", "x" * 1000) for number in range(1, 2001)])
    outbox.close()

    outbox = make(max_mb=0.25)
    counts = [outbox.stats().rows]
    while not counts[1:] or counts[-1] < counts[-2]:
        outbox.tend(online=True)
        counts.append(outbox.stats().rows)

    steps = [before - after for before, after in pairwise(counts)]
    assert max(steps) == 200
    assert outbox.stats().dropped == 2000 - counts[-1]
    assert 100 < counts[-1] < 250
