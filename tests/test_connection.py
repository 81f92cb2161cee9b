"""Connections to a real Mosquitto: both versions of MQTT, each way in."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from certificates import Certificates
from connections import VERSIONS, WAYS, WILL, Served, way_in
from mosquitto import PATIENCE_S, Mosquitto, Subscriber, send, send_lines, wait_for

TOPIC = "edge_asr/hall/transcript"


@pytest.fixture(scope="module")
def everywhere(
    tmp_path_factory: pytest.TempPathFactory, mosquitto_installed: None, certificates: Certificates
) -> Iterator[Mosquitto]:
    """Yield a Mosquitto that can be reached on all ways."""
    server = Mosquitto(tmp_path_factory.mktemp("everywhere"), tls=certificates.server, websockets=True)
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=[(version, way) for version in VERSIONS for way in WAYS], ids="-".join)
def served(request: pytest.FixtureRequest, everywhere: Mosquitto, certificates: Certificates) -> Iterator[Served]:
    """Yield a connection that the broker has accepted, of each version on each way."""
    version, way = request.param
    with Served(way_in(everywhere, way, certificates), protocol=version) as connection:
        connection.connect()
        yield connection


def test_messages_go_out_and_are_acknowledged(served: Served, everywhere: Mosquitto) -> None:
    with Subscriber(everywhere.port, "edge_asr/#") as subscriber:
        served.deliver(TOPIC, "打开客厅灯")
        served.publish("edge_asr/hall/said", "打开客厅灯", qos=0)
        subscriber.wait_for(lambda s: s.on("transcript") and s.on("said"), "both messages")
        assert (subscriber.on("transcript")[0].payload, subscriber.on("transcript")[0].qos) == ("打开客厅灯", 1)
        assert (subscriber.on("said")[0].payload, subscriber.on("said")[0].qos) == ("打开客厅灯", 0)
    assert served.connection.clear
    assert not served.connection.unacknowledged


def test_the_kernel_gives_up_on_a_dead_network_as_soon_as_nobody_would_act_any_more(served: Served) -> None:
    with socket.socket(fileno=os.dup(served.connection._socket().fileno())) as twin:
        assert twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000
        assert twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_many_messages_come_in_at_once(served: Served, everywhere: Mosquitto) -> None:
    served.connection.subscribe(["edge_asr/hall/cmd/+", "homeassistant/status"])
    served.until(lambda s: not s.connection._subscriptions, "the subscription")
    sent = [f"{number} {'x' * 300}" for number in range(200)]
    send_lines(everywhere.port, "edge_asr/hall/cmd/mute", sent)
    served.until(lambda s: len(s.messages) == 200, "all of them")
    assert [(topic, payload.decode()) for topic, payload, _ in served.messages] == [
        ("edge_asr/hall/cmd/mute", payload) for payload in sent
    ]


def test_a_large_message_arrives_whole_though_the_broker_is_slow(served: Served, everywhere: Mosquitto) -> None:
    with socket.socket(fileno=os.dup(served.connection._socket().fileno())) as twin:
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # nothing fits into it at once
    payloads = [f"{number}{'话' * 33_000}" for number in range(8)]
    with Subscriber(everywhere.port, "edge_asr/#") as subscriber:
        everywhere.freeze()
        try:
            ids = [served.publish(TOPIC, payload) for payload in payloads]
            for _ in range(5):
                served.serve(0.01)
            assert not served.connection.clear, "the messages fit into the buffers of the kernel"
        finally:
            everywhere.thaw()
        served.until(lambda s: s.acknowledged == ids, "the acknowledgements", longest_s=PATIENCE_S)
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 8, "all messages")
        assert [message.payload for message in subscriber.on("transcript")] == payloads


def test_a_connection_without_traffic_sleeps(served: Served) -> None:
    served.deliver(TOPIC, "x")
    slept = [served.serve(0.01) for _ in range(20)]  # at first what TLS says of its own accord may come
    assert slept[-10:] == [True] * 10


def test_a_connection_that_is_dropped_leaves_its_last_will(served: Served, everywhere: Mosquitto) -> None:
    with Subscriber(everywhere.port, WILL.topic) as subscriber:
        served.connection.drop()
        subscriber.wait_for(lambda s: [message.payload for message in s.messages][-1:] == ["offline"], "the last will")


def test_a_connection_that_ends_properly_leaves_none(served: Served, everywhere: Mosquitto) -> None:
    served.deliver(WILL.topic, "gone", retain=True)
    with Subscriber(everywhere.port, WILL.topic) as subscriber:
        subscriber.wait_for(lambda s: s.messages, "the retained message")
        before = everywhere.log().count("Client edge_asr-test disconnected.")
        served.connection.disconnect()
        wait_for(lambda: everywhere.log().count("Client edge_asr-test disconnected.") > before, "the end")
        send(everywhere.port, WILL.topic, "end")
        subscriber.wait_for(lambda s: s.messages[-1].payload == "end", "the message behind it")
        assert [message.payload for message in subscriber.messages] == ["gone", "end"]


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_process_leaves_its_last_will(way: str, everywhere: Mosquitto, certificates: Certificates) -> None:
    config = way_in(everywhere, way, certificates)
    program = (
        f"import sys; sys.path[:] = {sys.path!a}\n"
        "from connections import MqttConfig, Served\n"
        f"config = MqttConfig.model_validate_json({config.model_dump_json()!a})\n"
        "with Served(config, name='edge_asr-doomed') as served:\n"
        "    served.connect()\n"
        "    print('up', flush=True)\n"
        "    served.until(lambda s: False, 'the end')\n"
    )
    with (
        Subscriber(everywhere.port, WILL.topic) as subscriber,
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            known = len(subscriber.messages)
        finally:
            process.send_signal(signal.SIGKILL)
        subscriber.wait_for(lambda s: [m.payload for m in s.messages[known:]] == ["offline"], "the last will")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_broker_that_comes_back_is_reached_again(
    version: str, way: str, everywhere: Mosquitto, certificates: Certificates
) -> None:
    config = way_in(everywhere, way, certificates)
    with Served(config, protocol=version) as first:
        first.connect()
        everywhere.restart()
        assert first.fail().startswith("the connection was lost")
        assert not first.connection.lasting
    with Served(config, protocol=version) as second:
        second.connect()
        second.deliver(TOPIC, "here again")


def test_what_the_broker_of_mqtt_5_limits_is_known(everywhere: Mosquitto) -> None:
    with Served(way_in(everywhere, "tcp")) as served:
        served.connect()
        assert (served.connection.in_flight_limit, served.connection.largest_packet) == (20, None)


def test_a_message_expires_at_a_broker_of_mqtt_5(everywhere: Mosquitto) -> None:
    options = ("-V", "mqttv5", "-F", '{"topic":"%t","qos":%q,"retain":%r,"payload":"%E"}')
    with Served(way_in(everywhere, "tcp")) as served, Subscriber(everywhere.port, TOPIC, options=options) as subscriber:
        served.connect()
        served.deliver(TOPIC, "x", expires_s=60)
        subscriber.wait_for(lambda s: s.messages, "the message")
        assert int(subscriber.messages[0].payload) in (59, 60)


@pytest.mark.parametrize(("version", "refused"), [("5", True), ("3.1.1", False)])
def test_a_message_that_the_access_list_forbids_is_refused_where_the_version_can_say_so(
    version: str, refused: bool, mosquitto_installed: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broker = Mosquitto(tmp_path_factory.mktemp("access"), access=["topic write edge_asr/hall/status"])
    broker.start()
    try:
        with Served(way_in(broker, "tcp"), protocol=version) as served:
            served.connect()
            forbidden, allowed = served.publish(TOPIC, "x"), served.publish("edge_asr/hall/status", "online")
            served.until(lambda s: allowed in s.acknowledged, "the acknowledgement")
            assert served.connection.proven_at > 0
            assert not served.connection.unacknowledged
            assert (forbidden in served.acknowledged) == (not refused)
            if refused:
                [(message_id, refusal)] = served.refused
                assert (message_id, refusal.permanent) == (forbidden, False)
                assert refusal.why.startswith("not authorized; let this user publish there")
    finally:
        broker.kill()


def test_a_message_too_large_for_mosquitto_is_refused_for_good(
    mosquitto_installed: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broker = Mosquitto(tmp_path_factory.mktemp("small"), options=["message_size_limit 1000"])
    broker.start()
    try:
        with Served(way_in(broker, "tcp")) as served:
            served.connect()
            large = served.publish(TOPIC, "x" * 2000)
            served.deliver(TOPIC, "x" * 900)
            assert [(message_id, refusal.permanent) for message_id, refusal in served.refused] == [(large, True)]
            assert served.refused[0][1].why.startswith("packet too large; ")
    finally:
        broker.kill()


def test_a_message_larger_than_the_broker_announces_is_not_even_sent(
    mosquitto_installed: None, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Mosquitto(tmp_path_factory.mktemp("small"), options=["max_packet_size 1000"])
    broker.start()
    try:
        with Served(way_in(broker, "tcp")) as served:
            served.connect()
            assert served.connection.largest_packet == 1000
            large = served.publish(TOPIC, "x" * 2000)
            assert not served.refused, "the owner does not know the id yet"
            served.publish(TOPIC, "话" * 400, qos=0)
            served.deliver(TOPIC, "x" * 900)
            assert [(message_id, refusal.permanent) for message_id, refusal in served.refused] == [(large, True)]
            assert "the broker takes 1000; " in served.refused[0][1].why
            assert f"a message on {TOPIC} is not sent: it has 1256 bytes" in caplog.text
    finally:
        broker.kill()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wrong_account_is_refused_in_words(
    version: str, mosquitto_installed: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broker = Mosquitto(tmp_path_factory.mktemp("guarded"), username="hall", password="right-secret")
    broker.start()
    try:
        config = way_in(broker, "tcp", username="hall", password="wrong-secret")
        with Served(config, protocol=version) as served:
            why = served.fail()
            assert why.startswith("it refused: not authorized; correct mqtt.username and the password")
            assert "secret" not in why
            assert (served.connection.refused, served.connection.lasting) == (True, True)
        with Served(way_in(broker, "tcp", username="hall", password="right-secret"), protocol=version) as served:
            served.connect()
    finally:
        broker.kill()


def test_a_connection_that_was_dropped_does_nothing_more(everywhere: Mosquitto) -> None:
    with Served(way_in(everywhere, "tcp")) as served:
        served.connect()
        served.publish(TOPIC, "x")
        served.connection.drop()
        served.serve(0.0)
        assert not served.acknowledged
