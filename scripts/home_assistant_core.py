"""Home Assistant's core without a screen, told what to do by JSON on standard input; each line gets one as an answer.

Runs in the environment that scripts/test-home-assistant makes. Usage: home_assistant_core.py FOLDER < requests
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

import yaml
from homeassistant import bootstrap, core, loader
from homeassistant.components.homeassistant import exposed_entities
from homeassistant.const import __version__
from homeassistant.helpers import area_registry, device_registry, entity_registry
from homeassistant.helpers.template import Template

SPEAK = ("tts", "speak")


class Memory(logging.Handler):
    """Keeps what Home Assistant complains about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


class Core:
    """Home Assistant, and what tests ask of it."""

    def __init__(self, folder: Path) -> None:
        self.hass = core.HomeAssistant(str(folder))
        self.hass.config.skip_pip = True
        self.folder = folder
        self.complaints = Memory()
        self.spoken: list[dict[str, Any]] = []
        logging.getLogger().addHandler(self.complaints)

    async def start(self) -> None:
        """Start with the folder's configuration.yaml, and with nothing that belongs to a screen."""
        loader.async_setup(self.hass)
        bootstrap.DEFAULT_INTEGRATIONS = set()
        config = yaml.safe_load((self.folder / "configuration.yaml").read_text(encoding="utf-8"))
        if await bootstrap.async_from_config_dict(config, self.hass) is None:
            raise SystemExit("Home Assistant does not start")
        await self.hass.async_start()

    async def obey(self, do: str, **given: Any) -> Any:
        """Do what a request names."""
        return await getattr(self, f"do_{do}")(**given)

    async def do_version(self) -> str:
        """Return the release."""
        return __version__

    async def do_connect(self, port: int) -> str:
        """Set up MQTT as a user does in the dialogue; return what the dialogue ends with."""
        flow = self.hass.config_entries.flow
        step = await flow.async_init("mqtt", context={"source": "user"})
        step = await flow.async_configure(step["flow_id"], {"broker": "127.0.0.1", "port": port})
        return str(step["type"])

    async def do_states(self) -> dict[str, Any]:
        """Return state and attributes of every entity."""
        return {
            state.entity_id: {"state": state.state, "attributes": dict(state.attributes)}
            for state in self.hass.states.async_all()
        }

    async def do_registry(self) -> dict[str, Any]:
        """Return registered entities by their unique id, and devices by name."""
        areas = area_registry.async_get(self.hass)
        found = entity_registry.async_get(self.hass).entities.values()
        devices = device_registry.async_get(self.hass).devices.values()
        return {
            "entities": {
                entry.unique_id: {
                    "entity_id": entry.entity_id,
                    "platform": entry.platform,
                    "category": entry.entity_category,
                    "name": entry.name,
                }
                for entry in found
            },
            "devices": {
                device.name: {
                    "manufacturer": device.manufacturer,
                    "version": device.sw_version,
                    "area": (area := areas.async_get_area(device.area_id or "")) and area.name,
                }
                for device in devices
            },
        }

    async def do_rename(self, entity_id: str, name: str) -> None:
        """Give an entity another name, as a user does."""
        entity_registry.async_get(self.hass).async_update_entity(entity_id, name=name)

    async def do_expose(self, entity_id: str) -> None:
        """Let Assist control an entity, as a user does."""
        exposed_entities.async_expose_entity(self.hass, "conversation", entity_id, True)

    async def do_call(self, domain: str, service: str, data: dict[str, Any]) -> None:
        """Call a service; what it starts goes on."""
        await self.hass.services.async_call(domain, service, data, blocking=True)

    async def do_set(self, entity_id: str, state: str) -> None:
        """Say that an entity of nobody is so."""
        self.hass.states.async_set(entity_id, state)

    async def do_render(self, template: str) -> str:
        """Return what a template says now."""
        return str(Template(template, self.hass).async_render(parse_result=False))

    async def do_voice(self) -> None:
        """Take the place of text-to-speech."""

        async def speak(call: core.ServiceCall) -> None:
            self.spoken.append(dict(call.data))

        self.hass.services.async_register(*SPEAK, speak)

    async def do_spoken(self) -> list[dict[str, Any]]:
        """Return what was spoken since `voice`."""
        return self.spoken

    async def do_complaints(self) -> list[str]:
        """Return the warnings and errors in the log since the last time."""
        lines, self.complaints.lines = self.complaints.lines, []
        return lines


async def _serve(core_: Core) -> None:
    await core_.start()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer = await core_.obey(**json.loads(line))
        print(json.dumps(answer, default=str), flush=True)
    await core_.hass.async_stop(force=True)


async def _main() -> None:
    await _serve(Core(Path(sys.argv[1])))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    asyncio.run(_main())
