"""Outages that are not chaos: what is spoken meanwhile, a full disk, subscribers that come and go, old commands."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from chaos import FILE, Appliance, Listener, appliance, read_outbox, realistic
from mosquitto import Door, Mosquitto, Subscriber, send, wait_for
from publishers import BASE, connected, disconnected, texts_on, transcript

from edge_asr.publish import outbox
from edge_asr.types import Transcript

COMMANDS = ["打开客厅灯", "关闭客厅灯", "打开空调", "关闭空调", "拉上窗帘"]

pytestmark = pytest.mark.slow


def test_five_commands_spoken_during_an_outage_are_recorded_with_their_age_and_never_said(
    broker: Mosquitto, tmp_path: Path
) -> None:
    door = Door(broker.port)
    door.open()
    try:
        with appliance(tmp_path, door.port) as guest, Subscriber(broker.port) as subscriber:
            connected(guest.publisher)
            door.shut()
            disconnected(guest.publisher)
            offered_at = []
            for text in COMMANDS:
                offered_at.append(time.monotonic())
                guest.publisher.offer(transcript(text))
            wait_for(lambda: guest.outbox.stats().pending == 5, "the records")
            recorded_at = opened_at = time.monotonic()
            door.open()
            subscriber.wait_for(lambda s: len(s.on("transcript")) == 5, "the record")
            received_at = time.monotonic()
            guest.publisher.offer(transcript("现在"))
            subscriber.wait_for(lambda s: s.on("said"), "the first command after the outage")
            records = [message.json for message in subscriber.on("transcript")[:5]]
            assert [record["text"] for record in records] == COMMANDS
            assert [record["replayed"] for record in records] == [True] * 5
            assert [record["seq"] for record in records] == [1, 2, 3, 4, 5]
            for record, earliest in zip(records, offered_at, strict=True):
                assert opened_at - recorded_at - 0.001 <= record["age_s"] <= received_at - earliest + 0.001
            assert texts_on(subscriber, "said") == ["现在"]
    finally:
        door.shut()


def test_ten_subscriber_restarts_repeat_nothing_on_said(broker: Mosquitto, tmp_path: Path) -> None:
    with appliance(tmp_path, broker.port) as guest:
        connected(guest.publisher)
        heard: list[str] = []
        for attempt in range(10):
            with Subscriber(broker.port, "edge_asr/#") as subscriber:
                # The retained status comes after everything else that the broker might keep for a newcomer.
                subscriber.wait_for(lambda s: s.on("status"), "the retained status")
                guest.publisher.offer(transcript(f"第{attempt}句"))
                subscriber.wait_for(lambda s: s.on("said") and s.on("transcript"), "said and the record")
                assert not any(message.retained for message in subscriber.on("said") + subscriber.on("transcript"))
                heard += texts_on(subscriber, "said")
        assert heard == [f"第{attempt}句" for attempt in range(10)]


@pytest.mark.parametrize(
    ("name", "payload"), [("reload", ""), ("flush", ""), ("replay", '{"from_seq": 1}'), ("listen", '{"seconds": 5}')]
)
def test_a_retained_command_does_nothing(name: str, payload: str, broker: Mosquitto, tmp_path: Path) -> None:
    retained = payload or "{}"  # an empty one is not kept by the broker
    with appliance(tmp_path, broker.port) as guest:
        guest.publisher.offer(transcript("一"))
        wait_for(lambda: guest.publisher.stats().sent == 1, "the acknowledgement")
    send(broker.port, f"{BASE}/cmd/{name}", retained, retained=True)
    with Subscriber(broker.port) as subscriber, appliance(tmp_path, broker.port) as guest:
        connected(guest.publisher)
        subscriber.wait_for(lambda s: any(m.retained for m in s.on(f"cmd/{name}")), "the retained command")
        send(broker.port, f"{BASE}/cmd/preset", "relaxed")
        subscriber.wait_for(lambda s: s.on("cmd/preset/result"), "the answer to the command behind it")
        guest.publisher.offer(transcript("二"))
        subscriber.wait_for(lambda s: s.on("transcript"), "the record")
        assert guest.obeyed == ["preset"]
        assert not subscriber.on(f"cmd/{name}/result")
        assert texts_on(subscriber, "transcript") == ["二"]
        # The same is obeyed where somebody means it now.
        send(broker.port, f"{BASE}/cmd/{name}", payload)
        subscriber.wait_for(lambda s: s.on(f"cmd/{name}/result"), "the answer")
        assert subscriber.on(f"cmd/{name}/result")[0].json["ok"] is True


class Disk:
    """Connects to SQLite files that can be made full."""

    def __init__(self) -> None:
        self.full = False
        self._connections: list[sqlite3.Connection] = []

    def connect(self, *arguments: Any, **keys: Any) -> sqlite3.Connection:
        self._connections.append(sqlite3.connect(*arguments, **keys))
        self._limit()
        return self._connections[-1]

    def fill(self, full: bool) -> None:
        self.full = full
        self._limit()

    def _limit(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(sqlite3.ProgrammingError):  # closed
                connection.execute(f"PRAGMA max_page_count = {1 if self.full else 1_000_000}")  # 1: not a page more


def test_what_is_said_while_the_disk_is_full_arrives_and_all_is_well_afterwards(
    broker: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "RETRY_S", 0.2)
    disk, door = Disk(), Door(broker.port)
    door.open()
    try:
        with Listener(broker.port) as listener, appliance(tmp_path, door.port, connect=disk.connect) as guest:
            connected(guest.publisher)
            given = [realistic(number) for number in range(250)]
            offer(guest, given[:50])
            wait_for(lambda: len(listener.delivered) == 50, "what came before")
            wait_for(lambda: guest.outbox.stats().pending == 0, "the acknowledgements")
            door.shut()  # nothing can be freed by forgetting what the broker has
            disconnected(guest.publisher)
            offer(guest, given[50:100])
            wait_for(lambda: guest.outbox.stats().pending == 50, "the records")
            disk.fill(True)
            offer(guest, given[100:200])
            wait_for(lambda: guest.outbox.stats().pending == 150, "the records in memory")
            assert guest.outbox.stats().trouble.endswith("is full; free some space")
            assert len(read_outbox(tmp_path / FILE)) < 200
            door.open()
            wait_for(lambda: len(listener.delivered) == 200, "what was said meanwhile")
            disk.fill(False)
            wait_for(lambda: not guest.outbox.stats().trouble, "the end of the trouble")
            offer(guest, given[200:])
            wait_for(lambda: len(listener.delivered) == 250, "what came afterwards")
            assert listener.delivered == [one.id for one in given]
            wait_for(lambda: guest.outbox.stats().pending == 0, "the acknowledgements")
            assert guest.outbox.stats().dropped == 0
            assert [row.id for row in read_outbox(tmp_path / FILE)][-50:] == listener.delivered[-50:]
    finally:
        door.shut()
    assert sum("is full; free some space" in record.getMessage() for record in caplog.records) == 1


def offer(guest: Appliance, given: list[Transcript]) -> None:
    for one in given:
        guest.publisher.offer(one)
