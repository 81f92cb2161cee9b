"""Alert rules: each of them fires on what it is for, and only on that, on made-up series."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bundled import REPOSITORY
from mosquitto import PATIENCE_S
from prometheus import ALERTS, FOLDER, RULES, program
from prometheus_client import REGISTRY

from edge_asr import metrics  # noqa: F401 - they are in the registry

DASHBOARD = REPOSITORY / "deploy" / "grafana" / "edge_asr.json"
TENSORRT = '{engine="tensorrt-fp16"}'
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
        {f"edge_asr_engine{TENSORRT}": "0x120", f"edge_asr_engine_steps_down_total{TENSORRT}": "1x120"},
        {f"edge_asr_engine{TENSORRT}": "0x80 1x40", f"edge_asr_engine_steps_down_total{TENSORRT}": "0x20 1x100"},
    ),
    "EdgeAsrMicrophoneGone": (
        {'edge_asr_microphone_up{source="hall"}': "1x100 0x20"},
        {'edge_asr_microphone_up{source="hall"}': "1x116 0x4", 'edge_asr_microphone_up{source="muted"}': "NaN " * 120},
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
    return program("promtool")


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
