"""A real Home Assistant without a screen, in a process and an environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from bundled import REPOSITORY
from mosquitto import PATIENCE_S, free_port, wait_for

BLUEPRINT = REPOSITORY / "deploy" / "home-assistant" / "said-to-assist.yaml"


class HomeAssistantCore:
    """Runs until `close`; every method waits for what it starts."""

    def __init__(self, python: Path, folder: Path, automations: list[Mapping[str, Any]]) -> None:
        self.folder = folder
        """Its configuration, and what it keeps over a restart."""
        blueprints = folder / "blueprints" / "automation" / "edge_asr"
        blueprints.mkdir(parents=True, exist_ok=True)
        (blueprints / BLUEPRINT.name).write_bytes(BLUEPRINT.read_bytes())
        home = {"name": "Home", "latitude": 0, "longitude": 0, "elevation": 0, "unit_system": "metric"}
        configuration = {
            "homeassistant": {**home, "time_zone": "UTC"},
            "http": {"server_host": "127.0.0.1", "server_port": free_port()},
            "conversation": {},
            "input_boolean": {"lamp": {"name": "客厅灯"}},
            "automation": automations,
        }
        (folder / "configuration.yaml").write_text(yaml.safe_dump(configuration, allow_unicode=True))
        self._log = (folder / "core.log").open("w")
        self._process = subprocess.Popen(
            [python, REPOSITORY / "scripts" / "home_assistant_core.py", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, do: str, **given: Any) -> Any:
        """Send a request; return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, Path(self._log.name).read_text()[-4000:]
        return json.loads(line)

    def wait_for(self, condition: Callable[[dict[str, Any]], object], what: str) -> dict[str, Any]:
        """Return the states of all entities as soon as the condition holds for them."""
        states: dict[str, Any] = {}

        def holds() -> object:
            states.clear()
            states.update(self.ask("states"))
            return condition(states)

        wait_for(holds, what)
        return states

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(PATIENCE_S)
        finally:
            self._process.kill()
            self._process.wait(PATIENCE_S)
            self._process.stdout.close()
            self._log.close()
