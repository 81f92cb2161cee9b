"""Connections to brokers that misbehave, refuse, or are old."""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
from certificates import Certificates
from connections import VERSIONS, Served
from mosquitto import PATIENCE_S
from odd_brokers import ACCEPTED, CONNECT, PUBLISH, SUBSCRIBE, OddBroker, Visitor, odd_broker, packet, text

from edge_asr.config_mqtt import MqttConfig
from edge_asr.publish import connection as connection_module
from edge_asr.publish.client import Versions
from edge_asr.publish.connection import Connection
from edge_asr.publish.visit import visiting

TOPIC = "edge_asr/hall/transcript"


def config(broker: OddBroker, **keys: Any) -> MqttConfig:
    return MqttConfig.model_validate({"port": broker.port, **keys})


def connack(code: int, properties: bytes = b"") -> bytes:
    return packet(0x20, bytes([0, code, len(properties)]) + properties)


def accept_and(then: Callable[[Visitor], None], properties: bytes = b"") -> Callable[[Visitor], None]:
    """Return a broker of MQTT 5 that accepts, does something, and stays."""

    def talk(visitor: Visitor) -> None:
        visitor.read()
        visitor.send(connack(0, properties))
        then(visitor)
        visitor.stay()

    return talk


def answering(answer: bytes) -> Callable[[Visitor], None]:
    """Return a broker that answers CONNECT with this, and hangs up."""

    def talk(visitor: Visitor) -> None:
        visitor.read()
        visitor.send(answer)

    return talk


def refused(answer: bytes, version: str) -> Served:
    """Return a connection to which CONNECT was answered with this."""
    with odd_broker(answering(answer)) as broker, Served(config(broker), protocol=version) as served:
        served.fail()
        return served


def test_the_session_ends_with_the_connection_and_nobody_floods_us() -> None:
    with odd_broker(accept_and(lambda visitor: None)) as broker, Served(config(broker)) as served:
        served.connect()
        body = broker.visitors[0].packets[0][1]
        assert body.startswith(text("MQTT") + b"\x05")
        flags, properties = body[7], body[11 : 11 + body[10]]
        assert flags & 0x02, "clean start"
        expected = b"\x11" + struct.pack("!L", 0), b"\x21" + struct.pack("!H", 20), b"\x27" + struct.pack("!L", 65_536)
        assert properties == b"".join(expected), "session expiry, receive maximum, maximum packet size"


def test_the_session_of_3_1_1_is_clean() -> None:
    def talk(visitor: Visitor) -> None:
        visitor.read()
        visitor.send(ACCEPTED["3.1.1"])
        visitor.stay()

    with odd_broker(talk) as broker, Served(config(broker), protocol="3.1.1") as served:
        served.connect()
        body = broker.visitors[0].packets[0][1]
        assert body.startswith(text("MQTT") + b"\x04")
        assert body[7] & 0x02


def test_no_more_messages_are_in_flight_than_the_broker_takes_and_their_order_is_kept() -> None:
    in_flight: list[int] = []

    def take(visitor: Visitor) -> None:
        waiting: list[bytes] = []
        for number in range(10):
            body = visitor.read_kind(PUBLISH)
            start = 2 + int.from_bytes(body[:2], "big")
            waiting.append(body[start : start + 2])
            in_flight.append(len(waiting))
            if len(waiting) == 3 or number == 9:
                visitor.send(b"".join(packet(0x40, message_id) for message_id in waiting))
                waiting.clear()

    with odd_broker(accept_and(take, b"\x21\x00\x03")) as broker, Served(config(broker)) as served:
        served.connect()
        assert served.connection.in_flight_limit == 3
        ids = [served.publish(TOPIC, str(number)) for number in range(10)]
        assert list(served.connection.unacknowledged) == ids
        assert not served.connection.clear
        served.until(lambda s: s.acknowledged == ids, "the acknowledgements")
        bodies = [body for kind, body in broker.visitors[0].packets if kind == PUBLISH]
        assert [body[-1:] for body in bodies] == [str(number).encode() for number in range(10)]
    assert in_flight == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]


