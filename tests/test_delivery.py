"""What a delivery makes of connections that end: on one that a test cuts by hand."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from edge_asr.config_mqtt import OutboxConfig
from edge_asr.publish.connection import Connection
from edge_asr.publish.delivery import CUTS, Delivery
from edge_asr.publish.dialect import Message
from edge_asr.publish.outbox import DiskOutbox
from edge_asr.publish.outbox_erasure import Wish

SMALL, LARGE = '{"text":"打开","latency_ms":{}}', '{"text":"' + "很" * 1000 + '","latency_ms":{}}'


class Wire:
    """A connection on which something has been acknowledged; it notes what is published."""

    up = True
    in_flight_limit = 20
    proven_at = 1.0

    def __init__(self) -> None:
        self.published: list[int] = []
        self._ids = itertools.count(1)

    def publish(self, message: Message) -> int:
        self.published.append(next(self._ids))
        return self.published[-1]


@pytest.fixture
def delivery(tmp_path: Path) -> Iterator[Delivery]:
    with closing(DiskOutbox(OutboxConfig(), tmp_path / "outbox.sqlite3")) as outbox:
        yield Delivery(outbox, "edge_asr/hall/transcript")


def connect(delivery: Delivery) -> Any:
    wire = Wire()
    delivery.begin()
    delivery.send(cast(Connection, wire))
    return wire


def cut(delivery: Delivery) -> None:
    wire = connect(delivery)
    assert wire.published
    delivery.lose(wire)


def test_what_the_broker_hangs_up_on_each_time_is_set_aside_and_the_others_pass(delivery: Delivery) -> None:
    delivery.record([("large", LARGE), ("small", SMALL)])
    for _ in range(1 + CUTS):  # the first has both in flight: nobody knows which it is
        cut(delivery)
    assert (delivery.outbox.stats().refused, delivery.outbox.stats().pending) == (1, 1)
    wire = connect(delivery)
    assert len(wire.published) == 1
    delivery.acknowledge(wire.published[0])
    delivery.note()
    assert delivery.outbox.stats().pending == 0


def test_a_connection_that_flaps_costs_no_transcript_of_a_size_that_has_passed(delivery: Delivery) -> None:
    delivery.record([("passes", LARGE)])
    wire = connect(delivery)
    delivery.acknowledge(wire.published[0])
    delivery.record([("small", SMALL)])
    for _ in range(5 * CUTS):
        cut(delivery)
    assert (delivery.outbox.stats().refused, delivery.outbox.stats().pending) == (0, 1)


def test_what_was_erased_is_not_published_though_it_was_read_already(delivery: Delivery, tmp_path: Path) -> None:
    delivery.record([(f"id-{number}", SMALL) for number in range(50)])
    wire = connect(delivery)
    assert len(wire.published) == Wire.in_flight_limit
    os.close(Wish(tmp_path / "outbox.sqlite3").ask())
    assert delivery.outbox.tend(online=True)
    delivery.forget()
    for number in list(wire.published):
        delivery.acknowledge(number)
    delivery.note()
    delivery.send(wire)
    assert len(wire.published) == Wire.in_flight_limit
    assert delivery.outbox.stats().pending == 0
