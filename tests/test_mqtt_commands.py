"""Commands through a real Mosquitto, and through a broker that misbehaves."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
from mosquitto import Mosquitto, Subscriber, send, send_lines, wait_for
from publishers import BASE, config, connected, disconnected, publishing, texts_on, transcript

from edge_asr.publish import commands, notices
from edge_asr.publish.commands import CommandError


class Appliance:
    """Obeys at once, or when it is let; what it was asked is noted with the thread that asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.threads: set[str] = set()
        self.pending: list[Future[Mapping[str, Any]]] = []
        self.at_once = True
        self.failure: Exception | None = None

    def __call__(self, name: str, arguments: Mapping[str, Any]) -> Future[Mapping[str, Any]]:
        self.asked.append((name, arguments))
        self.threads.add(threading.current_thread().name)
        if self.failure is not None:
            raise self.failure
        future: Future[Mapping[str, Any]] = Future()
        if self.at_once:
            future.set_result(arguments)
        else:
            self.pending.append(future)
        return future


def answers(subscriber: Subscriber, name: str) -> list[dict[str, Any]]:
    return [message.json for message in subscriber.on(f"cmd/{name}/result")]


def subscriptions(broker: Mosquitto) -> list[str]:
    """Return what the broker has logged as the publisher's subscriptions, QoS and topics, over restarts too."""
    lines = broker.log().splitlines()
    return [line.partition("edge_asr-hall-test ")[2] for line in lines if "edge_asr-hall" in line and "/cmd/+" in line]


def ready(broker: Mosquitto, times: int = 1) -> None:
    """Return when the publisher has subscribed so often."""
    wait_for(lambda: len(subscriptions(broker)) >= times, "the subscription")


def test_a_command_is_obeyed_on_the_publisher_thread_and_answered_when_it_is_done(broker: Mosquitto) -> None:
    appliance = Appliance()
    appliance.at_once = False
    with publishing(config(broker.port), command=appliance) as publisher, Subscriber(broker.port) as subscriber:
        ready(broker)
        send(broker.port, f"{BASE}/cmd/preset", "relaxed")
        wait_for(lambda: appliance.pending, "the command")
        assert (appliance.asked, appliance.threads) == ([("preset", {"preset": "relaxed"})], {"publisher"})
        publisher.offer(transcript("现在"))  # a command that takes its time holds nothing up
        subscriber.wait_for(lambda s: s.on("said"), "the transcript")
        assert answers(subscriber, "preset") == []
        appliance.pending[0].set_result({"preset": "relaxed"})
        subscriber.wait_for(lambda s: answers(s, "preset"), "the answer")
        answer = subscriber.on("cmd/preset/result")[0]
        assert (answer.topic, answer.qos, answer.retained) == (f"{BASE}/cmd/preset/result", 1, False)
        assert answer.json == {"ok": True, "preset": "relaxed"}
        with Subscriber(broker.port, f"{BASE}/cmd/+/result") as late:
            send(broker.port, f"{BASE}/cmd/nonsense", "")
            late.wait_for(lambda s: s.messages, "the next answer")
            assert [message.topic for message in late.messages] == [f"{BASE}/cmd/nonsense/result"]


def test_what_cannot_be_obeyed_is_answered_with_the_reason(broker: Mosquitto) -> None:
    appliance = Appliance()
    topics = f"{BASE}/cmd/+/result"
    with publishing(config(broker.port), command=appliance), Subscriber(broker.port, topics) as subscriber:
        ready(broker)
        send(broker.port, f"{BASE}/cmd/hello", "")
        subscriber.wait_for(lambda s: answers(s, "hello"), "the answer")
        assert "there are mute, preset, listen" in answers(subscriber, "hello")[0]["why"]
        for number, (payload, why) in enumerate(
            [
                (b"perhaps", "mute takes on or off"),
                (b"\xff\xfe", "the payload is not UTF-8"),
                (b" " * 50_000, "the payload has 50000 bytes; 1024 are the limit"),
            ]
        ):
            send(broker.port, f"{BASE}/cmd/mute", payload)
            subscriber.wait_for(lambda s, so_far=number: len(answers(s, "mute")) > so_far, why)  # type: ignore[misc]
            assert answers(subscriber, "mute")[-1] == {"ok": False, "why": why}
        appliance.failure = CommandError("there is no microphone")
        send(broker.port, f"{BASE}/cmd/mute", "on")
        subscriber.wait_for(lambda s: len(answers(s, "mute")) == 4, "the refusal")
        assert answers(subscriber, "mute")[-1] == {"ok": False, "why": "there is no microphone"}
        assert appliance.asked == [("mute", {"mute": True})]


