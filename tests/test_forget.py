"""`mqtt forget` and discovery at a real Mosquitto: what is retained, and that nothing of it stays."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from bundled import REPOSITORY
from mosquitto import PATIENCE_S, Mosquitto, Subscriber, free_port, send

from edge_asr.config_mqtt import HomeAssistantConfig, MqttConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.forget import Forgetter
from edge_asr.publish.client import make_client, start_connect
from edge_asr.publish.dialect import Dialect, Greeting
from edge_asr.publish.home_assistant import HomeAssistant


class Publisher:
    """A connection that does for one dialect what the appliance's publisher does."""

    def __init__(self, config: MqttConfig, dialect: Dialect) -> None:
        self._dialect = dialect
        self._client = make_client(config, "publisher", "5")
        self._client.on_connect = lambda *_: self._connected()
        self._client.on_message = lambda client, userdata, message: self._receive(message)
        start_connect(self._client, config)
        self._client.loop_start()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _connected(self) -> None:
        self._client.subscribe([(topic, 1) for topic in self._dialect.topics])
        self._greet()

    def _greet(self) -> None:
        for message in self._dialect.greet():
            self._client.publish(message.topic, message.payload, message.qos, message.retain)

    def _receive(self, message: paho.MQTTMessage) -> None:
        if self._dialect.receive(message.topic, bytes(message.payload), message.retain) is Greeting.AGAIN:
            self._greet()
        for out in self._dialect.take():
            self._client.publish(out.topic, out.payload, out.qos, out.retain)


@pytest.fixture
def visits() -> Iterator[list[Publisher]]:
    publishers: list[Publisher] = []
    yield publishers
    for publisher in publishers:
        publisher.close()


def dialect(device_id: str = "hall", **config: object) -> HomeAssistant:
    return HomeAssistant(HomeAssistantConfig.model_validate(config), "edge_asr", device_id, "1.2.3")


def retained(port: int) -> dict[str, str]:
    """What a newcomer gets, up to a message that is published after its subscription."""
    with Subscriber(port) as newcomer:
        send(port, "end", "of it")
        newcomer.wait_for(lambda seen: any(m.topic == "end" for m in seen.messages), "the end")
        return {message.topic: message.payload for message in newcomer.messages if message.retained}


