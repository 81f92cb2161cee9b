"""The publisher with its outbox on disk, against a real Mosquitto: what is recorded arrives, whatever stops."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from mosquitto import Door, Mosquitto, Subscriber, free_port, send, wait_for
from publishers import BASE, config, connected, disconnected, publishing, texts_on, transcript

from edge_asr.config_mqtt import OutboxConfig
from edge_asr.publish import delivery, notices
from edge_asr.publish.delivery import READ
from edge_asr.publish.dialect import Greeting, Message
from edge_asr.publish.mqtt import MqttPublisher
from edge_asr.publish.outbox import DiskOutbox


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "outbox.sqlite3"


def on_disk(file: Path) -> DiskOutbox:
    return DiskOutbox(OutboxConfig(), file)


def nobody(name: str, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
    raise AssertionError(f"the publisher obeys {name} itself")


def offer_all(publisher: MqttPublisher, texts: Iterable[str]) -> None:
    for text in texts:
        publisher.offer(transcript(text))


def numbers(subscriber: Subscriber, topic: str = "transcript") -> list[int]:
    return [message.json["seq"] for message in subscriber.on(topic)]


def ready(broker: Mosquitto, times: int = 1) -> None:
    wait_for(lambda: broker.log().count(f"{BASE}/cmd/+") >= times, "the subscription to commands")


def answer(subscriber: Subscriber, name: str) -> dict[str, Any]:
    subscriber.wait_for(lambda s: s.on(f"cmd/{name}/result"), f"the answer to {name}")
    return subscriber.on(f"cmd/{name}/result")[-1].json


def test_transcripts_are_numbered_and_said_carries_the_same_number(broker: Mosquitto, file: Path) -> None:
    with publishing(config(broker.port), outbox=on_disk(file)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        offer_all(publisher, ["一", "二", "三"])
        subscriber.wait_for(lambda s: len(s.on("said")) == 3, "the commands")
        assert numbers(subscriber) == numbers(subscriber, "said") == [1, 2, 3]
        wait_for(lambda: publisher.stats().queued == 0, "the acknowledgements")


def test_what_no_broker_has_taken_is_published_by_the_next_start_and_never_said(broker: Mosquitto, file: Path) -> None:
    texts = [str(number) for number in range(READ + 20)]
    with publishing(config(free_port()), outbox=on_disk(file)) as publisher:
        offer_all(publisher, texts)
        publisher.close(0.0)
        assert (publisher.stats().queued, publisher.stats().dropped_transcripts) == (len(texts), 0)
    with Subscriber(broker.port) as subscriber, publishing(config(broker.port), outbox=on_disk(file)) as publisher:
        publisher.offer(transcript("现在"))
        subscriber.wait_for(lambda s: len(s.on("transcript")) == len(texts) + 1, "the record")
        assert texts_on(subscriber, "transcript") == [*texts, "现在"]
        assert numbers(subscriber) == list(range(1, len(texts) + 2))
        assert {message.json["replayed"] for message in subscriber.on("transcript")[: len(texts)]} == {True}
        assert set(texts_on(subscriber, "said")) <= {"现在"}


def test_replay_publishes_what_was_acknowledged_once_more_and_in_order(broker: Mosquitto, file: Path) -> None:
    texts = [str(number) for number in range(3 * READ)]
    with (
        publishing(config(broker.port), outbox=on_disk(file), command=nobody) as publisher,
        Subscriber(broker.port) as subscriber,
    ):
        ready(broker)
        offer_all(publisher, texts)
        wait_for(lambda: publisher.stats().sent == len(texts), "the acknowledgements")
        said = len(subscriber.on("said"))
        send(broker.port, f"{BASE}/cmd/replay", '{"from_seq": 51}')
        assert answer(subscriber, "replay") == {"ok": True, "asked": 51, "rows": 250, "from_seq": 51, "to_seq": 300}
        publisher.offer(transcript("现在"))
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 551, "the replay")
        assert numbers(subscriber) == [*range(1, 301), *range(51, 302)]
        replayed = [message.json["replayed"] for message in subscriber.on("transcript")]
        assert replayed == [False] * 300 + [True] * 250 + [False]
        assert len(subscriber.on("said")) - said == 1
        wait_for(lambda: publisher.stats().queued == 0, "the acknowledgements")


def test_a_replay_from_beyond_the_end_says_that_there_is_nothing(broker: Mosquitto, file: Path) -> None:
    with (
        publishing(config(broker.port), outbox=on_disk(file), command=nobody),
        Subscriber(broker.port) as subscriber,
    ):
        ready(broker)
        send(broker.port, f"{BASE}/cmd/replay", '{"from_seq": 7}')
        assert answer(subscriber, "replay") == {"ok": True, "asked": 7, "rows": 0, "from_seq": None, "to_seq": None}


def test_a_replay_goes_on_where_a_lost_connection_left_it(
    broker: Mosquitto, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [str(number) for number in range(1, 301)]
    with Subscriber(broker.port) as subscriber:
        with publishing(config(broker.port), outbox=on_disk(file)) as publisher:
            offer_all(publisher, texts)
            wait_for(lambda: publisher.stats().sent == 300, "the acknowledgements")
        before = len(subscriber.on("transcript"))
        door = Door(broker.port)
        door.open()
        with publishing(config(door.port), outbox=on_disk(file)) as publisher:
            connected(publisher)
            done = threading.Event()
            acknowledge = publisher._delivery.acknowledge

            def cut_in_the_middle(message_id: int) -> None:
                acknowledge(message_id)
                if publisher._delivery.sent == 150 and not done.is_set():
                    done.set()
                    door.shut()
                    door.open()

            monkeypatch.setattr(publisher._delivery, "acknowledge", cut_in_the_middle)
            publisher._delivery.replay({"from_seq": 1})
            publisher.wake()
            subscriber.wait_for(lambda s: "300" in texts_on(s, "transcript")[before:], "the end of the replay")
            assert done.is_set()
            arrived = numbers(subscriber)[before:]
            assert list(dict.fromkeys(arrived)) == list(range(1, 301))
            assert len(arrived) <= 300 + 2 * 20, "only what was in flight came twice"
        door.shut()


def test_a_replay_does_not_pass_by_what_is_still_to_be_published(broker: Mosquitto, file: Path) -> None:
    with publishing(config(free_port()), outbox=on_disk(file)) as publisher:
        offer_all(publisher, (str(number) for number in range(1, 401)))
        publisher.close(0.0)
    with Subscriber(broker.port) as subscriber:
        publisher = publisher_of(broker, file)
        publisher._delivery.replay({"from_seq": 200})  # asked for before anything went out
        publisher.start()
        try:
            subscriber.wait_for(lambda s: len(s.on("transcript")) == 400, "everything")
            wait_for(lambda: publisher.stats().queued == 0, "the acknowledgements")
        finally:
            publisher.close(1.0)
        assert numbers(subscriber) == list(range(1, 401))


def publisher_of(broker: Mosquitto, file: Path) -> MqttPublisher:
    return MqttPublisher(config(broker.port), "hall", on_disk(file), client_id="edge_asr-hall-test")


def test_flush_is_answered_when_all_is_acknowledged_and_on_the_disk(broker: Mosquitto, file: Path) -> None:
    outbox = on_disk(file)
    with (
        publishing(config(broker.port), outbox=outbox, command=nobody) as publisher,
        Subscriber(broker.port) as subscriber,
    ):
        ready(broker)
        offer_all(publisher, (str(number) for number in range(200)))
        wait_for(lambda: outbox.stats().last_seq == 200, "the record")
        send(broker.port, f"{BASE}/cmd/flush", "")
        assert answer(subscriber, "flush") == {"ok": True, "pending": 0, "synced": True}
        assert publisher.stats().sent == 200
        assert outbox.synced_to >= 200


def test_flush_says_so_where_it_cannot_be_done(broker: Mosquitto, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FLUSH_S", 0.2)
    monkeypatch.setattr(DiskOutbox, "synced_to", property(lambda self: 0))
    with (
        publishing(config(broker.port), outbox=on_disk(file), command=nobody) as publisher,
        Subscriber(broker.port) as subscriber,
    ):
        ready(broker)
        publisher.offer(transcript("现在"))
        wait_for(lambda: publisher.stats().sent == 1, "the acknowledgement")
        send(broker.port, f"{BASE}/cmd/flush", "")
        assert answer(subscriber, "flush") == {"ok": True, "pending": 0, "synced": False}


class Parrot:
    """A dialect that says what it is told, and repeats what is said."""

    topics: Sequence[str] = ("parrot/hear",)

    def __init__(self) -> None:
        self.told: list[Message] = []
        self.heard: list[tuple[str, bytes, bool]] = []

    def greet(self) -> Iterator[Message]:
        yield Message("parrot/hello", "hello", qos=1, retain=True)

    def said(self, said: Mapping[str, Any]) -> Iterator[Message]:
        yield Message("parrot/said", said["text"])

    def receive(self, topic: str, payload: bytes, retained: bool) -> Greeting:
        self.heard.append((topic, payload, retained))
        return Greeting.AGAIN if payload == b"again" else Greeting.NOTHING

    def take(self) -> list[Message]:
        told, self.told = self.told, []
        return told


def test_another_language_greets_hears_repeats_and_speaks_up(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "GREET_WITHIN_S", 0.1)
    parrot = Parrot()
    with Subscriber(broker.port) as subscriber, publishing(config(broker.port), dialects=[parrot]) as publisher:
        publisher.set_state({"state": "ready"})
        subscriber.wait_for(lambda s: s.on("hello") and s.on("state"), "the greeting")
        publisher.offer(transcript("打开"))
        subscriber.wait_for(
            lambda s: [m.payload for m in s.messages if m.topic == "parrot/said"] == ["打开"], "the echo"
        )
        parrot.told.append(Message("parrot/news", "new", qos=1))
        publisher.wake()
        subscriber.wait_for(lambda s: s.on("news"), "what came up")
        before = len(subscriber.on("state"))
        wait_for(lambda: "parrot/hear" in broker.log(), "the subscription")
        send(broker.port, "parrot/hear", "nothing")
        send(broker.port, "parrot/hear", "again")
        subscriber.wait_for(lambda s: len(s.on("hello")) == 2 and len(s.on("state")) > before, "another greeting")
        assert [message.payload for message in subscriber.on("status")] == ["online", "online"]
        assert parrot.heard == [("parrot/hear", b"nothing", False), ("parrot/hear", b"again", False)]


def test_what_another_language_says_to_nobody_is_not_said_later(broker: Mosquitto) -> None:
    parrot = Parrot()
    with publishing(config(broker.port), dialects=[parrot]) as publisher:
        connected(publisher)
        broker.kill()
        disconnected(publisher)
        parrot.told.append(Message("parrot/news", "old", qos=1))
        publisher.wake()
        wait_for(lambda: not parrot.told, "somebody to listen")
        broker.start()
        with Subscriber(broker.port) as subscriber:
            connected(publisher)
            parrot.told.append(Message("parrot/news", "new", qos=1))
            publisher.wake()
            subscriber.wait_for(lambda s: s.on("news"), "the news")
            assert [message.payload for message in subscriber.on("news")] == ["new"]


def test_who_asked_for_a_greeting_right_before_an_outage_keeps_nobody_busy(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "GREET_WITHIN_S", 0.0)
    with publishing(config(broker.port, reconnect_min_s=600, reconnect_max_s=600), dialects=[Parrot()]) as publisher:
        connected(publisher)
        broker.freeze()  # nothing is published any more
        publisher._notices.receive("parrot/hear", b"again", False)
        broker.kill()
        disconnected(publisher)
        wait_for(lambda: publisher.stats().last_failure, "the end of the connection")
        assert publisher._notices.greet_at == float("inf")


def test_an_outage_is_told_by_its_reason_afterwards(broker: Mosquitto) -> None:
    with publishing(config(broker.port)) as publisher:
        connected(publisher)
        assert publisher.stats().last_failure == ""
        broker.kill()
        disconnected(publisher)
        wait_for(lambda: publisher.stats().last_failure, "the reason")
        broker.start()
        connected(publisher)
        assert publisher.stats().last_failure
