"""A real Prometheus in a hurry: it looks at appliances that come and go, and its alerts do not wait."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundled import REPOSITORY
from mosquitto import PATIENCE_S, find_program, free_port, wait_for

FOLDER = REPOSITORY / "deploy" / "prometheus"
RULES = FOLDER / "edge_asr.rules.yml"
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
HASTE = {
    r"\bfor: 2m\b": "for: 1s",  # nobody is down because one answer took long on a busy machine
    r"\bfor: \d+[mh]\b": "for: 0s",
    r"\[\w+\]": "[3s]",
    r"outbox_oldest_seconds > 3600\b": "outbox_oldest_seconds > 2",
}
"""All that is rewritten in the rules: how long something must last, windows, and the age of what waits; no meaning."""
LOOKS = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
APPLIANCES = 40
"""So many may come: Prometheus takes five seconds to learn of another one, and knows of these from the start."""


def program(name: str) -> str:
    """Return the path of a program of Prometheus; skip the test where it is not installed."""
    if (found := find_program(name)) is None:
        pytest.skip(f"not installed: {name} (Debian: apt install prometheus)")
    return found


class Prometheus:
    """One that runs; its files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        executable = program("prometheus")
        self._ports = [free_port() for _ in range(APPLIANCES)]
        (folder / "rules.yml").write_text(hurried(RULES.read_text(encoding="utf-8")), encoding="utf-8")
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"], config["rule_files"] = LOOKS, ["rules.yml"]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [_instance(port) for port in self._ports]}]
        (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
        self._port = free_port()
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [executable, "--config.file=prometheus.yml", "--storage.tsdb.path=data",
             f"--web.listen-address={_instance(self._port)}"],
            cwd=folder, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def get(self, path: str, **query: str) -> Any:
        """Return what its API answers; None while it does not."""
        address = f"http://{_instance(self._port)}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def watch(self) -> Watched:
        """Return how the next appliance is seen, which is to listen on the port that this names."""
        wait_for(lambda: self.get("targets", state="active"), "Prometheus")
        return Watched(self, self._ports.pop())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._log.close()


@contextmanager
def running(folder: Path) -> Iterator[Prometheus]:
    prometheus = Prometheus(folder)
    try:
        yield prometheus
    finally:
        prometheus.stop()


@dataclass(frozen=True)
class Watched:
    """An appliance, as Prometheus sees it; what it is told of others is left out."""

    prometheus: Prometheus
    port: int

    def firing(self) -> dict[str, str]:
        """Return the alerts that fire, and what each says."""
        alerts = (self.prometheus.get("alerts") or {"alerts": []})["alerts"]
        return {
            alert["labels"]["alertname"]: alert["annotations"]["summary"]
            for alert in alerts
            if alert["state"] == "firing" and alert["labels"]["instance"] == _instance(self.port)
        }

    def fires(self, alert: str, *follow: str) -> None:
        """Return when an alert fires, and no other but those that may `follow` from the same fault."""
        wait_for(lambda: alert in self.firing(), f"{alert} to fire")
        firing = self.firing()
        assert firing.keys() <= {alert, *follow}, firing
        assert all(_instance(self.port) in said and "<" not in said for said in firing.values()), firing

    def ends(self, alert: str) -> None:
        """Return when an alert does not fire any more, whatever else does."""
        wait_for(lambda: alert not in self.firing(), f"the end of {alert}")

    def is_quiet(self) -> None:
        """Return when it is up, and no alert fires."""
        self.shows("up", "1")
        wait_for(lambda: not self.firing(), f"no alert to fire, unlike {', '.join(self.firing())}")

    def shows(self, metric: str, value: str) -> None:
        """Return when a metric, such as `edge_asr_state{state="ready"}`, has a value, and the rules have seen it."""
        name, _, labels = metric.rstrip("}").partition("{")
        selector = f'{name}{{{labels}{"," * bool(labels)}instance="{_instance(self.port)}"}}'

        def values() -> list[str]:
            return [
                one["value"][1] for one in (self.prometheus.get("query", query=selector) or {"result": []})["result"]
            ]

        wait_for(lambda: values() == [value], f"{metric} to be {value}")
        before = self._evaluated()
        wait_for(lambda: self._evaluated() != before, "the rules to be evaluated")

    def _evaluated(self) -> str:
        """Return when the rules were evaluated last."""
        return str([group["lastEvaluation"] for group in (self.prometheus.get("rules") or {"groups": []})["groups"]])


def hurried(rules: str) -> str:
    """Return rules that do not wait."""
    for pattern, instead in HASTE.items():
        rules, count = re.subn(pattern, instead, rules)
        assert count, f"nothing in the rules is like {pattern}"
    return rules


def _instance(port: int) -> str:
    return f"127.0.0.1:{port}"