def forget(port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_asr", "mqtt", "forget", "-o", f"mqtt.port={port}", "-o", "device_id=hall"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=PATIENCE_S)


def retain_all(port: int, device_id: str = "hall", **config: object) -> list[str]:
    for message in dialect(device_id, **config).greet():
        send(port, message.topic, message.payload, retained=True)
    send(port, f"edge_asr/{device_id}/status", "offline", retained=True)
    send(port, f"edge_asr/{device_id}/state", "{}", retained=True)
    return list(retained(port))


def test_discovery_is_retained_on_connect_and_comes_again_when_home_assistant_starts(
    broker: Mosquitto, visits: list[Publisher]
) -> None:
    (topic,) = (message.topic for message in dialect().greet())
    with Subscriber(broker.port, topic) as seen:
        visits.append(Publisher(MqttConfig(port=broker.port), dialect()))
        seen.wait_for(lambda seen: len(seen.messages) == 1, "discovery")
        assert topic in retained(broker.port)
        send(broker.port, "homeassistant/status", "online")
        seen.wait_for(lambda seen: len(seen.messages) == 2, "discovery, again")
        assert seen.messages[0].payload == seen.messages[1].payload


def test_a_retained_birth_message_does_not_double_the_greeting(broker: Mosquitto, visits: list[Publisher]) -> None:
    send(broker.port, "homeassistant/status", "online", retained=True)
    with Subscriber(broker.port, "homeassistant/#") as seen:
        visits.append(Publisher(MqttConfig(port=broker.port), dialect()))
        send(broker.port, "homeassistant/status", "online")  # so the retained one has been looked at
        seen.wait_for(lambda seen: len(seen.on("config")) == 2, "two greetings")
        send(broker.port, "homeassistant/status", "online")
        seen.wait_for(lambda seen: len(seen.on("config")) == 3, "the third")


@pytest.mark.parametrize(("before", "after"), [("components", "device"), ("device", "components")])
def test_a_change_of_the_form_leaves_only_the_new_one(
    broker: Mosquitto, visits: list[Publisher], before: str, after: str
) -> None:
    foreign = "homeassistant/sensor/hall/cpu/config"
    send(broker.port, foreign, '{"o":{"name":"telegraf"}}', retained=True)
    old = {message.topic for message in dialect(form=before).greet()}
    new = {message.topic for message in dialect(form=after).greet()}
    for message in dialect(form=before).greet():
        send(broker.port, message.topic, message.payload, retained=True)
    with Subscriber(broker.port, "homeassistant/#") as seen:
        visits.append(Publisher(MqttConfig(port=broker.port), dialect(form=after)))
        seen.wait_for(lambda seen: {m.topic for m in seen.messages if not m.payload} == old, "the old ones removed")
        handed_over = {m.topic for m in seen.messages if m.payload == '{"migrate_discovery":true}'}
    assert handed_over == old
    assert retained(broker.port).keys() == new | {foreign}


@pytest.mark.parametrize("form", ["device", "components"])
def test_forget_leaves_nothing_retained_of_the_appliance_and_all_of_others(broker: Mosquitto, form: str) -> None:
    others = retain_all(broker.port, "kitchen", form=form)
    send(broker.port, "homeassistant/sensor/hall/cpu/config", '{"o":{"name":"telegraf"}}', retained=True)
    before = set(retain_all(broker.port, form=form))
    result = forget(broker.port)
    assert (result.returncode, result.stderr) == (0, "")
    left = {*others, "homeassistant/sensor/hall/cpu/config"}
    assert retained(broker.port).keys() == left
    assert {line.removeprefix("removed ") for line in result.stdout.splitlines()} == before - left


def test_forget_finds_what_only_an_older_release_had(broker: Mosquitto) -> None:
    send(broker.port, "homeassistant/text/hall/mood/config", '{"o":{"name":"edge_asr"}}', retained=True)
    assert "removed homeassistant/text/hall/mood/config" in forget(broker.port).stdout
    assert not retained(broker.port)


def test_forget_takes_an_appliance_that_is_gone_and_another_prefix(broker: Mosquitto) -> None:
    retain_all(broker.port, "old-name", prefix="ha/discovery")
    result = forget(broker.port, "--device", "old-name", "-o", "home_assistant.prefix=ha/discovery")
    assert "removed ha/discovery/device/old-name/config" in result.stdout
    assert not retained(broker.port)


def test_forget_says_that_the_appliance_is_connected_and_goes_on(broker: Mosquitto) -> None:
    retain_all(broker.port)
    send(broker.port, "edge_asr/hall/status", "online", retained=True)
    send(broker.port, "edge_asr/hall/cmd/mute", "on", retained=True)
    result = forget(broker.port)
    assert result.returncode == 0
    assert "hall is connected" in result.stdout
    assert "left    edge_asr/hall/cmd/mute" in result.stdout
    assert retained(broker.port) == {"edge_asr/hall/cmd/mute": "on"}


def test_forget_says_where_there_is_nothing(broker: Mosquitto) -> None:
    result = forget(broker.port)
    assert result.returncode == 0
    assert result.stdout == f"nothing is retained of hall at 127.0.0.1:{broker.port}\n"


def test_forget_without_a_broker_and_for_a_name_that_is_none() -> None:
    result = forget(port := free_port())
    assert result.returncode == 1
    assert result.stderr.startswith(f"edge-asr: the broker at 127.0.0.1:{port}: connection refused")
    result = forget(port, "--device", "no/name")
    assert result.returncode == 2
    assert "--device" in result.stderr


def test_forget_tells_that_the_broker_does_not_let_it(tmp_path: Path, mosquitto_installed: None) -> None:
    server = Mosquitto(tmp_path, access=["topic readwrite #"], persistence=True)
    server.start()
    try:
        topics = retain_all(server.port)
        server.stop()
        (tmp_path / "access").write_text("topic read #\ntopic write end\n")
        server.start()
        result = forget(server.port)
        assert result.returncode == 1
        assert result.stderr.startswith("edge-asr: the broker does not let this user take it back: ")
        assert list(retained(server.port)) == topics
    finally:
        server.kill()


def test_forget_tells_that_the_password_is_wrong(tmp_path: Path, mosquitto_installed: None) -> None:
    server = Mosquitto(tmp_path, username="ear", password="secret")
    server.start()
    try:
        wrong = MqttConfig.model_validate({"port": server.port, "username": "ear", "password": "wrong"})
        with pytest.raises(EdgeAsrError, match=r"not authorized; correct mqtt\.username and the password"):
            Forgetter(wrong).forget("hall", "homeassistant")
    finally:
        server.kill()


def test_the_access_rules_of_the_documentation_are_enough(
    tmp_path: Path, mosquitto_installed: None, visits: list[Publisher]
) -> None:
    text = (REPOSITORY / "docs" / "home-assistant.md").read_text(encoding="utf-8")
    rules = re.findall(r"^(?:user|topic) .*$", text, re.MULTILINE)
    assert rules[0] == "user hall"
    server = Mosquitto(tmp_path, username="hall", password="secret", access=rules)
    server.start()
    try:
        account = MqttConfig.model_validate({"port": server.port, "username": "hall", "password": "secret"})
        old = {message.topic for message in dialect(form="components").greet()}
        with Subscriber(server.port, "homeassistant/#", username="hall", password="secret") as seen:
            visits.append(Publisher(account, dialect(form="components")))
            seen.wait_for(lambda seen: {message.topic for message in seen.messages} == old, "discovery")
            visits.append(Publisher(account, dialect()))
            seen.wait_for(lambda seen: {m.topic for m in seen.messages if not m.payload} == old, "the hand-over")
        assert Forgetter(account).forget("hall", "homeassistant").removed == ["homeassistant/device/hall/config"]
        assert Forgetter(account).forget("hall", "homeassistant").removed == []
    finally:
        server.kill()
