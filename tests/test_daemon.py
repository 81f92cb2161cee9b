"""The daemon as a process of its own, on a real Mosquitto that is read with the real mosquitto_sub."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled import BUNDLE, recording, sound_of, write_wav
from daemons import SENTENCES, TEXTS, Start, is_offline, is_ready, spoken, states, statuses, texts_on
from mosquitto import PATIENCE_S, Door, Mosquitto, Subscriber, free_port, wait_for
from prometheus_client import REGISTRY

from edge_asr import app, ladder
from edge_asr.answers import Labels, transcript_of
from edge_asr.config import Config, SegmentConfig
from edge_asr.config_reader import load_config
from edge_asr.errors import EdgeAsrError, EngineError
from edge_asr.publish.outbox import MemoryOutbox
from edge_asr.types import (
    CHUNK_SAMPLES,
    SAMPLE_RATE,
    TRANSCRIPT_SCHEMA,
    Marks,
    Recognition,
    Samples,
    Segment,
    Token,
    Transcript,
    new_segment_id,
)

NAMES = list(TEXTS)
BASE = "edge_asr/hall"
WIRE_KEYS = {
    *("schema", "id", "seq", "device", "source", "text", "text_itn", "text_raw", "language", "confidence", "start"),
    *("end", "offset_s", "time_synced", "duration_s", "tokens", "latency_ms", "within_budget", "decoded_at_pause"),
    *("enforced", "model", "engine", "replayed", "age_s"),
}
STATE_KEYS = {
    *("device_id", "state", "why", "engine", "model", "sources", "mute", "preset", "listen", "budget"),
    *("outbox", "device", "broker", "version"),
}


@pytest.fixture
def door(broker: Mosquitto) -> Iterator[Door]:
    """Yield an open door in front of the broker."""
    door = Door(broker.port)
    door.open()
    yield door
    door.shut()


def played(*names: str) -> list[str]:
    return [part for name in names for part in ("--source", str(recording(name)))]


def check_transcript(payload: dict[str, Any], began_at: datetime) -> None:
    """Assert that a live transcript has every key of the wire contract, with a plausible value."""
    assert set(payload) - {"event_type"} == WIRE_KEYS
    name = Path(payload["source"]).name
    assert payload["schema"] == TRANSCRIPT_SCHEMA
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", payload["id"])
    assert payload["source"] == f"file:{recording(name)}"
    assert payload["text"] == payload["text_raw"] == "".join(t["text"] for t in payload["tokens"]) == TEXTS[name]
    assert (payload["device"], payload["model"], payload["engine"]) == ("hall", BUNDLE.name, "onnx-fp32")
    assert 0.3 < payload["confidence"] <= 1
    start, end = (datetime.fromisoformat(payload[key].replace("Z", "+00:00")) for key in ("start", "end"))
    assert began_at < start < end < datetime.now(timezone.utc)
    assert (end - start).total_seconds() == pytest.approx(payload["duration_s"], abs=0.002)
    assert 0 <= payload["offset_s"] < 2
    trace = payload["latency_ms"]
    stages = {"capture", "queue", "features", "encoder", "cif", "decoder", "outbox"}
    assert set(trace) == {"endpoint", *stages, "response", "total"}
    assert trace["endpoint"] > 250, "the default preset waits for 384 ms after what the detector takes for the end"
    assert trace["total"] == pytest.approx(trace["endpoint"] + trace["response"], abs=0.1)
    assert payload["within_budget"] is (trace["response"] <= 300)
    assert payload["decoded_at_pause"] is True
    assert (payload["replayed"], payload["seq"]) in [(False, 1), (False, 2), (False, 3)]
    assert 0 <= payload["age_s"] < 5


def test_samples_played_in_real_time_arrive_once_on_said_and_once_on_transcript(
    broker: Mosquitto, start: Start
) -> None:
    names = NAMES[:3]
    with Subscriber(broker.port) as subscriber:
        began_at = datetime.now(timezone.utc)
        daemon = start(broker.port, *played(*names))
        assert daemon.end() == 0, daemon.log
        subscriber.wait_for(is_offline, "offline")
        assert statuses(subscriber) == ["online", "offline"]
        assert states(subscriber) == ["starting", "ready"]
        for topic in ("said", "transcript"):
            assert sorted(texts_on(subscriber, topic)) == sorted(TEXTS[name] for name in names)
        for message in [*subscriber.on("said"), *subscriber.on("transcript")]:
            assert message.topic == f"{BASE}/{'said' if 'event_type' in message.json else 'transcript'}"
            assert not message.retained
            check_transcript(message.json, began_at)
        assert {message.json.get("event_type") for message in subscriber.on("said")} == {"said"}
        assert {message.qos for message in subscriber.on("said")} == {0}
        assert {message.qos for message in subscriber.on("transcript")} == {1}
        ids = [{m.json["id"] for m in subscriber.on(topic)} for topic in ("said", "transcript")]
        assert ids[0] == ids[1]
        assert len(ids[0]) == len(names)
    with Subscriber(broker.port) as late:
        late.wait_for(lambda s: s.on("state") and s.on("status"), "what is retained")
        assert {message.topic for message in late.messages} == {f"{BASE}/state", f"{BASE}/status"}


def test_state_names_model_engine_and_the_health_of_every_source(broker: Mosquitto, start: Start) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *played(NAMES[0]))
        assert daemon.end() == 0
        subscriber.wait_for(is_offline, "offline")
        assert all(set(message.json) == STATE_KEYS for message in subscriber.on("state"))
        first, last = subscriber.on("state")[0].json, subscriber.on("state")[-1].json
        assert (first["state"], first["sources"]) == ("starting", [])
        assert (last["model"], last["engine"], last["preset"]) == (BUNDLE.name, "onnx-fp32", "default")
        assert last["sources"] == [{"name": f"file:{recording(NAMES[0])}", "health": "ended", "why": ""}]
        assert first["budget"] == {"response_ms": 300, "count": 0, "late": 0, "p50": None, "p95": None, "p99": None}
        [said] = subscriber.on("said")
        response = said.json["latency_ms"]["response"]
        percentiles = {"p50": response, "p95": response, "p99": response}
        assert last["budget"] == {"response_ms": 300, "count": 1, "late": int(response > 300), **percentiles}


def test_the_log_names_broker_topics_and_sources_but_at_info_no_spoken_text(broker: Mosquitto, start: Start) -> None:
    daemon = start(broker.port, *played(NAMES[0]), "-o", "log.level=INFO")
    assert daemon.end() == 0
    assert f"publishing on {BASE}/... at 127.0.0.1:{broker.port}" in daemon.log
    assert f"listening to file:{recording(NAMES[0])}" in daemon.log
    assert not any(character in daemon.log for character in TEXTS[NAMES[0]])


def test_a_pipe_that_closes_ends_the_daemon_with_everything_published(broker: Mosquitto, start: Start) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", "stdin")
        subscriber.wait_for(is_ready, "ready")
        daemon.process.communicate(spoken(SENTENCES[0]) + spoken(SENTENCES[1]), PATIENCE_S)
        assert daemon.process.returncode == 0, daemon.log
        subscriber.wait_for(is_offline, "offline")
        assert texts_on(subscriber, "said") == texts_on(subscriber, "transcript") == SENTENCES[:2]
        assert {message.json["source"] for message in subscriber.on("said")} == {"stdin"}


@pytest.mark.parametrize("sources", [[], ["--source", "stdin"]], ids=["no sources", "a silent pipe"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_ends_within_two_seconds(
    broker: Mosquitto, start: Start, sources: list[str], how: signal.Signals
) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *sources)
        subscriber.wait_for(is_ready, "ready")
        assert daemon.stop(how) == 0
        subscriber.wait_for(is_offline, "offline")
        assert daemon.complaints == []
    with Subscriber(broker.port) as late:
        late.wait_for(is_offline, "the retained status")


@pytest.mark.parametrize("sources", [[], ["--source", "stdin"]], ids=["no sources", "a silent pipe"])
def test_an_idle_daemon_ends_within_two_seconds_while_the_broker_is_absent(start: Start, sources: list[str]) -> None:
    daemon = start(free_port(), *sources)
    daemon.wait_for("listening to")
    daemon.wait_for("no connection to the broker")
    assert daemon.stop() == 0
    assert daemon.complaints == []


def test_an_idle_daemon_ends_within_two_seconds_while_the_broker_hangs(broker: Mosquitto, start: Start) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", "stdin")
        subscriber.wait_for(is_ready, "ready")
    broker.freeze()
    assert daemon.stop() == 0
    assert daemon.complaints == []


def test_a_daemon_that_is_still_loading_ends_within_two_seconds(broker: Mosquitto, start: Start) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", "stdin")
        subscriber.wait_for(lambda s: "starting" in states(s), "starting")
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")


BUILDING = """
import sys
from pathlib import Path
from edge_asr import child, cli

