"""Partials, and transcripts that nobody recognised, against a real Mosquitto."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from mosquitto import Door, Mosquitto, Subscriber, free_port, wait_for
from prometheus_client import REGISTRY
from publishers import BASE, config, connected, disconnected, make, publishing, texts_on, transcript

from edge_asr.publish import connection, mqtt
from edge_asr.publish.mqtt import MqttPublisher
from edge_asr.publish.partials import LIMIT, Partials
from edge_asr.types import Partial, Transcript, new_segment_id


def partial(text: str, final: Transcript | None = None, *, end: bool = False) -> Partial:
    segment = new_segment_id() if final is None else final.id
    return Partial(segment, "file:test.wav", text, text[:1], 1_750_000_000.0, end)


def offer_until_shown(publisher: MqttPublisher, subscriber: Subscriber, text: str) -> None:
    """Offer a partial as often as it takes: those offered while the broker may hang are dropped, as they should be."""

    def shown() -> bool:
        publisher.offer_partial(partial(text))
        return text in texts_on(subscriber, "partial")

    wait_for(shown, f"the partial {text}")


def test_a_partial_and_its_end_are_published_as_they_are_and_not_retained(broker: Mosquitto) -> None:
    with publishing(config(broker.port)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        spoken = partial("打开客厅")
        publisher.offer_partial(spoken)
        subscriber.wait_for(lambda s: s.on("partial"), "the partial")
        end = dataclasses.replace(spoken, end=True)
        publisher.offer_partial(end)
        subscriber.wait_for(lambda s: len(s.on("partial")) == 2, "its end")
        first, last = subscriber.on("partial")
        assert (first.topic, first.qos, first.retained) == (f"{BASE}/partial", 0, False)
        assert (first.json, last.json) == (spoken.to_json(), end.to_json())
        with Subscriber(broker.port) as late:
            late.wait_for(lambda s: s.on("status"), "what is retained")
            assert late.on("partial") == []


def test_no_partial_arrives_after_its_final(broker: Mosquitto) -> None:
    finals = [transcript(str(number)) for number in range(500)]
    with publishing(config(broker.port)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)

        def speak(part: list[Transcript]) -> None:
            for final in part:
                for text in ("打", "打开", "打开灯"):
                    publisher.offer_partial(partial(text, final))
                publisher.offer(final)

        speakers = [threading.Thread(target=speak, args=(finals[start::4],)) for start in range(4)]
        for speaker in speakers:
            speaker.start()
        for speaker in speakers:
            speaker.join()
        subscriber.wait_for(lambda s: len(s.on("transcript")) == len(s.on("said")) == 500, "all finals")
        final_ids: set[str] = set()
        for message in list(subscriber.messages):
            if message.topic.endswith(("/said", "/transcript")):
                final_ids.add(message.json["id"])
            elif message.topic.endswith("/partial"):
                assert message.json["id"] not in final_ids
        assert len(final_ids) == 500


def test_a_partial_that_waits_when_its_final_is_offered_never_goes_out(broker: Mosquitto) -> None:
    taken, go_on = threading.Event(), threading.Event()

    def finish(given: Transcript) -> Transcript:  # holds the publisher thread up
        taken.set()
        assert go_on.wait(30)
        return given

    with publishing(config(broker.port), finish=finish) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        publisher.offer(transcript("一"))
        assert taken.wait(30)
        final = transcript("二")
        publisher.offer_partial(partial("二", final))
        publisher.offer_partial(partial("三"))
        publisher.offer(final)
        go_on.set()
        subscriber.wait_for(lambda s: len(s.on("said")) == 2 and s.on("partial"), "everything else")
        assert texts_on(subscriber, "partial") == ["三"]


def test_partials_spoken_while_the_broker_is_away_are_never_delivered(broker: Mosquitto) -> None:
    door = Door(broker.port)
    door.open()
    with publishing(config(door.port)) as publisher:
        connected(publisher)
        broker.kill()
        disconnected(publisher)
        door.shut()
        for number in range(100):
            publisher.offer_partial(partial(str(number)))
        publisher.offer(transcript("离线"))
        wait_for(lambda: publisher.stats().dropped_live == 1, "the thread to have taken everything")
        broker.start()
        with Subscriber(broker.port) as subscriber:
            door.open()
            connected(publisher)
            offer_until_shown(publisher, subscriber, "现在")
            subscriber.wait_for(lambda s: s.on("transcript"), "the record of the outage")
            assert set(texts_on(subscriber, "partial")) == {"现在"}
    door.shut()


def test_partials_stop_while_the_broker_owes_an_answer_and_go_on_afterwards(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PROOF_S", 0.1)
    with publishing(config(broker.port)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        broker.freeze()
        publisher.offer(transcript("打开"))  # its acknowledgement is what the broker owes
        live = publisher._connection
        wait_for(lambda: live and live.unacknowledged and not live.brisk, "the doubt")
        assert live is not None
        assert live.clear  # the kernel takes everything
        for number in range(100):
            publisher.offer_partial(partial(str(number)))
        wait_for(lambda: not publisher._partials._latest, "the thread to have taken them")
        broker.thaw()
        offer_until_shown(publisher, subscriber, "现在")
        assert set(texts_on(subscriber, "partial")) == {"现在"}


def test_partials_are_dropped_while_the_socket_is_congested(broker: Mosquitto, monkeypatch: pytest.MonkeyPatch) -> None:
    congested = threading.Event()
    clear = vars(connection.Connection)["clear"].fget
    monkeypatch.setattr(
        connection.Connection, "clear", property(lambda self: not congested.is_set() and bool(clear(self)))
    )
    with publishing(config(broker.port)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        congested.set()
        publisher.offer_partial(partial("堵"))
        publisher.offer(transcript("一"))
        wait_for(lambda: publisher.stats().sent == 1, "the record, which is published no earlier")
        congested.clear()
        offer_until_shown(publisher, subscriber, "现在")
        assert set(texts_on(subscriber, "partial")) == {"现在"}


def test_only_the_latest_partial_of_each_segment_waits_and_of_few_segments() -> None:
    waiting, final = Partials(), transcript("打开")
    for text in ("打", "打开"):
        waiting.add(partial(text, final))
    waiting.add(partial("关"))
    assert [(given.text, given.stable) for given in waiting.take()] == [("打开", "打"), ("关", "关")]
    assert waiting.take() == []
    for number in range(LIMIT + 10):
        waiting.add(partial(str(number)))
    assert [given.text for given in waiting.take()] == [str(number) for number in range(10, LIMIT + 10)]


def test_nothing_takes_the_place_of_an_end() -> None:
    waiting, final = Partials(), transcript("打开")
    for given in (partial("打", final), partial("", final, end=True), partial("打开", final)):
        waiting.add(given)
    assert [given.end for given in waiting.take()] == [True]


def test_a_publisher_that_is_closed_takes_no_partial_amiss(broker: Mosquitto) -> None:
    with publishing(config(broker.port)) as publisher:
        connected(publisher)
        publisher.close(1.0)
        publisher.offer_partial(partial("太晚"))


def counted(name: str) -> float:
    value = REGISTRY.get_sample_value(f"edge_asr_{name}_total")
    assert value is not None
    return value


def test_what_nobody_recognised_is_recorded_and_never_said(broker: Mosquitto) -> None:
    before = counted("dropped_said")
    with publishing(config(broker.port)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        publisher.offer(dataclasses.replace(transcript(""), lost=True))
        publisher.offer(transcript("现在"))
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 2 and s.on("said"), "the record")
        assert [message.json.get("lost") for message in subscriber.on("transcript")] == [True, None]
        assert texts_on(subscriber, "said") == ["现在"]
        stats = publisher.stats()
        assert (stats.said, stats.dropped_live) == (1, 0)
    assert counted("dropped_said") == before


def test_what_nobody_recognised_is_no_dropped_command_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "INBOX_LIMIT", 5)
    before = counted("dropped_said"), counted("dropped_transcripts")
    publisher = make(config(free_port()))  # not started: what is offered stays in the inbox
    for number in range(8):  # three drop out again: 0 and 2, which were lost, and 1
        publisher.offer(dataclasses.replace(transcript(str(number)), lost=number % 2 == 0))
    assert (publisher.stats().dropped_live, publisher.stats().dropped_transcripts) == (1, 3)
    publisher.close(0.0)
    publisher.offer(dataclasses.replace(transcript("太晚"), lost=True))
    assert (publisher.stats().dropped_live, publisher.stats().dropped_transcripts) == (4, 9)
    assert (counted("dropped_said") - before[0], counted("dropped_transcripts") - before[1]) == (4, 9)