def test_many_messages_in_one_record_of_tls_all_come_in(certificates: Certificates) -> None:
    def flood(visitor: Visitor) -> None:
        visitor.send(b"".join(packet(0x30, text("a") + b"\x00" + str(number).encode()) for number in range(500)))

    with odd_broker(accept_and(flood), certificate=certificates.server) as broker:
        keys = {"tls": {"ca_file": certificates.authority.file}}
        with Served(config(broker, **keys)) as served:
            served.until(lambda s: len(s.messages) == 500, "all of them")
            assert [payload for _, payload, _ in served.messages] == [str(number).encode() for number in range(500)]


@pytest.mark.parametrize(
    ("code", "properties", "lasting", "words"),
    [
        (0x8E, b"", True, "another client uses the client id edge_asr-test; give each device its own mqtt.client_id"),
        (0x8B, b"", False, "it ended the connection: server shutting down; it passes by itself"),
        (0x8D, b"", False, "it ended the connection: keep alive timeout; raise mqtt.keepalive_s"),
        (0x95, b"", False, "it ended the connection: packet too large; raise the limit for packets"),
        (0x97, b"", True, "it ended the connection: quota exceeded; raise the quota"),
        (
            0x98,
            b"\x1f" + text("maintenance"),
            True,
            "it ended the connection: administrative action (maintenance); ask",
        ),
        (0x9C, b"\x1c" + text("b.lan"), True, "it ended the connection: use another server; set mqtt.host to b.lan"),
        (0x9D, b"", True, "it ended the connection: server moved; ask whoever runs the broker which"),
        (0x87, b"", True, "it ended the connection: not authorized; correct mqtt.username"),
        (0x82, b"", False, "it ended the connection: protocol error; see the broker's log"),
    ],
)
def test_a_broker_that_ends_the_connection_says_why(code: int, properties: bytes, lasting: bool, words: str) -> None:
    def end(visitor: Visitor) -> None:
        visitor.send(packet(0xE0, bytes([code, len(properties)]) + properties))

    with odd_broker(accept_and(end)) as broker, Served(config(broker)) as served:
        assert served.fail().startswith(words)
        assert (served.connection.lasting, served.connection.refused) == (lasting, lasting)


@pytest.mark.parametrize(
    ("code", "properties", "lasting", "words"),
    [
        (0x86, b"", True, "it refused: bad user name or password; correct mqtt.username and the password"),
        (0x87, b"\x1f" + text("no\n such device"), True, "it refused: not authorized (no such device); correct"),
        (0x85, b"", True, "it refused: client identifier not valid; set mqtt.client_id"),
        (0x88, b"", False, "it refused: server unavailable; it passes by itself"),
        (0x89, b"", False, "it refused: server busy; it passes by itself"),
        (0x8A, b"", True, "it refused: banned; ask whoever runs the broker"),
        (0x90, b"", True, "it refused: topic name invalid; correct mqtt.base"),
        (0x9D, b"\x1c" + text("b.lan:1884"), True, "it refused: server moved; set mqtt.host to b.lan:1884"),
        (0x9F, b"", True, "it refused: connection rate exceeded; it passes by itself"),
        (0x80, b"", False, "it refused: unspecified error; see the broker's log"),
        (0x00, b"\x24\x00", True, "it refused: qos not supported; let the broker take QoS 1"),
        (0x00, b"\x25\x00", True, "it refused: retain not supported; let the broker retain messages"),
    ],
)
def test_a_broker_of_mqtt_5_that_refuses_says_why(code: int, properties: bytes, lasting: bool, words: str) -> None:
    served = refused(connack(code, properties), "5")
    assert str(served.connection.failure).startswith(words)
    assert (served.connection.refused, served.connection.lasting) == (True, lasting)
    assert not served.connection.unsupported
    assert not served.connection.hung_up


