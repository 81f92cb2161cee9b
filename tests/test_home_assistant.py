"""Home Assistant: what is published for it, against the fields that it knows; what its messages bring about."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bundled import REPOSITORY

from edge_asr.audio.microphone import OPENING
from edge_asr.config_mqtt import HomeAssistantConfig
from edge_asr.publish import home_assistant
from edge_asr.publish.commands import PRESETS, READERS, parse
from edge_asr.publish.dialect import Greeting, Message
from edge_asr.publish.home_assistant import MIGRATE, HomeAssistant, is_ours
from edge_asr.sources import LOST

KNOWN = json.loads((Path(__file__).parent / "data" / "home_assistant.json").read_text(encoding="utf-8"))
KEYS = {
    "said", "response", "engine", "outbox", "problem", "microphone", "outbox_problem", "connected",
    "mute", "preset", "listen", "reload",
}  # fmt: skip
DEVICE_TOPIC = "homeassistant/device/hall/config"


def dialect(*, device_id: str = "hall", commands: bool = True, **config: Any) -> HomeAssistant:
    return HomeAssistant(HomeAssistantConfig(**config), "edge_asr", device_id, "1.2.3", commands=commands)


def greeting(**options: Any) -> dict[str, dict[str, Any]]:
    return {message.topic: json.loads(message.payload) for message in dialect(**options).greet()}


def device_message(**options: Any) -> dict[str, Any]:
    (content,) = greeting(**options).values()
    return content


def written_out(content: dict[str, Any], table: str = "abbreviations") -> dict[str, Any]:
    return {KNOWN[table].get(key, key): value for key, value in content.items()}


def test_every_field_is_one_that_home_assistant_knows() -> None:
    message = written_out(device_message(area="Hall", name="Ear"))
    assert message.keys() <= set(KNOWN["message"])
    assert written_out(message["device"], "device_abbreviations").keys() <= set(KNOWN["device"])
    assert written_out(message["origin"], "origin_abbreviations").keys() <= set(KNOWN["origin"])
    assert message["components"].keys() == KEYS
    for entity in map(written_out, message["components"].values()):
        assert entity.keys() - {"platform"} <= set(KNOWN["entities"][entity["platform"]]), entity


def test_every_field_that_can_be_abbreviated_is() -> None:
    long = {name for name, short in map(reversed, KNOWN["abbreviations"].items()) if len(short) < len(name)}
    content = device_message()
    used = {*content, *(key for entity in content["cmps"].values() for key in entity)}
    assert not used & long


def test_a_message_of_the_other_form_says_the_same_of_each_entity() -> None:
    device, shared = device_message(area="Hall"), ("dev", "o", "avty", "stat_t")
    parts = greeting(form="components", area="Hall")
    assert len(parts) == len(KEYS)
    for key, entity in device["cmps"].items():
        part = parts[f"homeassistant/{entity['p']}/hall/{key}/config"]
        assert part == {**{name: device[name] for name in shared}, **{k: v for k, v in entity.items() if k != "p"}}


def test_unique_ids_are_those_of_the_first_release() -> None:
    entities = device_message(device_id="living-room_2", name="Other")["cmps"]
    assert {key: entity["uniq_id"] for key, entity in entities.items()} == {
        key: f"edge_asr_living-room_2_{key}" for key in KEYS
    }


def test_topics_suit_home_assistant_for_every_device_id() -> None:
    # As TOPIC_MATCHER in components/mqtt/discovery.py.
    pattern = re.compile(r"homeassistant/\w+/(?:[a-zA-Z0-9_-]+/)?[a-zA-Z0-9_-]+/config")
    for form in ("device", "components"):
        for topic in greeting(form=form, device_id="-a_B-9_"):
            assert pattern.fullmatch(topic)


def test_names_in_any_script_go_out_as_utf_8() -> None:
    (message,) = dialect(name="大厅", area="客厅").greet()
    assert '"name":"大厅"' in message.payload
    assert message.qos == 1
    assert message.retain
    assert len(message.payload.encode()) < 4096


def test_controls_send_commands_that_there_are() -> None:
    entities = device_message()["cmps"]
    buttons = {name: entities[name]["pl_prs"] for name in ("listen", "reload")}
    sent = {"mute": entities["mute"]["pl_on"], "preset": entities["preset"]["ops"][0], **buttons}
    for name, payload in sent.items():
        assert entities[name]["cmd_t"] == f"edge_asr/hall/cmd/{name}"
        assert name in READERS
        parse(name, payload.encode())
    assert parse("mute", entities["mute"]["pl_off"].encode()) == {"mute": False}
    assert entities["preset"]["ops"] == list(PRESETS)


@pytest.mark.parametrize("form", ["device", "components"])
def test_nothing_to_press_is_offered_where_no_command_is_obeyed(form: str) -> None:
    messages = greeting(commands=False, form=form)
    assert "cmd_t" not in json.dumps(messages)
    if form == "device":  # a key without fields is how Home Assistant is told to let go of an entity
        assert messages[DEVICE_TOPIC]["cmps"]["mute"] == {"p": "switch"}


def test_the_templates_know_the_words_of_state() -> None:
    assert home_assistant.OPENING == OPENING
    assert all(repr(health) in home_assistant.UNHEARD for health in LOST)


def test_a_birth_message_asks_for_everything_again_but_not_a_retained_one() -> None:
    assistant = dialect(prefix="ha")
    assert "ha/status" in assistant.topics
    assert assistant.receive("ha/status", b"online", False) is Greeting.AGAIN
    assert assistant.receive("ha/status", b"online", True) is Greeting.NOTHING
    assert assistant.receive("ha/status", b"offline", False) is Greeting.NOTHING
    assert assistant.receive("ha/status", b"\xff", False) is Greeting.NOTHING
    assert list(assistant.take()) == []


def feed(assistant: HomeAssistant, messages: list[Message]) -> None:
    for message in messages:
        assert assistant.receive(message.topic, message.payload.encode(), True) is Greeting.NOTHING


def test_the_other_form_is_handed_over_and_removed() -> None:
    for before, after in (("device", "components"), ("components", "device")):
        old = list(dialect(form=before).greet())
        assistant = dialect(form=after)
        feed(assistant, old)
        topics = [message.topic for message in old]
        assert list(assistant.take()) == [
            *(Message(topic, MIGRATE, qos=1) for topic in topics),
            *assistant.greet(),
            *(Message(topic, "", qos=1, retain=True) for topic in topics),
        ]
        assert list(assistant.take()) == []


def test_an_entity_of_another_release_is_removed_and_not_handed_over() -> None:
    payload = json.dumps({"o": {"name": "edge_asr"}, "uniq_id": "edge_asr_hall_mood"}).encode()
    topic = "homeassistant/sensor/hall/mood/config"
    for form in ("device", "components"):
        assistant = dialect(form=form)
        assistant.receive(topic, payload, True)
        assert list(assistant.take()) == [*assistant.greet(), Message(topic, "", qos=1, retain=True)]


def test_what_other_programs_have_retained_there_is_left_alone() -> None:
    assistant = dialect()
    topic = "homeassistant/sensor/hall/cpu/config"
    nested = b"[" * 60_000
    for payload in (b'{"o":{"name":"telegraf"}}', b"{}", b"[]", b'{"o":[]}', b"", b"\xff", nested, b" " * 70_000):
        assert not is_ours(payload)
        assistant.receive(topic, payload, True)
    assert list(assistant.take()) == []


def test_what_looks_like_discovery_elsewhere_is_left_alone() -> None:
    assistant = dialect()
    payload = json.dumps({"o": {"name": "edge_asr"}}).encode()
    elsewhere = ("x", "homeassistant/device/other/config", "edge_asr/hall/cmd/mute", "homeassistant/sensor/hall/config")
    for topic in elsewhere:
        assistant.receive(topic, payload, True)
    assistant.receive("homeassistant/sensor/hall/engine/config", payload, False)
    assert list(assistant.take()) == []


def test_its_own_messages_are_no_news() -> None:
    for form in ("device", "components"):
        assistant = dialect(form=form)
        feed(assistant, list(assistant.greet()))
        assert list(assistant.take()) == []


def test_what_is_said_goes_out_on_no_other_topic() -> None:
    assert list(dialect().said({"text": "hello"})) == []


def test_the_script_says_that_there_is_no_python_for_home_assistant(tmp_path: Path) -> None:
    for name in ("scripts", "bin"):
        (tmp_path / name).mkdir()
    script = shutil.copy(REPOSITORY / "scripts" / "test-home-assistant", tmp_path / "scripts")
    for name in ("bash", "dirname"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    environment = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path), "HOME": str(tmp_path)}
    result = subprocess.run(
        [script, "--environment"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith("test-home-assistant: no Python 3.13 here")
