"""Alert rules: each of them fires on what it is for, and only on that; and a real Prometheus sees an appliance fail."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundled import REPOSITORY
from mosquitto import PATIENCE_S, Mosquitto, find_program, wait_for
from prometheus_client import REGISTRY
from speech_server import serving

from bench.load import bundled_sentences, make_tape
from edge_asr.serve import server as server_module

FOLDER = REPOSITORY / "deploy" / "prometheus"
DASHBOARD = REPOSITORY / "deploy" / "grafana" / "edge_asr.json"
RULES = FOLDER / "edge_asr.rules.yml"
LOADED = yaml.safe_load(RULES.read_text(encoding="utf-8"))
ALERTS = {rule["alert"]: rule for group in LOADED["groups"] for rule in group["rules"] if "alert" in rule}
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    # What fires, and what does not: series with a value a minute, for two hours (`1x120`: 1, and 120 times more).
    "EdgeAsrDown": ({'up{job="edge_asr"}': "0x120"}, {'up{job="edge_asr"}': "1x120", 'up{job="other"}': "0x120"}),
    "EdgeAsrStarting": (
        {'edge_asr_state{state="starting"}': "1x120"}, {'edge_asr_state{state="starting"}': "1x10 0x110"}
    ),
    "EdgeAsrDegraded": ({'edge_asr_state{state="degraded"}': "1x120"}, {'edge_asr_state{state="degraded"}': "0x120"}),
    "EdgeAsrBrokerAway": ({"edge_asr_broker_up": "0x120"}, {"edge_asr_broker_up": "1x120"}),
    "EdgeAsrTranscriptsWait": (
        {"edge_asr_outbox_oldest_seconds": "0+60x120"}, {"edge_asr_outbox_oldest_seconds": "3500x120"}
    ),
    "EdgeAsrTranscriptsLost": (
        {'edge_asr_enforced_total{step="lost"}': "0x115 1x5"},
        {
            'edge_asr_enforced_total{step="lost"}': "1x120", 'edge_asr_enforced_total{step="split"}': "0+1x120",
            "edge_asr_dropped_transcripts_total": "7x120", "edge_asr_outbox_refused_total": "7x120",
        },
    ),
    "EdgeAsrLate": (
        {"edge_asr_late_total": "0+1x120", "edge_asr_response_seconds_count": "0+10x120"},
        {"edge_asr_late_total": "0+1x120", "edge_asr_response_seconds_count": "0+100x120"},
    ),
    "EdgeAsrEngineFails": ({"edge_asr_failed_total": "0x115 1x5"}, {"edge_asr_failed_total": "5x120"}),
    "EdgeAsrLesserEngine": (
        {'edge_asr_engine_steps_down_total{engine="tensorrt-fp16"}': "0x100 1x20"},
        {'edge_asr_engine_steps_down_total{engine="tensorrt-fp16"}': "1x120"},
    ),
    "EdgeAsrMicrophoneGone": (
        {'edge_asr_microphone_up{source="hall"}': "1x100 0x20"}, {'edge_asr_microphone_up{source="hall"}': "1x116 0x4"}
    ),
    "EdgeAsrMicrophoneGaps": (
        {'edge_asr_microphone_lost_seconds_total{source="hall"}': "0+0.2x120"},
        {'edge_asr_microphone_lost_seconds_total{source="hall"}': "0+0.01x120"},
    ),
    "EdgeAsrMicrophoneClips": (
        {'edge_asr_microphone_clipped_ratio{source="hall"}': "0.02x120"},
        {'edge_asr_microphone_clipped_ratio{source="hall"}': "0.001x120"},
    ),
    "EdgeAsrRefuses": (
        {'edge_asr_requests_refused_total{reason="wait"}': "0+1x120"},
        {'edge_asr_requests_refused_total{reason="wait"}': "0+1x90 90x30"},
    ),
    "EdgeAsrBusy": ({"edge_asr_inference_seconds_total": "0+55x120"}, {"edge_asr_inference_seconds_total": "0+30x120"}),
    "EdgeAsrSlowedDown": ({"edge_asr_throttled": "1x120"}, {"edge_asr_throttled": "0x120"}),
}  # fmt: skip
METRIC = re.compile(r"edge_asr_\w+")


def known_metrics() -> set[str]:
    families = list(REGISTRY.collect())
    names = {sample.name for family in families for sample in family.samples} | {family.name for family in families}
    # There only once there is such a microphone, sensor or transcript.
    microphone = {f"edge_asr_microphone_{name}" for name in ("up", "lost_seconds_total", "clipped_ratio")}
    device = {f"edge_asr_{name}" for name in ("throttled", "temperature_celsius", "power_watts")}
    return names | microphone | device | {f"edge_asr_stage_seconds_{kind}" for kind in ("sum", "count")}


@pytest.fixture(scope="module")
def promtool() -> str:
    return _program("promtool")


def _program(name: str) -> str:
    if (found := find_program(name)) is None:
        pytest.skip(f"not installed: {name} (Debian: apt install prometheus)")
    return found


def test_every_alert_is_tested_and_counts_what_there_is() -> None:
    assert CASES.keys() == ALERTS.keys()
    assert set(METRIC.findall(RULES.read_text(encoding="utf-8"))) <= known_metrics()


def test_rules_and_configuration_are_sound(promtool: str) -> None:
    for what, file in (("rules", RULES), ("config", FOLDER / "prometheus.yml")):
        result = subprocess.run([promtool, "check", what, file], capture_output=True, text=True, timeout=PATIENCE_S)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_fires_on_what_it_is_for(alert: str, promtool: str, tmp_path: Path) -> None:
    def case(series: dict[str, str], fires: bool) -> dict[str, Any]:
        sample = [{"series": name, "values": values} for name, values in series.items()]
        counted = {"expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)', "eval_time": "2h"}
        wanted = [{"labels": "{}", "value": int(fires)}]
        return {"interval": "1m", "input_series": sample, "promql_expr_test": [{**counted, "exp_samples": wanted}]}

    fires, quiet = CASES[alert]
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "tests": [case(fires, True), case(quiet, False)]}))
    result = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stdout + result.stderr


class Prometheus:
    """A real one that looks every 200 ms, and whose alerts do not wait."""

    def __init__(self, folder: Path, port: int) -> None:
        rules = re.sub(r"for: \w+", "for: 0s", RULES.read_text(encoding="utf-8"))
        (folder / "rules.yml").write_text(re.sub(r"\[\w+\]", "[3s]", rules), encoding="utf-8")
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms", "scrape_timeout": "200ms"}
        config["rule_files"] = ["rules.yml"]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self._log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            [_program("prometheus"), "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{self.port}",
             "--storage.tsdb.path=data"],
            cwd=folder, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=PATIENCE_S) as answer:
            return json.load(answer)["data"]

    def firing(self) -> set[str]:
        return {one["labels"]["alertname"] for one in self.get("alerts")["alerts"] if one["state"] == "firing"}

    def is_up(self) -> bool:
        try:
            return [target["health"] for target in self.get("targets")["activeTargets"]] == ["up"]
        except OSError:
            return False

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self._log.close()


@contextmanager
def watched(folder: Path, port: int) -> Iterator[Prometheus]:
    prometheus = Prometheus(folder, port)
    try:
        wait_for(prometheus.is_up, "the first look")
        yield prometheus
    finally:
        prometheus.stop()


def fires(prometheus: Prometheus, alert: str) -> None:
    wait_for(lambda: alert in prometheus.firing(), f"{alert} to fire")


def test_the_dashboard_asks_for_what_there_is(promtool: str, tmp_path: Path) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {metric for expression in asked for metric in METRIC.findall(expression)} <= known_metrics()
    for variable, stands_for in (("$__rate_interval", "1m"), ("$instance", ".*")):
        asked = [expression.replace(variable, stands_for) for expression in asked]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(asked)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    result = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_real_prometheus_sees_the_broker_go_and_then_the_appliance(
    broker: Mosquitto, promtool: str, tmp_path: Path
) -> None:
    with serving(mqtt={"enabled": True, "port": broker.port}) as server:
        wait_for(lambda: server.service.ready, "the model")
        with watched(tmp_path, server.port) as prometheus:
            query = "query?query=edge_asr_state%7Bstate%3D%22ready%22%7D"
            wait_for(lambda: [one["value"][1] for one in prometheus.get(query)["result"]] == ["1"], "that it is ready")
            assert prometheus.firing() == set()
            broker.kill()
            fires(prometheus, "EdgeAsrBrokerAway")
            server.loop.call_soon_threadsafe(server.daemon.stop)
            fires(prometheus, "EdgeAsrDown")


def test_a_real_prometheus_sees_that_it_is_degraded(
    promtool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "RETRY_S", (3600.0, 3600.0))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with serving(funasr={"port": port}, taken=frozenset({"funasr"})) as server:
            wait_for(lambda: server.service.ready, "the model")
            with watched(tmp_path, server.port) as prometheus:
                fires(prometheus, "EdgeAsrDegraded")
                assert prometheus.firing() == {"EdgeAsrDegraded"}


def test_a_real_prometheus_sees_late_transcripts(broker: Mosquitto, promtool: str, tmp_path: Path) -> None:
    """Every answer of the engine is too late: the budget is a millisecond."""
    make_tape(tmp_path / "tape.wav", bundled_sentences(), 30)
    source = {"kind": "file", "path": str(tmp_path / "tape.wav"), "realtime": True}
    with serving(mqtt={"enabled": True, "port": broker.port}, budget={"response_ms": 1}, sources=[source]) as server:
        wait_for(lambda: server.service.ready, "the model")
        with watched(tmp_path, server.port) as prometheus:
            fires(prometheus, "EdgeAsrLate")