@pytest.mark.parametrize(
    ("code", "lasting", "words"),
    [
        (2, True, "it refused: client identifier not valid; set mqtt.client_id"),
        (3, False, "it refused: server unavailable; it passes by itself"),
        (4, True, "it refused: bad user name or password; correct mqtt.username"),
        (5, True, "it refused: not authorized; correct mqtt.username"),
        (6, False, "it refused: unspecified error; see the broker's log"),
    ],
)
def test_a_broker_of_3_1_1_that_refuses_says_why(code: int, lasting: bool, words: str) -> None:
    served = refused(bytes([0x20, 2, 0, code]), "3.1.1")
    assert str(served.connection.failure).startswith(words)
    assert (served.connection.refused, served.connection.lasting) == (True, lasting)


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        (b"\x20\x02\x00\x01", "5"),
        (b"\x20\x02\x00\x01", "3.1.1"),
        (b"\x20\x02\x00\x05", "5"),
        (connack(0x84), "5"),
        (connack(0x84), "3.1.1"),
    ],
)
def test_a_broker_that_does_not_know_the_version_is_recognised(answer: bytes, version: str) -> None:
    served = refused(answer, version)
    assert served.connection.unsupported
    assert "; set mqtt.protocol to auto, or to the version that it speaks" in str(served.connection.failure)


def test_an_answer_that_comes_between_the_look_and_the_reading_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    look = Connection._peek

    def slow_look(connection: Connection) -> bool:
        found = look(connection)
        if not looked.is_set() and (sock := connection._socket()) is not None:
            looked.set()
            assert select.select([sock], [], [], PATIENCE_S)[0], "the answer"
        return found

    def answer_late(visitor: Visitor) -> None:
        visitor.read()
        assert looked.wait(PATIENCE_S)
        visitor.send(b"\x20\x02\x00\x01")

    monkeypatch.setattr(Connection, "_peek", slow_look)
    with odd_broker(answer_late) as broker, Served(config(broker), protocol="3.1.1") as served:
        served.fail()
        assert served.connection.unsupported


def old(visitor: Visitor) -> None:
    """Know MQTT 3.1.1 only, and hang up on anything else."""
    _, body = visitor.read()
    if body.startswith(text("MQTT") + b"\x04"):
        visitor.send(ACCEPTED["3.1.1"])
        visitor.stay()


def old_and_polite(visitor: Visitor) -> None:
    """Know MQTT 3.1.1 only, and say so."""
    visitor.send(ACCEPTED["3.1.1"] if visitor.read()[1][6] == 4 else b"\x20\x02\x00\x01")
    visitor.stay()


@pytest.mark.parametrize(("talk", "attempts"), [(old, [5, 5, 4]), (old_and_polite, [5, 4])])
def test_an_old_broker_is_spoken_to_in_its_version(talk: Callable[[Visitor], None], attempts: list[int]) -> None:
    with odd_broker(talk) as broker, visiting(config(broker), "edge_asr-test", 30.0) as connection:
        assert connection.failure is None
        assert connection.protocol == "3.1.1"
        first = [visitor.packets[0] for visitor in broker.visitors if visitor.packets]
        spoken = [body[6] for kind, body in first if body.startswith(text("MQTT"))]
        assert spoken == attempts


def test_a_configured_version_is_not_changed() -> None:
    with odd_broker(old_and_polite) as broker, visiting(config(broker, protocol="5"), "x", 30.0) as connection:
        assert str(connection.failure).startswith("it refused: unsupported protocol version; set mqtt.protocol")
        assert connection.lasting


def test_versions_are_changed_when_that_may_help_and_not_in_a_hurry_for_ever() -> None:
    versions = Versions("auto")
    assert not versions.failed(unsupported=False, hung_up=True)
    assert not versions.failed(unsupported=False, hung_up=False), "the broker was away, for one"
    assert not versions.failed(unsupported=False, hung_up=True)
    tried = [versions.current]
    assert versions.failed(unsupported=False, hung_up=True)
    tried.append(versions.current)
    assert not versions.failed(unsupported=True, hung_up=False)
    tried.append(versions.current)
    assert tried == ["5", "3.1.1", "5"]
    versions.worked()
    assert versions.failed(unsupported=True, hung_up=False)
    assert [Versions(name).current for name in VERSIONS] == list(VERSIONS)
    for name in VERSIONS:
        assert not Versions(name).failed(unsupported=True, hung_up=False)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a web server answers there; set mqtt.transport to websockets"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "it speaks TLS on this port; set mqtt.tls"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "it answers, but not with MQTT; correct mqtt.port"),
        (b"\xff" * 100, "it answers, but not with MQTT; correct mqtt.port"),
        (b"\x00" * 100, "it answers, but not with MQTT; correct mqtt.port"),
    ],
)
def test_garbage_is_no_broker(version: str, answer: bytes, words: str) -> None:
    served = refused(answer, version)
    assert str(served.connection.failure).startswith(words)
    assert served.connection.lasting
    assert not served.connection.unsupported
    assert not served.connection.hung_up


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("answer", [b"", b"\x20", b"\x20\x02", b"\x20\x03\x00"])
def test_a_broker_that_never_answers_whole_is_given_up(
    version: str, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "CONNECT_TIMEOUT_S", 0.2)

    def talk(visitor: Visitor) -> None:
        visitor.read()
        visitor.send(answer)
        visitor.stay()

    with odd_broker(talk) as broker, Served(config(broker), protocol=version) as served:
        assert served.fail().startswith("it accepts connections but does not answer; see whether mqtt.port")
        assert not served.connection.lasting


