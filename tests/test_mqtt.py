"""The publisher against a real Mosquitto, read with the real mosquitto_sub."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mosquitto import Door, Mosquitto, Subscriber, free_port, wait_for
from prometheus_client import REGISTRY
from publishers import BASE, config, connected, disconnected, make, publishing, texts_on, transcript

from edge_asr.publish.connection import Connection
from edge_asr.publish.dialect import Message
from edge_asr.publish.mqtt import MqttPublisher
from edge_asr.publish.outbox import MemoryOutbox
from edge_asr.types import Marks, Transcript


def offer_all(publisher: MqttPublisher, texts: list[str]) -> None:
    for text in texts:
        publisher.offer(transcript(text))


def unique(texts: list[str]) -> list[str]:
    """Without the repetitions that QoS 1 permits."""
    return list(dict.fromkeys(texts))


def test_status_is_retained_online_while_running_and_offline_after_a_clean_close(broker: Mosquitto) -> None:
    with publishing(config(broker.port)) as publisher:
        connected(publisher)
        wait_for(lambda: publisher._connection and not publisher._connection.unacknowledged, "the acknowledgement")
        with Subscriber(broker.port) as subscriber:
            subscriber.wait_for(lambda s: s.on("status"), "status")
            status = subscriber.on("status")[0]
            assert (status.topic, status.payload, status.retained) == (f"{BASE}/status", "online", True)
            publisher.close(1.0)
            subscriber.wait_for(lambda s: len(s.on("status")) == 2, "offline")
            assert (subscriber.on("status")[1].payload, subscriber.on("status")[1].qos) == ("offline", 1)
    with Subscriber(broker.port) as late:
        late.wait_for(lambda s: s.on("status"), "the retained status")
        assert (late.on("status")[0].payload, late.on("status")[0].retained) == ("offline", True)


def test_a_process_that_is_killed_leaves_its_last_will(broker: Mosquitto) -> None:
    program = (
        "import time\n"
        "from edge_asr.config_mqtt import MqttConfig\n"
        "from edge_asr.publish.mqtt import MqttPublisher\n"
        "from edge_asr.publish.outbox import MemoryOutbox\n"
        f"MqttPublisher(MqttConfig(port={broker.port}), 'hall', MemoryOutbox(), client_id='hall').start()\n"
        "time.sleep(600)\n"
    )
    with Subscriber(broker.port) as subscriber, subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            subscriber.wait_for(lambda s: [m.payload for m in s.on("status")] == ["online"], "online")
        finally:
            process.send_signal(signal.SIGKILL)
        subscriber.wait_for(lambda s: [m.payload for m in s.on("status")] == ["online", "offline"], "the last will")
    with Subscriber(broker.port) as late:
        late.wait_for(lambda s: s.on("status"), "the retained last will")
        assert late.on("status")[0].payload == "offline"


def test_state_is_retained_latest_wins_and_comes_again_after_a_broker_restart(broker: Mosquitto) -> None:
    with publishing(config(broker.port)) as publisher:
        publisher.set_state({"state": "starting"})
        connected(publisher)
        publisher.set_state({"state": "ready", "why": "客厅"})
        with Subscriber(broker.port) as subscriber:
            subscriber.wait_for(lambda s: s.on("state") and s.on("state")[-1].json["state"] == "ready", "the new state")
        broker.restart()  # without persistence: what is retained now was published anew
        wait_for(lambda: publisher.stats().reconnects == 1, "the second connection")
        wait_for(lambda: publisher._connection and not publisher._connection.unacknowledged, "the acknowledgements")
        with Subscriber(broker.port) as subscriber:
            subscriber.wait_for(lambda s: s.on("state") and s.on("status"), "state and status")
            state = subscriber.on("state")[0]
            assert (state.json, state.retained, state.qos) == ({"state": "ready", "why": "客厅"}, True, 1)
            assert (subscriber.on("status")[0].payload, subscriber.on("status")[0].retained) == ("online", True)


def test_a_state_set_right_before_the_close_is_published(broker: Mosquitto) -> None:
    for attempt in range(20):
        with publishing(config(broker.port)) as publisher:
            connected(publisher)
            publisher.set_state({"attempt": attempt})
            publisher.close(0)
        with Subscriber(broker.port) as subscriber:
            subscriber.wait_for(lambda s: s.on("state"), "the state")
            assert subscriber.on("state")[0].json == {"attempt": attempt}


def test_a_transcript_goes_out_for_acting_and_for_the_record(broker: Mosquitto) -> None:
    with publishing(config(broker.port)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        spoken = transcript("打开客厅灯")
        publisher.offer(spoken)
        subscriber.wait_for(lambda s: s.on("said") and s.on("transcript"), "both messages")
        said, record = subscriber.on("said")[0], subscriber.on("transcript")[0]
        assert (said.topic, said.qos, said.retained) == (f"{BASE}/said", 0, False)
        assert (record.topic, record.qos, record.retained) == (f"{BASE}/transcript", 1, False)
        assert said.json["event_type"] == "said"
        assert "event_type" not in record.json
        for message in (said.json, record.json):
            differs = {key: message[key] for key in ("seq", "age_s", "latency_ms")}
            assert message.items() >= {**spoken.to_json(), **differs}.items()
            assert message["replayed"] is False
            assert 0 <= message["age_s"] < 5
            assert message["latency_ms"].keys() == {"response", "outbox"}
        with Subscriber(broker.port) as late:  # nothing was retained: only the status is there
            late.wait_for(lambda s: s.on("status"), "the retained status")
            publisher.offer(transcript("关闭客厅灯"))
            late.wait_for(lambda s: s.on("said"), "the next command")
            assert texts_on(late, "said") == texts_on(late, "transcript") == ["关闭客厅灯"]


def test_the_finish_hook_runs_once_on_the_publisher_thread_and_may_fail(broker: Mosquitto) -> None:
    calls: list[tuple[str, str]] = []

    def finish(given: Transcript) -> Transcript:
        calls.append((threading.current_thread().name, given.text))
        if given.text == "broken":
            raise RuntimeError("on purpose")
        return dataclasses.replace(given, latency_ms={"response": 7.5})

    with publishing(config(broker.port), finish=finish) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        offer_all(publisher, ["broken", "whole"])
        subscriber.wait_for(lambda s: len(s.on("said")) == len(s.on("transcript")) == 2, "all messages")
        assert calls == [("publisher", "broken"), ("publisher", "whole")]
        for topic in ("said", "transcript"):
            latencies = [message.json["latency_ms"]["response"] for message in subscriber.on(topic)]
            assert latencies == [2.0, 7.5]


def test_commands_spoken_while_the_broker_is_dead_reach_the_record_in_order_and_never_said(broker: Mosquitto) -> None:
    door = Door(broker.port)
    door.open()
    with publishing(config(door.port)) as publisher:
        connected(publisher)
        broker.kill()
        disconnected(publisher)
        door.shut()
        texts = [f"第{number}句" for number in range(50)]
        offer_all(publisher, texts)
        wait_for(lambda: publisher.stats().dropped_live == 50, "the end of the commands")
        broker.start()
        with Subscriber(broker.port) as subscriber:
            door.open()
            connected(publisher)
            publisher.offer(transcript("现在"))
            subscriber.wait_for(lambda s: s.on("said") and len(s.on("transcript")) == 51, "said and the record")
            assert texts_on(subscriber, "transcript") == [*texts, "现在"]
            assert texts_on(subscriber, "said") == ["现在"]
            replayed = [message.json["replayed"] for message in subscriber.on("transcript")]
            assert replayed == [True] * 50 + [False]
            assert all(message.json["age_s"] > 0 for message in subscriber.on("transcript")[:50])
        wait_for(lambda: publisher.stats().sent == 51, "the acknowledgements")
    door.shut()


def test_commands_spoken_at_the_very_moment_the_broker_dies_are_not_said_later(broker: Mosquitto) -> None:
    door = Door(broker.port)
    door.open()
    with publishing(config(door.port)) as publisher:
        connected(publisher)
        for attempt in range(5):
            doomed = [f"{attempt}-{number}" for number in range(30)]
            broker.freeze()  # what is sent from here on stays in the kernel's buffers
            offer_all(publisher, doomed)
            broker.kill()
            disconnected(publisher)
            door.shut()
            broker.start()
            with Subscriber(broker.port) as subscriber:
                door.open()
                subscriber.wait_for(lambda s: len(s.on("transcript")) >= 30, "the record")
                publisher.offer(transcript("现在"))
                subscriber.wait_for(lambda s: s.on("said"), "the first command after the outage")
                assert unique(texts_on(subscriber, "transcript"))[:30] == doomed
                assert texts_on(subscriber, "said") == ["现在"]
    door.shut()


def test_a_broker_that_hangs_delivers_no_old_command_when_it_wakes_up(broker: Mosquitto) -> None:
    with publishing(config(broker.port, live_for_s=0.2)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        broker.freeze()
        spoken = ["一", "二", "三"]
        offer_all(publisher, spoken)
        wait_for(lambda: publisher.stats().dropped_live == 3, "the commands to become too old")
        assert publisher.stats().connected  # nobody can know better yet
        broker.thaw()
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 3, "the record")
        wait_for(lambda: publisher.stats().queued == 0, "the acknowledgements")
        publisher.offer(transcript("现在"))
        subscriber.wait_for(lambda s: s.on("said"), "the first command afterwards")
        assert texts_on(subscriber, "said") == ["现在"]
        assert texts_on(subscriber, "transcript") == [*spoken, "现在"]


def test_a_command_recognised_too_late_reaches_the_record_and_not_said(broker: Mosquitto) -> None:
    with publishing(config(broker.port, live_for_s=5)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        for text, ended_s_ago in (("太晚", 9.0), ("现在", 0.1)):
            ended_at = time.monotonic() - ended_s_ago
            publisher.offer(dataclasses.replace(transcript(text), marks=Marks(ended_at - 0.4, ended_at)))
        subscriber.wait_for(lambda s: s.on("said") and len(s.on("transcript")) == 2, "said and the record")
        assert texts_on(subscriber, "transcript") == ["太晚", "现在"]
        assert texts_on(subscriber, "said") == ["现在"]
        assert (publisher.stats().said, publisher.stats().dropped_live) == (1, 1)


def test_what_utf_8_cannot_express_arrives_escaped(broker: Mosquitto) -> None:
    source = os.fsdecode(b"file:bad\xff.wav")
    escaped = r"file:bad\udcff.wav"  # as text: half a surrogate pair is refused by strict parsers
    with publishing(config(broker.port)) as publisher, Subscriber(broker.port) as subscriber:
        publisher.set_state({"sources": [source, "file:好.wav"]})
        connected(publisher)
        publisher.offer(dataclasses.replace(transcript("打开"), source=source))
        subscriber.wait_for(lambda s: s.on("said") and s.on("transcript") and s.on("state"), "all messages")
        assert {m.json["source"] for m in [*subscriber.on("said"), *subscriber.on("transcript")]} == {escaped}
        assert subscriber.on("state")[0].json == {"sources": [escaped, "file:好.wav"]}
        assert publisher.stats().reconnects == 0


def test_a_transcript_that_cannot_be_written_down_is_dropped_and_lets_the_others_pass(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    with publishing(config(broker.port)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        poison = dataclasses.replace(transcript("坏"), started_at=1e20)  # no calendar goes so far
        for given in (transcript("一"), poison, transcript("二")):
            publisher.offer(given)
        subscriber.wait_for(lambda s: "二" in texts_on(s, "transcript"), "the transcript behind it")
        wait_for(lambda: publisher.stats().queued == 0, "the acknowledgements")
        assert unique(texts_on(subscriber, "transcript")) == ["一", "二"]
        stats = publisher.stats()
        assert (stats.sent, stats.dropped_transcripts, stats.reconnects) == (2, 1, 0)
    assert f"the transcript {poison.id} cannot be written down and is dropped" in caplog.text


def test_a_transcript_whose_publishing_failed_once_is_published_on_the_next_connection(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, failing = Connection.publish, [RuntimeError("on purpose")]

    def fail_once(self: Connection, message: Message) -> int:
        if message.topic.endswith("/transcript") and failing:
            raise failing.pop()
        return publish(self, message)

    monkeypatch.setattr(Connection, "publish", fail_once)
    with publishing(config(broker.port)) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        offer_all(publisher, ["一", "二"])
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 2, "the record")
        assert texts_on(subscriber, "transcript") == ["一", "二"]
        assert publisher.stats().dropped_transcripts == 0


def test_a_transcript_counts_as_queued_also_while_it_is_being_published(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, queued = Connection.publish, []

    def note(self: Connection, message: Message) -> int:
        if message.topic.endswith("/transcript"):
            queued.append(publisher.stats().queued)
        return publish(self, message)

    monkeypatch.setattr(Connection, "publish", note)
    with publishing(config(broker.port)) as publisher:
        connected(publisher)
        publisher.offer(transcript("打开"))
        wait_for(lambda: publisher.stats().sent == 1, "the acknowledgement")
        assert queued == [1]
        assert publisher.stats().queued == 0


def test_transcripts_are_neither_lost_nor_disordered_by_a_connection_that_breaks(broker: Mosquitto) -> None:
    door = Door(broker.port)
    door.open()
    texts = [str(number) for number in range(300)]
    with publishing(config(door.port)) as publisher, Subscriber(broker.port) as subscriber:
        for number, text in enumerate(texts):
            publisher.offer(transcript(text))
            if number % 60 == 59:
                connected(publisher)
                door.shut()
                disconnected(publisher)
                door.open()
        subscriber.wait_for(lambda s: len(set(texts_on(s, "transcript"))) == 300, "all transcripts")
        assert unique(texts_on(subscriber, "transcript")) == texts
        assert len(texts_on(subscriber, "said")) == len(set(texts_on(subscriber, "said")))
        wait_for(lambda: publisher.stats().queued == 0, "the acknowledgements")
        assert publisher.stats().sent == 300
    door.shut()


def test_a_refused_connection_is_said_in_words_and_is_not_a_connection(
    tmp_path: Path, mosquitto_installed: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    broker = Mosquitto(tmp_path, username="hall", password="right-secret")
    broker.start()
    try:
        with publishing(config(broker.port, username="hall", password="wrong-secret")) as publisher:
            publisher.offer(transcript("秘密的话"))
            wait_for(lambda: len(attempts(caplog)) >= 3, "three attempts")
            assert not publisher.stats().connected
            assert publisher.stats().queued == 1
            assert [record.levelname for record in attempts(caplog)[:3]] == ["WARNING", "DEBUG", "DEBUG"]
            assert "refused: not authorized" in attempts(caplog)[0].getMessage()
        with publishing(config(broker.port, username="hall", password="right-secret")) as publisher:
            connected(publisher)
    finally:
        broker.stop()
    assert "secret" not in caplog.text
    assert "秘密的话" not in caplog.text


def attempts(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.getMessage().startswith("no connection to the broker")]


@pytest.mark.parametrize(
    ("host", "words"), [("127.0.0.1", "connection refused"), ("no.such.invalid", "cannot be resolved")]
)
def test_an_absent_broker_is_named_once_and_the_close_does_not_wait_for_it(
    host: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    publisher = make(config(free_port(), host=host))
    publisher.start()
    publisher.offer(transcript("打开"))
    wait_for(lambda: len(attempts(caplog)) >= 2, "two attempts")
    assert words in attempts(caplog)[0].getMessage()
    assert [record.levelno for record in attempts(caplog)[:2]] == [logging.WARNING, logging.DEBUG]
    closing = threading.Thread(
        target=publisher.close, args=(3600.0,), daemon=True
    )  # an hour to drain, which it must not use
    closing.start()
    wait_for(lambda: not closing.is_alive(), "the close")
    assert publisher.stats().dropped_transcripts == 1


def test_an_idle_publisher_closes_without_using_its_time_to_drain(broker: Mosquitto) -> None:
    with publishing(config(broker.port)) as publisher:
        connected(publisher)
        closing = threading.Thread(target=publisher.close, args=(3600.0,), daemon=True)
        closing.start()
        wait_for(lambda: not closing.is_alive(), "the close")
        publisher.offer(transcript("太晚"))
        assert publisher.stats().dropped_transcripts == 1


def test_a_publisher_that_was_never_started_can_be_closed() -> None:
    make(config(free_port())).close(3600.0)


def test_the_close_drains_what_is_queued(broker: Mosquitto) -> None:
    texts = [str(number) for number in range(200)]
    with Subscriber(broker.port) as subscriber:
        with publishing(config(broker.port)) as publisher:
            offer_all(publisher, texts)  # it may not even be connected yet
            publisher.close(30.0)
            assert (publisher.stats().sent, publisher.stats().dropped_transcripts) == (200, 0)
        subscriber.wait_for(lambda s: [m.payload for m in s.on("status")][-1:] == ["offline"], "offline")
        assert texts_on(subscriber, "transcript") == texts


def counted(name: str) -> float:
    """Return what a counter stands at."""
    value = REGISTRY.get_sample_value(f"edge_asr_{name}_total")
    assert value is not None
    return value


def test_a_full_queue_drops_the_oldest_counts_it_and_says_so_once(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    before = counted("dropped_transcripts"), counted("dropped_said")
    door = Door(broker.port)
    outbox = MemoryOutbox(limit=10)
    with publishing(config(door.port), outbox=outbox) as publisher, Subscriber(broker.port) as subscriber:
        offer_all(publisher, [str(number) for number in range(25)])
        wait_for(lambda: publisher.stats().dropped_live == 25, "the end of the commands")
        assert (publisher.stats().queued, publisher.stats().dropped_transcripts) == (10, 15)
        assert (counted("dropped_transcripts") - before[0], counted("dropped_said") - before[1]) == (15, 25)
        assert caplog.text.count("10 transcripts wait for the broker: from now on the oldest are dropped") == 1
        door.open()
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 10, "the newest ten")
        assert texts_on(subscriber, "transcript") == [str(number) for number in range(15, 25)]
    door.shut()
