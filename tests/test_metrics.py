"""/metrics: what is counted while the appliance hears, is asked and fails; and that Prometheus takes it."""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bundled import BUNDLE, REPOSITORY, recording, transcripts
from mosquitto import PATIENCE_S, Mosquitto, find_program, wait_for
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from speech_server import Serving, serving

from edge_asr.metrics import DEVICE, STATES
from edge_asr.serve.access import hash_of

NAME, TEXT = min(transcripts().items())


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as one:
        wait_for(lambda: one.service.ready, "the model")
        yield one


def ask(server: Serving, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def scraped(server: Serving) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return each sample by its name and labels."""
    status, text = ask(server, "GET", "/metrics")
    assert status == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(server: Serving, name: str, **labels: str) -> float:
    return scraped(server).get((name, tuple(sorted(labels.items()))), 0.0)


def test_a_request_is_counted_with_its_sound_and_where_its_time_went(server: Serving) -> None:
    before = scraped(server)
    status, answer = ask(server, "POST", "/recognize", recording(NAME).read_bytes(), **{"Content-Type": "audio/wav"})
    assert (status, json.loads(answer)["text"]) == (200, TEXT)
    after = scraped(server)

    def grown(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert grown("edge_asr_request_seconds_count") == 1
    assert grown("edge_asr_recognized_audio_seconds_total") == pytest.approx(json.loads(answer)["duration"], abs=0.001)
    assert 0 < grown("edge_asr_inference_seconds_total") < PATIENCE_S
    assert grown("edge_asr_batch_segments_sum") == grown("edge_asr_batch_segments_count") == 1
    for stage in ("queue", "features", "encoder", "cif", "decoder"):
        assert grown("edge_asr_stage_seconds_count", surface="http", stage=stage) == 1
    assert after[("edge_asr_requests_in_progress", ())] == 0


def test_it_says_how_the_appliance_is(server: Serving) -> None:
    wait_for(lambda: value(server, "edge_asr_state", state="ready") == 1, "the state")
    assert [value(server, "edge_asr_state", state=state) for state in STATES] == [0, 1, 0]
    assert value(server, "edge_asr_model_info", model=BUNDLE.name) == 1
    assert np.isnan(value(server, "edge_asr_broker_up"))
    assert value(server, "edge_asr_waiting_requests") == 0


def test_a_broker_that_goes_is_seen(broker: Mosquitto) -> None:
    with serving(mqtt={"enabled": True, "port": broker.port}) as server:
        wait_for(lambda: value(server, "edge_asr_broker_up") == 1, "the broker")
        broker.kill()
        wait_for(lambda: value(server, "edge_asr_broker_up") == 0, "that it has gone")


def test_what_needs_a_token_needs_it_here_too() -> None:
    token = "t" * 32
    with serving(http={"tokens": (hash_of(token),)}) as server:
        assert ask(server, "GET", "/metrics")[0] == 401
        assert ask(server, "GET", "/metrics", Authorization=f"Bearer {token}")[0] == 200


def test_openmetrics_is_spoken_where_it_is_asked_for(server: Serving) -> None:
    status, text = ask(server, "GET", "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert status == 200
    assert text.endswith(b"# EOF\n")


@pytest.fixture(scope="module")
def promtool() -> str:
    if (found := find_program("promtool")) is None:
        pytest.skip("not installed: promtool (Debian: apt install prometheus)")
    return found


def test_prometheus_finds_no_fault_with_names_and_units(server: Serving, promtool: str, tmp_path: Path) -> None:
    _, text = ask(server, "GET", "/metrics")
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=PATIENCE_S)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_the_page_names_every_metric() -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    ours = {family.name for family in REGISTRY.collect() if family.name.startswith("edge_asr_")}
    device = {name for name in ours if name in {family.name for family in DEVICE.collect()}}
    assert [name for name in sorted(ours - device) if f"`{name}" not in page] == []
