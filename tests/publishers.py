"""What tests of the publisher share: transcripts to offer, and a publisher that is closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mosquitto import Subscriber, wait_for

from edge_asr.config_mqtt import MqttConfig
from edge_asr.publish.commands import Command
from edge_asr.publish.dialect import Dialect
from edge_asr.publish.mqtt import MqttPublisher
from edge_asr.publish.outbox import MemoryOutbox, Outbox
from edge_asr.types import Transcript, new_segment_id

BASE = "edge_asr/hall"


def transcript(text: str) -> Transcript:
    return Transcript(
        id=new_segment_id(),
        device="hall",
        source="file:test.wav",
        text=text,
        text_raw=text,
        confidence=0.97,
        started_at=1_750_000_000.0,
        offset_s=0.0,
        duration_s=1.5,
        tokens=(),
        latency_ms={"response": 2.0},
        within_budget=True,
        decoded_at_pause=True,
        model="test",
        engine="test",
    )


def config(port: int, **keys: object) -> MqttConfig:
    return MqttConfig.model_validate({"port": port, "reconnect_min_s": 0.02, "reconnect_max_s": 0.1, **keys})


def make(config: MqttConfig, outbox: Outbox | None = None, **keys: Any) -> MqttPublisher:
    """Return a publisher that is yet to be started; it closes its outbox."""
    box = MemoryOutbox() if outbox is None else outbox
    return MqttPublisher(config, "hall", box, client_id="edge_asr-hall-test", **keys)


@contextmanager
def publishing(
    config: MqttConfig,
    *,
    finish: Callable[[Transcript], Transcript] = lambda given: given,
    command: Command | None = None,
    outbox: Outbox | None = None,
    dialects: Sequence[Dialect] = (),
    changed: Callable[[], None] = lambda: None,
) -> Iterator[MqttPublisher]:
    publisher = make(config, outbox, finish=finish, command=command, dialects=dialects, changed=changed)
    publisher.start()
    try:
        yield publisher
    finally:
        publisher.close(0.0)


def connected(publisher: MqttPublisher) -> None:
    wait_for(lambda: publisher.stats().connected, "the connection")


def disconnected(publisher: MqttPublisher) -> None:
    wait_for(lambda: not publisher.stats().connected, "the loss of the connection")


def texts_on(subscriber: Subscriber, topic: str) -> list[str]:
    return [message.json["text"] for message in subscriber.on(topic)]
