"""Home Assistant: the appliance appears there by itself, as one device with its entities."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edge_asr.config_mqtt import HomeAssistantConfig
from edge_asr.publish.commands import PRESETS
from edge_asr.publish.dialect import Greeting, Message
from edge_asr.publish.payload import to_payload

ORIGIN = "edge_asr"
"""Tells our discovery messages from those of other programs on the same machine."""
PAYLOAD_LIMIT = 65_536
"""Bytes of a discovery message; ours have a tenth of it."""
MIGRATE = to_payload({"migrate_discovery": True})
"""Home Assistant lets go of an entity at this, and keeps its settings for the message that brings it back."""

Fields = dict[str, Any]

DIAGNOSTIC: Fields = {"ent_cat": "diagnostic"}
CONFIG: Fields = {"ent_cat": "config"}
PROBLEM: Fields = {"p": "binary_sensor", "dev_cla": "problem", **DIAGNOSTIC}
UNHEARD = "selectattr('health','in',['waiting','stalled','failed'])"
OPENING = "it is being opened"
"""Why a microphone is `waiting` that nobody misses yet."""


class HomeAssistant:
    """The dialect; for the publisher thread."""

    def __init__(
        self, config: HomeAssistantConfig, base: str, device_id: str, version: str, *, commands: bool = True
    ) -> None:
        """`base` is that of our own topics; `commands` False: none is obeyed, so nothing to press is offered."""
        self._config = config
        self._device_id = device_id
        self._birth = f"{config.prefix}/status"
        self._device = {
            "ids": f"{ORIGIN}_{device_id}",
            "name": config.name or device_id,
            "mf": ORIGIN,
            "mdl": "Speech appliance",
            "sw": version,
            **({"sa": config.area} if config.area else {}),
        }
        self._origin = {"name": ORIGIN, "sw": version}
        self._prefix = f"{base}/{device_id}"
        self._shared: Fields = {"avty": [{"t": f"{self._prefix}/status"}], "stat_t": f"{self._prefix}/state"}
        self._entities = {
            key: {**entity, "uniq_id": f"{ORIGIN}_{device_id}_{key}"}
            for key, entity in entities(self._prefix).items()
            if commands or "cmd_t" not in entity
        }
        self._not_offered = {
            key: {"p": entity["p"]} for key, entity in entities(self._prefix).items() if key not in self._entities
        }
        self._messages = self._as_device() if config.form == "device" else self._as_components()
        self._own = {message.topic for message in self._messages}
        place = rf"(?:device/{device_id}|(\w+)/{device_id}/([\w-]+))/config"
        self._discovery = re.compile(f"{re.escape(config.prefix)}/{place}", re.ASCII)
        self._other: dict[str, bool] = {}  # retained topics that are none of those, and whether their entity goes on

    @property
    def topics(self) -> Sequence[str]:
        """Home Assistant's birth message, and discovery of ours that is out of date: another form, or release."""
        wanted = discovery_topics(self._config.prefix, self._device_id)
        return (self._birth, *(topic for topic in wanted if topic not in self._own))

    def greet(self) -> Iterable[Message]:
        """Return discovery, retained."""
        return self._messages

    def said(self, said: Mapping[str, Any]) -> Iterable[Message]:
        """Return nothing: Home Assistant reads `said` itself."""
        return ()

    def receive(self, topic: str, payload: bytes, retained: bool) -> Greeting:
        """Greet anew where Home Assistant has started; note discovery that is out of date.

        A retained birth message tells nothing: it comes with each connect, and so does a greeting.
        """
        if topic == self._birth:
            return Greeting.AGAIN if payload == b"online" and not retained else Greeting.NOTHING
        found = self._discovery.fullmatch(topic)
        if found and retained and topic not in self._own and is_ours(payload):
            component, key = found.groups()
            self._other[topic] = component is None or self._entities.get(key, {}).get("p") == component
        return Greeting.NOTHING

    def take(self) -> Iterable[Message]:
        """Return what takes the place of discovery that is out of date: in this order names and areas are kept."""
        other, self._other = self._other, {}
        if not other:
            return []
        handed_over = [Message(topic, MIGRATE, qos=1) for topic, goes_on in other.items() if goes_on]
        return [*handed_over, *self._messages, *(Message(topic, "", qos=1, retain=True) for topic in other)]

    def _as_device(self) -> list[Message]:
        content = {
            "dev": self._device,
            "o": self._origin,
            **self._shared,
            "cmps": {**self._entities, **self._not_offered},
        }
        return [_retained(f"{self._config.prefix}/device/{self._device_id}/config", content)]

    def _as_components(self) -> list[Message]:
        return [
            _retained(
                f"{self._config.prefix}/{entity['p']}/{self._device_id}/{key}/config",
                {"dev": self._device, "o": self._origin, **self._shared, **_without(entity, "p")},
            )
            for key, entity in self._entities.items()
        ]


def discovery_topics(prefix: str, device_id: str) -> tuple[str, str]:
    """Return where a device's discovery messages may be, of either form; other programs' may be there as well."""
    # So the ids of entities are the same in both forms: Home Assistant makes them of the last two levels but one.
    return f"{prefix}/device/{device_id}/config", f"{prefix}/+/{device_id}/+/config"