@pytest.mark.parametrize("version", VERSIONS)
def test_a_broker_that_hangs_up_on_everything(version: str) -> None:
    served = refused(b"", version)
    assert str(served.connection.failure).startswith("it hangs up without an answer; see whether mqtt.port")
    assert served.connection.hung_up
    assert not served.connection.lasting


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x40\x01\x00",  # PUBACK, too short
        b"\x40\x03\x00\x01\x77",  # PUBACK with an unknown code
        b"\x30\x03\x00\x09a",  # PUBLISH whose topic ends behind the packet
        b"\x32\x05\x00\x01a\x00\x01\x05",  # PUBLISH whose properties end behind it
        b"\xf0\x80\x80\x80\x80\x01",  # a length of five bytes
        b"\x10\x00",  # CONNECT
    ],
)
def test_what_mqtt_does_not_allow_ends_the_connection(nonsense: bytes) -> None:
    with odd_broker(accept_and(lambda visitor: visitor.send(nonsense))) as broker, Served(config(broker)) as served:
        served.until(lambda s: s.connection.failure, "the failure")
        assert served.fail().startswith("it sent what MQTT does not allow")
        assert not served.connection.lasting


def test_a_packet_that_comes_in_pieces_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(visitor: Visitor) -> None:
        for byte in packet(0x30, text("a/b") + b"\x00" + b"x" * 300):
            visitor.send(bytes([byte]))

    with odd_broker(accept_and(drip)) as broker, Served(config(broker)) as served:
        served.until(lambda s: s.messages == [("a/b", b"x" * 300, False)], "the message")


@pytest.mark.parametrize(("version", "word"), [("5", "not authorized"), ("3.1.1", "unspecified error")])
def test_a_refused_subscription_is_said_with_its_topic(
    version: str, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    def talk(visitor: Visitor) -> None:
        visitor.read_kind(CONNECT)
        visitor.send(ACCEPTED[version])
        number = visitor.read_kind(SUBSCRIBE)[:2]
        visitor.send(packet(0x90, number + (b"\x00\x87\x01" if version == "5" else b"\x80\x01")))
        visitor.stay()

    with odd_broker(talk) as broker, Served(config(broker), protocol=version) as served:
        served.connect()
        served.connection.subscribe(["edge_asr/hall/cmd/+", "homeassistant/status"])
        served.until(lambda s: caplog.records, "the warning")
        assert caplog.records[0].levelno == logging.WARNING
        assert f"(edge_asr/hall/cmd/+: {word}); let this user subscribe there" in caplog.text
        assert "homeassistant" not in caplog.text
        assert served.connection.up


def test_a_connection_that_stops_answering_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with odd_broker(accept_and(lambda visitor: None)) as broker:
        quick = config(broker).model_copy(update={"keepalive_s": 1})
        with Served(quick) as served:
            served.connect()
            assert served.fail().startswith("it has stopped answering; see to the broker and the network")


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = threading.Event()
    monkeypatch.setattr(connection_module, "OPEN_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *place, **kind: enough.wait(30) and [])
    with Served(MqttConfig(host="broker.lan")) as served:
        assert served.fail().startswith("no answer in time; see to mqtt.host")
        enough.set()
