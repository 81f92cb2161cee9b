"""Write home_assistant.json: the fields and abbreviations of discovery that Home Assistant's MQTT integration knows.

Run by the Python that `scripts/test-home-assistant --environment` names.
"""

import importlib
import json
from pathlib import Path

from homeassistant.components.mqtt import schemas
from homeassistant.components.mqtt.abbreviations import ABBREVIATIONS, DEVICE_ABBREVIATIONS, ORIGIN_ABBREVIATIONS
from homeassistant.const import __version__

PLATFORMS = ("binary_sensor", "button", "event", "select", "sensor", "switch")


def _fields(schema):
    """Return the keys of a schema, of all parts where it has several."""
    parts = getattr(schema, "validators", None)
    if parts is not None:
        return sorted({field for part in parts for field in _fields(part)})
    keys = getattr(schema, "schema", schema)
    return sorted(str(key) for key in keys) if isinstance(keys, dict) else []


content = {
    "source": f"homeassistant {__version__}, Apache-2.0: components/mqtt/abbreviations.py, and the keys of its schemas",
    "abbreviations": ABBREVIATIONS,
    "device_abbreviations": DEVICE_ABBREVIATIONS,
    "origin_abbreviations": ORIGIN_ABBREVIATIONS,
    "message": _fields(schemas.DEVICE_DISCOVERY_SCHEMA),
    "device": _fields(schemas.MQTT_ENTITY_DEVICE_INFO_SCHEMA),
    "origin": _fields(schemas.MQTT_ORIGIN_INFO_SCHEMA),
    "entities": {
        name: _fields(importlib.import_module(f"homeassistant.components.mqtt.{name}").DISCOVERY_SCHEMA)
        for name in PLATFORMS
    },
}
path = Path(__file__).with_name("home_assistant.json")
path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