def is_ours(payload: bytes) -> bool:
    """Tell whether a discovery message was made by this program."""
    if len(payload) > PAYLOAD_LIMIT:
        return False
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError):  # a thousand brackets are too deep
        return False
    origin = content.get("o") if isinstance(content, dict) else None
    return isinstance(origin, dict) and origin.get("name") == ORIGIN


def entities(prefix: str) -> dict[str, Fields]:
    """Return all entities by key, in Home Assistant's abbreviations; their keys and unique ids never change.

    What has no `stat_t` of its own is read from `state`. `prefix` is that of our topics.
    """
    return {**_sayings(prefix), **_measurements(prefix), **_problems(prefix), **_controls(prefix)}


def _sayings(prefix: str) -> dict[str, Fields]:
    # The tokens of a long sentence are more than the 16 KB of attributes that Home Assistant records.
    template = "{{dict(value_json.items()|rejectattr(0,'in',['tokens','latency_ms','marks']))|to_json}}"
    return {
        "said": {
            "p": "event",
            "name": "Said",
            "ic": "mdi:microphone-message",
            "stat_t": f"{prefix}/said",
            "evt_typ": ["said"],
            "val_tpl": template,
        }
    }


def _measurements(prefix: str) -> dict[str, Fields]:
    return {
        "response": {
            "p": "sensor",
            "name": "Response time",
            "ic": "mdi:timer-outline",
            "dev_cla": "duration",
            "stat_cla": "measurement",
            "unit_of_meas": "ms",
            "sug_dsp_prc": 0,
            # Of the last answers, and retained: there after a restart of Home Assistant, steady enough for an alarm.
            "val_tpl": "{{value_json.budget.p95}}",
            **DIAGNOSTIC,
        },
        "engine": {
            "p": "sensor",
            "name": "Engine",
            "ic": "mdi:engine-outline",
            "val_tpl": "{{value_json.engine}}",
            **_attributes(prefix, "{'model':value_json.model}"),
            **DIAGNOSTIC,
        },
        "outbox": {
            "p": "sensor",
            "name": "Outbox",
            "ic": "mdi:tray-full",
            "stat_cla": "measurement",
            "unit_of_meas": "transcripts",
            "val_tpl": "{{(value_json.outbox or {}).get('pending')}}",
            **DIAGNOSTIC,
        },
    }


def _problems(prefix: str) -> dict[str, Fields]:
    unheard = f"value_json.sources|rejectattr('why','eq','{OPENING}')|{UNHEARD}|list"
    return {
        "problem": {
            "name": "Problem",
            "val_tpl": _on_if("value_json.state=='degraded'"),
            **_attributes(prefix, "{'state':value_json.state,'why':value_json.why}"),
            **PROBLEM,
        },
        "microphone": {
            "name": "Microphone",
            "ic": "mdi:microphone-question",
            "val_tpl": _on_if(unheard),
            **_attributes(prefix, "{'sources':value_json.sources}"),
            **PROBLEM,
        },
        "outbox_problem": {
            "name": "Outbox problem",
            "val_tpl": _on_if("(value_json.outbox or {}).get('trouble')"),
            **_attributes(prefix, "value_json.outbox or {}"),
            **PROBLEM,
        },
        "connected": {
            "p": "binary_sensor",
            "name": "Connected",
            "dev_cla": "connectivity",
            "stat_t": f"{prefix}/status",
            "pl_on": "online",
            "pl_off": "offline",
            "avty": [],  # `off` rather than unavailable
            **DIAGNOSTIC,
        },
    }


def _controls(prefix: str) -> dict[str, Fields]:
    return {
        "mute": {
            "p": "switch",
            "name": "Mute",
            "ic": "mdi:microphone-off",
            "cmd_t": f"{prefix}/cmd/mute",
            "pl_on": "on",
            "pl_off": "off",
            "val_tpl": "{{'on' if value_json.mute else 'off'}}",
            "qos": 1,
        },
        "preset": {
            "p": "select",
            "name": "Pause that ends a sentence",
            "ic": "mdi:timer-pause-outline",
            "cmd_t": f"{prefix}/cmd/preset",
            "ops": list(PRESETS),
            "val_tpl": "{{value_json.preset}}",
            "qos": 1,
            **CONFIG,
        },
        "listen": _button("Listen", "mdi:ear-hearing", f"{prefix}/cmd/listen"),
        "reload": {**_button("Reload model", "mdi:reload", f"{prefix}/cmd/reload"), **CONFIG},
    }


def _button(name: str, icon: str, topic: str) -> Fields:
    return {"p": "button", "name": name, "ic": icon, "cmd_t": topic, "pl_prs": "{}", "qos": 1}


def _attributes(prefix: str, expression: str) -> Fields:
    return {"json_attr_t": f"{prefix}/state", "json_attr_tpl": f"{{{{({expression})|to_json}}}}"}


def _on_if(condition: str) -> str:
    return f"{{{{'ON' if {condition} else 'OFF'}}}}"


def _without(entity: Fields, left_out: str) -> Fields:
    return {key: value for key, value in entity.items() if key != left_out}


def _retained(topic: str, content: Mapping[str, Any]) -> Message:
    return Message(topic, to_payload(content), qos=1, retain=True)
