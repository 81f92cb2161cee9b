"""How often the outbox syncs, counted from outside, and who waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from slow_disk import SlowDisk, make_slow_disk

from edge_asr.config_mqtt import OutboxConfig
from edge_asr.publish import outbox_sync
from edge_asr.publish.outbox import DiskOutbox

ROOT = Path(__file__).parents[1]
PATIENCE_S = 20.0
BURST = 4
"""Fsyncs of a checkpoint, and one that was due."""


def measure(disk: SlowDisk, count: int, pause_ms: int, checkpoint_bytes: int) -> dict[str, Any]:
    """Record and acknowledge in a process of its own on a slow disk, while the broker answers; return what it says."""
    command = [sys.executable, ROOT / "tests" / "outbox_children.py", "measure", disk.folder]
    child = subprocess.run(
        [*map(str, command), str(count), str(pause_ms), str(checkpoint_bytes)],
        env={**os.environ, **disk.environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(child.stdout)
    return answer


@pytest.mark.parametrize(
    ("count", "pause_ms", "checkpoint_bytes"),
    [(300, 10, 4_000_000), pytest.param(12, 1000, 50_000, marks=pytest.mark.slow)],
)
def test_while_the_broker_answers_one_fsync_a_second_is_enough_and_none_is_the_publishers(
    tmp_path: Path, count: int, pause_ms: int, checkpoint_bytes: int
) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    disk = make_slow_disk(tmp_path, folder, ms=200)

    said = measure(disk, count, pause_ms, checkpoint_bytes)

    syncs = [sync for sync in disk.syncs() if said["started"] <= sync.at <= said["ended"]]
    assert len(syncs) <= said["ended"] - said["started"] + BURST
    assert len(syncs) >= 2
    assert said["thread"] not in {sync.thread for sync in syncs}


def wait_until_synced(outbox: DiskOutbox, seq: int) -> None:
    """Wait until the outbox says that all up to `seq` is on stable storage."""
    for _ in range(int(PATIENCE_S / 0.005)):
        if outbox.synced_to >= seq:
            return
        threading.Event().wait(0.005)
    pytest.fail(f"not synced: {outbox.synced_to} < {seq}")


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that has an entry for each fsync of ours; the next but the first would be due in an hour."""
    noted: list[int] = []
    real = os.fdatasync

    def note(handle: int) -> None:
        noted.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fdatasync", note)
    monkeypatch.setattr(outbox_sync, "EVERY_S", 3600.0)
    return noted


def test_while_the_broker_is_away_everything_is_synced_at_once(tmp_path: Path, syncs: list[int]) -> None:
    outbox = DiskOutbox(OutboxConfig(), tmp_path / "outbox.sqlite3")
    outbox.tend(online=False)

    for seq in range(1, 6):
        outbox.add([("id", "{}")])
        wait_until_synced(outbox, seq)

    assert len(syncs) == 6  # and the folder
    outbox.close()


def test_after_a_long_outage_the_next_sync_is_no_later_than_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_sync, "EVERY_S", 2.0)
    outbox = DiskOutbox(OutboxConfig(), tmp_path / "outbox.sqlite3")
    outbox.tend(online=False)
    for seq in range(1, 61):
        outbox.add([("id", "{}")])
        wait_until_synced(outbox, seq)

    outbox.tend(online=True)
    outbox.add([("id", "{}")])

    wait_until_synced(outbox, 61)  # not after two minutes, a turn for each of those
    outbox.close()


def test_a_sync_that_is_asked_for_does_not_wait_for_its_turn(tmp_path: Path, syncs: list[int]) -> None:
    outbox = DiskOutbox(OutboxConfig(), tmp_path / "outbox.sqlite3")
    outbox.tend(online=True)
    outbox.add([("id-1", "{}")])
    wait_until_synced(outbox, 1)
    outbox.add([("id-2", "{}")])
    assert outbox.synced_to == 1

    outbox.sync()

    wait_until_synced(outbox, 2)
    outbox.close()
    assert len(syncs) == 3


def test_a_copied_log_is_emptied_and_what_comes_next_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_sync, "IDLE_S", 0.0)
    monkeypatch.setattr(outbox_sync, "EVERY_S", 0.0)
    path = tmp_path / "outbox.sqlite3"
    outbox = DiskOutbox(OutboxConfig(), path)
    log = path.with_name("outbox.sqlite3-wal")
    sizes = []
    for number in range(3):
        outbox.add([(f"id-{number}", "{}")])
        sizes.append(log.stat().st_size)
        for _ in range(int(PATIENCE_S / 0.005)):
            outbox.tend(online=True)
            if log.stat().st_size == 0:
                break
            threading.Event().wait(0.005)
        sizes.append(log.stat().st_size)
    outbox.close()

    assert all(before > 0 == after for before, after in list(pairwise(sizes))[::2])
    again = DiskOutbox(OutboxConfig(), path)
    assert [row.id for row in again.pending(None, 10)] == ["id-0", "id-1", "id-2"]
    again.close()