def test_a_command_that_crashes_is_answered_and_disturbs_no_transcript(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    appliance = Appliance()
    appliance.failure = RuntimeError("on purpose")
    with publishing(config(broker.port), command=appliance) as publisher, Subscriber(broker.port) as subscriber:
        ready(broker)
        send(broker.port, f"{BASE}/cmd/mute", "on")
        subscriber.wait_for(lambda s: answers(s, "mute"), "the answer")
        assert answers(subscriber, "mute")[0]["ok"] is False
        publisher.offer(transcript("现在"))
        subscriber.wait_for(lambda s: s.on("said"), "the transcript")
        assert (publisher.stats().reconnects, caplog.text.count("the command mute failed")) == (0, 1)


def test_retained_mute_and_preset_are_obeyed_on_every_connect_and_a_retained_listen_never(broker: Mosquitto) -> None:
    for name, payload in (("mute", "on"), ("preset", "relaxed"), ("listen", '{"seconds": 8}')):
        send(broker.port, f"{BASE}/cmd/{name}", payload, retained=True)
    appliance = Appliance()
    for _ in range(2):
        with Subscriber(broker.port) as subscriber, publishing(config(broker.port), command=appliance):
            subscriber.wait_for(lambda s: answers(s, "mute") and answers(s, "preset"), "the answers")
            send(broker.port, f"{BASE}/cmd/hello", "")  # the retained listen comes before this
            subscriber.wait_for(lambda s: answers(s, "hello"), "the answer")
        assert sorted(appliance.asked) == [("mute", {"mute": True}), ("preset", {"preset": "relaxed"})]
        appliance.asked.clear()
    with Subscriber(broker.port) as subscriber, publishing(config(broker.port), command=appliance):
        wait_for(lambda: len(appliance.asked) == 2, "the retained commands")
        for name in ("mute", "preset"):
            send(broker.port, f"{BASE}/cmd/{name}", b"", retained=True)
        send(broker.port, f"{BASE}/cmd/mute", "off")
        wait_for(lambda: len(appliance.asked) == 3, "the command after the deletions")
        assert appliance.asked[-1] == ("mute", {"mute": False})
        assert all(answer["ok"] for name in ("mute", "preset") for answer in answers(subscriber, name))


def test_a_command_that_is_retained_while_we_are_there_does_nothing_but_mute_and_preset(broker: Mosquitto) -> None:
    appliance = Appliance()
    with Subscriber(broker.port) as subscriber, publishing(config(broker.port, protocol=5), command=appliance):
        ready(broker)
        for name, payload in (("reload", ""), ("listen", '{"seconds": 8}'), ("preset", "relaxed"), ("mute", "on")):
            send(broker.port, f"{BASE}/cmd/{name}", payload, retained=True)
        subscriber.wait_for(lambda s: answers(s, "mute"), "the answer")
        assert appliance.asked == [("preset", {"preset": "relaxed"}), ("mute", {"mute": True})]


def test_a_repeated_listen_is_obeyed_once_and_a_repeated_mute_each_time(broker: Mosquitto) -> None:
    appliance = Appliance()
    with publishing(config(broker.port), command=appliance), Subscriber(broker.port) as subscriber:
        ready(broker)
        send_lines(broker.port, f"{BASE}/cmd/listen", ['{"seconds": 8}'] * 3 + ['{"seconds": 9}'])
        send_lines(broker.port, f"{BASE}/cmd/mute", ["on"] * 3)
        subscriber.wait_for(lambda s: len(answers(s, "mute")) == 3, "the answers")
        assert answers(subscriber, "listen") == [{"ok": True, "seconds": 8.0}, {"ok": True, "seconds": 9.0}]


def test_a_flood_of_commands_is_refused_and_transcripts_pass_through_it(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:  # which stands still, however slow the machine is
        @staticmethod
        def monotonic() -> float:
            return 100.0

    appliance = Appliance()
    with publishing(config(broker.port), command=appliance) as publisher, Subscriber(broker.port) as subscriber:
        connected(publisher)
        ready(broker)
        monkeypatch.setattr(commands, "time", Clock)
        lines = ["off"] * 1000
        flood = threading.Thread(target=send_lines, args=(broker.port, f"{BASE}/cmd/mute", lines))
        flood.start()
        for number in range(20):
            publisher.offer(transcript(str(number)))
        subscriber.wait_for(lambda s: len(s.on("said")) == 20, "the transcripts")
        flood.join()
        subscriber.wait_for(lambda s: any(not answer["ok"] for answer in answers(s, "mute")), "a refusal")
        wait_for(lambda: publisher._connection and not publisher._connection.unacknowledged, "the acknowledgements")
        assert len(appliance.asked) == 20
        assert texts_on(subscriber, "transcript") == texts_on(subscriber, "said") == [str(n) for n in range(20)]
        refused = [answer["why"] for answer in answers(subscriber, "mute") if not answer["ok"]]
        assert set(refused) == {"more than 20 commands in a second; send fewer"}
        assert publisher.stats().reconnects == 0


def test_commands_are_subscribed_to_again_after_the_broker_was_restarted(broker: Mosquitto) -> None:
    appliance = Appliance()
    with publishing(config(broker.port), command=appliance) as publisher:
        connected(publisher)
        broker.kill()
        disconnected(publisher)
        broker.start()
        with Subscriber(broker.port) as subscriber:
            ready(broker, 2)
            send(broker.port, f"{BASE}/cmd/mute", "off")
            subscriber.wait_for(lambda s: answers(s, "mute") == [{"ok": True, "mute": False}], "the answer")


def test_answers_that_a_lost_connection_had_in_flight_do_not_hold_up_those_to_come(broker: Mosquitto) -> None:
    appliance = Appliance()
    appliance.at_once = False
    limit = notices.ERRANDS_LIMIT
    with publishing(config(broker.port), command=appliance) as publisher:
        ready(broker)
        send_lines(broker.port, f"{BASE}/cmd/mute", ["on"] * limit)
        wait_for(lambda: len(appliance.pending) == limit, "the commands")
        broker.freeze()
        for future in appliance.pending:
            future.set_result({})
        wait_for(lambda: len(publisher._notices._errands_in_flight) == limit, "the answers to be on their way")
        broker.kill()
        disconnected(publisher)
        broker.start()
        with Subscriber(broker.port) as subscriber:
            ready(broker, 2)
            send(broker.port, f"{BASE}/cmd/hello", "")
            subscriber.wait_for(lambda s: answers(s, "hello"), "the answer")


@pytest.mark.parametrize("wanted", [False, True])
def test_without_somebody_to_obey_or_where_they_are_off_nothing_is_subscribed_to(
    wanted: bool, broker: Mosquitto
) -> None:
    appliance = Appliance()
    settings = config(broker.port, commands=wanted)
    with publishing(settings, command=None if wanted else appliance) as publisher:
        connected(publisher)
        wait_for(lambda: publisher._connection and not publisher._connection.unacknowledged, "the acknowledgement")
        assert subscriptions(broker) == []
    with publishing(config(broker.port), command=appliance):
        ready(broker)
        assert subscriptions(broker) == [f"1 {BASE}/cmd/+"]


def test_commands_that_come_while_it_closes_are_not_obeyed_but_answers_still_go_out(broker: Mosquitto) -> None:
    appliance = Appliance()
    appliance.at_once = False
    with Subscriber(broker.port) as subscriber:
        with publishing(config(broker.port), command=appliance) as publisher:
            ready(broker)
            send(broker.port, f"{BASE}/cmd/mute", "on")
            wait_for(lambda: appliance.pending, "the command")
            assert publisher._notices._commands is not None
            publisher._notices._commands._wake = lambda: None  # so that the close finds the answer waiting
            appliance.pending[0].set_result({"mute": True})
            publisher.close(1.0)
            publisher._receive(f"{BASE}/cmd/mute", b"off", False)
        subscriber.wait_for(lambda s: answers(s, "mute"), "the answer")
        assert appliance.asked == [("mute", {"mute": True})]


class OddBroker:
    """Accepts one client, refuses its subscription, and sends it what the test wants, checked by nobody."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.received: list[int] = []
        """Kinds of the packets that came in."""
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="odd broker", daemon=True)
        self._thread.start()

    def send(self, packet: bytes) -> None:
        assert self._client is not None
        self._client.sendall(packet)

    def close(self) -> None:
        for sock in (self._client, self._server):
            if sock is not None:
                with contextlib.suppress(OSError):  # it may be gone
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        self._thread.join(30)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            self._client, _ = self._server.accept()
            while packet := self._read(self._client):
                kind, body = packet
                self.received.append(kind)
                if kind == 1:  # CONNECT
                    self.send(b"\x20\x02\x00\x00")
                elif kind == 8:  # SUBSCRIBE
                    self.send(b"\x90\x03" + body[:2] + b"\x80")
                elif kind == 12:  # PINGREQ
                    self.send(b"\xd0\x00")

    @staticmethod
    def _read(sock: socket.socket) -> tuple[int, bytes] | None:
        head = sock.recv(1)
        if not head:
            return None
        length, shift = 0, 0
        while True:
            byte = sock.recv(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        body = b""
        while len(body) < length:
            body += sock.recv(length - len(body))
        return head[0] >> 4, body


@pytest.fixture
def odd_broker() -> Iterator[OddBroker]:
    broker = OddBroker()
    yield broker
    broker.close()


def test_a_refused_subscription_is_said_and_transcripts_go_out_all_the_same(
    odd_broker: OddBroker, caplog: pytest.LogCaptureFixture
) -> None:
    with publishing(config(odd_broker.port, protocol="3.1.1"), command=Appliance()) as publisher:
        wait_for(lambda: "refuses to pass commands on" in caplog.text, "the warning")
        publisher.offer(transcript("现在"))
        wait_for(lambda: odd_broker.received.count(3) == 2, "online and the record")
        assert publisher.stats().connected
    assert [record.levelno for record in caplog.records][:1] == [logging.WARNING]


def test_a_topic_that_is_no_text_is_ignored(odd_broker: OddBroker) -> None:
    appliance = Appliance()
    with publishing(config(odd_broker.port, protocol="3.1.1"), command=appliance) as publisher:
        connected(publisher)
        for topic in (b"\xff\xfe", f"{BASE}/cmd/mute".encode()):
            body = len(topic).to_bytes(2, "big") + topic + b"on"
            odd_broker.send(bytes([0x30, len(body)]) + body)
        wait_for(lambda: appliance.asked, "the command behind it")
        assert publisher.stats().reconnects == 0