pid = Path(sys.argv.pop(1))
child._command = lambda *given: ["sh", "-c", f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60"]
cli.main()
"""


def test_a_daemon_whose_engine_is_being_built_says_so_and_takes_the_build_with_it(
    broker: Mosquitto, start: Start, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", "stdin", "-o", f"state_dir={tmp_path / 'state'}",
                       program=("-c", BUILDING, str(pid)))  # fmt: skip
        wait_for(pid.exists, "the build")
        built = "its engine is being built"
        subscriber.wait_for(
            lambda s: any(state.json["why"] == built for state in s.on("state")), "that it is being built"
        )
        state = subscriber.on("state")[-1].json
        assert (state["state"], state["why"]) == ("starting", built)
        assert daemon.stop() == 0
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
        assert daemon.complaints == []
        assert "runs whole" not in daemon.log
        subscriber.wait_for(is_offline, "offline")


def test_a_daemon_that_plays_a_file_ends_within_two_seconds_too(broker: Mosquitto, start: Start) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *played(NAMES[1]))
        subscriber.wait_for(is_ready, "ready")
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")


ENDLESS = """
import sys
from edge_asr import app, cli, ladder

class Endless:
    batches = False
    largest_batch = 1

    def __init__(self, recognizer):
        self.recognizer, self.engine = recognizer, recognizer.engine

    def recognize(self, samples):
        if len(samples) in (16_000, 128_000):  # noise, while it is loaded: what does that cost?
            return self.recognizer.recognize(samples)
        print("inference begins", file=sys.stderr, flush=True)
        while True:
            self.recognizer.recognize(samples[:4000])

load = ladder.load_recognizer
ladder.load_recognizer = lambda *given: Endless(load(*given))
cli.main()
"""


def test_an_inference_without_end_holds_the_stop_up_no_longer_than_drain_s(broker: Mosquitto, start: Start) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *played(NAMES[0]), "-o", "sources.0.realtime=false", "-o", "drain_s=0",
                       program=("-c", ENDLESS))  # fmt: skip
        daemon.wait_for("inference begins")
        assert daemon.stop() == 0
        assert "the inference under way takes too long and is abandoned" in daemon.log
        assert daemon.complaints == []
        subscriber.wait_for(is_offline, "offline")


def test_a_second_signal_ends_a_daemon_that_waits_for_a_hanging_broker(broker: Mosquitto, start: Start) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", "stdin", "-o", "log.level=DEBUG", "-o", "drain_s=300")
        subscriber.wait_for(is_ready, "ready")
        broker.freeze()
        daemon.hears(SENTENCES[0])
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_for("stopping")
        assert daemon.stop() == -signal.SIGTERM


def test_a_signal_ends_the_waiting_for_a_broker_that_never_comes(start: Start) -> None:
    daemon = start(free_port(), *played(NAMES[0]), "-o", "sources.0.realtime=false", "-o", "drain_s=300",
                   "-o", "log.level=DEBUG")  # fmt: skip
    daemon.wait_for(SENTENCES[0])
    assert daemon.stop() == 0
    assert "1 transcripts wait in the outbox for the next start" in daemon.log


def test_sentences_spoken_while_the_broker_is_away_are_recorded_later_but_never_said(
    broker: Mosquitto, door: Door, start: Start
) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(door.port, "--source", "stdin", "-o", "log.level=DEBUG")
        subscriber.wait_for(is_ready, "ready")
        daemon.hears(SENTENCES[0])
        subscriber.wait_for(lambda s: s.on("said") and s.on("transcript"), "the first sentence")
    broker.kill()
    daemon.wait_for("no connection to the broker")
    for sentence in SENTENCES[1:3]:
        daemon.hears(sentence)
    door.shut()
    broker.start()
    with Subscriber(broker.port) as subscriber:
        door.open()
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 2, "what was spoken meanwhile")
        assert statuses(subscriber) == ["online"]
        assert is_ready(subscriber)
        daemon.hears(SENTENCES[3])
        subscriber.wait_for(lambda s: s.on("said") and len(s.on("transcript")) == 3, "the last sentence")
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")
        assert texts_on(subscriber, "said") == [SENTENCES[3]]
        assert texts_on(subscriber, "transcript") == SENTENCES[1:4]
        records = [message.json for message in subscriber.on("transcript")]
        assert [record["replayed"] for record in records] == [True, True, False]
        assert records[0]["age_s"] >= records[1]["age_s"] > records[2]["age_s"]
        offsets = [record["offset_s"] for record in records]
        assert offsets == sorted(offsets), "the source went on all the time"


def test_a_daemon_that_starts_before_its_broker_connects_when_it_appears(
    tmp_path: Path, mosquitto_installed: None, start: Start
) -> None:
    broker = Mosquitto(tmp_path)
    door = Door(broker.port)
    daemon = start(door.port, "--source", "stdin", "-o", "log.level=DEBUG")
    daemon.wait_for("no connection to the broker")
    daemon.hears(SENTENCES[0])
    broker.start()
    try:
        with Subscriber(broker.port) as subscriber:
            door.open()
            subscriber.wait_for(lambda s: s.on("transcript"), "the sentence spoken before")
            assert subscriber.on("transcript")[0].json["replayed"] is True
            daemon.hears(SENTENCES[1])
            subscriber.wait_for(lambda s: s.on("said"), "the sentence spoken after")
            assert daemon.stop() == 0
            subscriber.wait_for(is_offline, "offline")
            assert statuses(subscriber) == ["online", "offline"]
            assert texts_on(subscriber, "said") == [SENTENCES[1]]
            assert texts_on(subscriber, "transcript") == SENTENCES[:2]
    finally:
        door.shut()
        broker.kill()


def test_without_a_broker_files_end_with_the_number_of_transcripts_not_delivered(start: Start) -> None:
    port = free_port()
    began_at = time.monotonic()
    daemon = start(port, *played(NAMES[0]), "-o", "sources.0.realtime=false", "-o", "drain_s=1")
    assert daemon.end() == 1
    assert time.monotonic() - began_at > 1, "it waited for the broker"
    assert daemon.complaints == [
        f"edge-asr: transcripts not delivered to the broker at 127.0.0.1:{port}: 1,"
        " which wait in the outbox for the next start; is it running?"
    ]


def test_what_the_broker_did_not_get_comes_with_the_next_start_and_is_no_command(
    broker: Mosquitto, start: Start, tmp_path: Path
) -> None:
    options = ["-o", f"outbox.file={tmp_path / 'kept' / 'outbox.sqlite3'}", "-o", "drain_s=0.2"]
    fast = [part for k in range(2) for part in ("-o", f"sources.{k}.realtime=false")]
    assert start(free_port(), *options, *played(*NAMES[:2]), *fast).end() == 1
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *options)
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 2, "what was kept")
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")
        found = [message.json for message in subscriber.on("transcript")]
        assert sorted(one["text"] for one in found) == sorted(SENTENCES[:2])
        assert [one["seq"] for one in found] == [1, 2]
        assert all(one["replayed"] and one["age_s"] > 0 for one in found)
        assert subscriber.on("said") == []
        outbox = subscriber.on("state")[-1].json["outbox"]
        assert (outbox["rows"], outbox["last_seq"], outbox["trouble"]) == (2, 2, "")


def test_an_outbox_in_use_and_a_disk_that_does_not_play_along_are_told(
    broker: Mosquitto, start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "outbox.sqlite3"
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "-o", f"outbox.file={file}")
        subscriber.wait_for(is_ready, "ready")
        second = start(broker.port, "-o", f"outbox.file={file}")
        assert second.end() == 2
        [line] = second.complaints
        assert f"{file} is in use by process {daemon.process.pid}" in line
        assert daemon.stop() == 0
    (tmp_path / "file").touch()
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", "stdin", "-o", f"outbox.file={tmp_path / 'file' / 'outbox.sqlite3'}")
        subscriber.wait_for(lambda s: states(s)[-1:] == ["degraded"], "degraded")
        state = subscriber.on("state")[-1].json
        assert state["outbox"]["trouble"]
        assert state["outbox"]["trouble"] in state["why"]
        daemon.is_told(SENTENCES[0])
        subscriber.wait_for(lambda s: s.on("said") and s.on("transcript"), "it listens all the same")
        assert subscriber.on("transcript")[0].json["seq"] is None
        assert daemon.stop() == 0


def test_a_missing_file_leaves_the_other_source_alone_and_is_reported(
    broker: Mosquitto, start: Start, tmp_path: Path
) -> None:
    missing = tmp_path / "missing.wav"
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", str(missing), *played(NAMES[0]))
        assert daemon.end() == 2
        subscriber.wait_for(is_offline, "offline")
        assert texts_on(subscriber, "said") == texts_on(subscriber, "transcript") == [TEXTS[NAMES[0]]]
        state = subscriber.on("state")[-1].json
        why = f"{missing}: no such file; check the path"
        assert (state["state"], state["why"]) == ("degraded", f"file:{missing} failed: {why}")
        assert [source["why"] for source in state["sources"]] == [why, ""]
        assert [source["health"] for source in state["sources"]] == ["failed", "ended"]
    assert daemon.complaints == [f"edge-asr: {missing}: no such file; check the path"]


def test_a_damaged_model_is_one_line_and_leaves_the_status_offline(
    broker: Mosquitto, start: Start, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE, bundle, ignore=shutil.ignore_patterns("samples", "model_quant.onnx"))
    os.truncate(bundle / "model.onnx", 1_000_000)
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--model", str(bundle))
        assert daemon.end() == 3
        [line] = daemon.complaints
        assert line.startswith(f"edge-asr: {bundle / 'model.onnx'}: ")
        subscriber.wait_for(is_offline, "offline")
        assert states(subscriber) == ["starting"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "pattern"),
    [
        (["--model", "/nonexistent/model"], 3, "/nonexistent/model: no such folder.*--model.*"),
        (["-o", "segment.preset=slow"], 2, "-o segment.preset: should be 'aggressive', 'default' or 'relaxed'.*"),
        (["--source", "stdin", "--source", "stdin"], 2, ".*standard input can be a source only once.*"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_starts(
    start: Start, arguments: list[str], exit_code: int, pattern: str
) -> None:
    daemon = start(free_port(), *arguments)
    assert daemon.end() == exit_code
    assert re.fullmatch(f"edge-asr: {pattern}\n", daemon.log), daemon.log


# In this process: the composition root on a recogniser that does as it is told


class Scripted:
    """A recogniser that answers, or fails; it keeps the lengths of what it was asked for."""

    engine = "scripted"
    batches = False
    largest_batch = 1

    def __init__(self, error: EngineError | None = None) -> None:
        self._error = error
        self.lengths: list[int] = []

    def recognize(self, samples: Samples) -> Recognition:
        self.lengths.append(len(samples))
        if self._error is not None:
            raise self._error
        return Recognition("好", (Token("好", None, None, 1.0),), 1.0)

    def close(self) -> None:
        pass


@pytest.fixture
def recognizer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scripted], Scripted]:
    """Return what puts a recogniser in the place of the bundled one."""

    def use(scripted: Scripted) -> Scripted:
        monkeypatch.setattr(ladder, "load_recognizer", lambda *given: scripted)
        return scripted

    return use


def configured(port: int, *overrides: str, files: Sequence[str] = NAMES[:2]) -> Config:
    """Return a configuration that plays files as fast as it goes."""
    sources = [{"kind": "file", "path": str(recording(name))} for name in files]
    fast = [f"sources.{k}.realtime=false" for k in range(len(files))]
    alone = ["outbox.enabled=false", "home_assistant.enabled=false", "device_id=hall"]
    return load_config(None, [*fast, *alone, f"mqtt.port={port}", *overrides], {}, sources=sources)


async def failure_of(daemon: app.Daemon) -> tuple[EdgeAsrError, list[str]]:
    """Return what a daemon raises when its files have ended, and all that it holds to have failed."""
    async with daemon.running():
        with pytest.raises(EdgeAsrError) as raised:
            await asyncio.wait_for(daemon.finished(), PATIENCE_S)
    return raised.value, [str(failure) for failure in daemon._failures]


async def test_segments_that_the_engine_failed_on_are_a_failure(recognizer: Callable[[Scripted], Scripted]) -> None:
    recognizer(Scripted(EngineError("on purpose")))
    error, _ = await failure_of(app.Daemon(configured(1883, "mqtt.enabled=false")))
    assert str(error) == "segments lost because the engine failed on them: 2; see the log"
    assert error.exit_code == 1


async def test_transcripts_dropped_for_want_of_room_are_a_failure(
    recognizer: Callable[[Scripted], Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    recognizer(Scripted())
    monkeypatch.setattr(app, "MemoryOutbox", functools.partial(MemoryOutbox, limit=1))
    error, failures = await failure_of(app.Daemon(configured(free_port(), "drain_s=0.2")))
    assert "transcripts dropped before the broker had them: 1; is it running and fast enough?" in failures
    assert error.exit_code == 1


@pytest.mark.parametrize("marks", [None, Marks(10.0, 10.4)], ids=["played fast", "live"])
def test_only_what_came_in_live_is_held_against_the_budget(marks: Marks | None) -> None:
    daemon = app.Daemon(configured(1883, "mqtt.enabled=false"))
    segment = Segment(new_segment_id(), 0, np.zeros(SAMPLE_RATE, np.float32), 0, 1.0, None, marks)
    labels = Labels("hall", "stdin", "test")
    before = [REGISTRY.get_sample_value(f"edge_asr_{name}") or 0 for name in ("response_seconds_count", "late_total")]
    settled = daemon._settle(transcript_of(segment, Recognition("好", (), 1.0), labels))
    after = [REGISTRY.get_sample_value(f"edge_asr_{name}") or 0 for name in ("response_seconds_count", "late_total")]
    live = int(marks is not None)
    assert [now - then for now, then in zip(after, before, strict=True)] == [live, live]
    assert settled.within_budget is (False if live else None)
    assert ("response" in settled.latency_ms) is bool(live)
    assert (daemon._responses.percentiles()["p50"] is not None) is bool(live)


@pytest.mark.parametrize("max_s", [8.0, 8.5, 29.984, 30.0])
def test_a_segment_may_have_max_s_to_the_last_sample(max_s: float) -> None:
    samples = app.segment_rules(SegmentConfig(max_s=max_s)).max_length * CHUNK_SAMPLES
    assert max_s * SAMPLE_RATE <= samples < max_s * SAMPLE_RATE + CHUNK_SAMPLES


def test_a_file_of_exactly_max_s_is_decoded_whole(tmp_path: Path, recognizer: Callable[[Scripted], Scripted]) -> None:
    length = 30 * SAMPLE_RATE
    scripted = recognizer(Scripted())
    path = write_wav(tmp_path / "long.wav", np.resize(sound_of(NAMES[0]), length))
    [(_, transcript)] = app.transcribe_files(configured(1883), [str(path)])
    assert isinstance(transcript, Transcript)
    assert scripted.lengths == [length]
