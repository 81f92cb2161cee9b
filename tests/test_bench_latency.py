"""`edge-asr bench latency`: a replay through the real broker, and what its figures are made of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled import BUNDLE, recording, sound_of, transcripts, write_wav
from mosquitto import PATIENCE_S, wait_for

from edge_asr.audio.decode import read
from edge_asr.bench import tape as tapes_of
from edge_asr.bench.tape import Tape, record, record_all, until_its_end
from edge_asr.bench.verdict import Counts, judge, place
from edge_asr.cli import main
from edge_asr.errors import EngineError
from edge_asr.ladder import Ladder
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Recognition, Samples

TEXTS = transcripts()
SHORT, LONG = "03.wav", "01.wav"
SPREADS = ("endpoint_ms", "response_ms", "total_ms", "end_error_ms")
KEYS = {
    "count", "late", "lost", "empty", "cut", "texts", "differing", *SPREADS, "stages", "decoded_at_pause", "enforced",
    "streams", "preset", "content_endpointing", "response_budget_ms", "model", "engine", "threads", "broker",
    "clients", "client_requests", "client_requests_cut",
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests short: still more than the longest pause."""
    monkeypatch.setattr(tapes_of, "GAP_S", 1.1)


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "latency", "--model", str(BUNDLE), *arguments])
    return int(str(ended.value.code))


@pytest.fixture
def muted(state_folder: Path) -> Iterator[None]:
    """Let the appliance whose machine this is be muted, and have another preset: no matter for a bench."""
    chosen = state_folder / "controls.json"
    chosen.write_text('{"mute": true, "preset": "relaxed"}', encoding="utf-8")
    yield
    chosen.unlink()


# The command


def test_every_file_is_played_on_every_stream(capsys: pytest.CaptureFixture[str], mosquitto_installed: None) -> None:
    files = [str(recording(name)) for name in (SHORT, LONG)]
    assert bench("--preset", "aggressive", "--streams", "2", *files, files[0], "--json") == 0
    [line] = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert set(figures) == KEYS
    assert (figures["count"], figures["lost"], figures["empty"], figures["cut"]) == (4, 0, 0, 0)
    assert figures["texts"] == {str(recording(name)): TEXTS[name] for name in (SHORT, LONG)}
    assert figures["differing"] == []
    for spread in (*(figures[name] for name in SPREADS), *figures["stages"].values()):
        assert list(spread) == ["p50", "p95", "p99", "max"]
        assert spread["p50"] <= spread["p95"] <= spread["p99"] <= spread["max"]
    assert {"queue", "features", "encoder", "decoder"} <= set(figures["stages"])
    assert (figures["streams"], figures["preset"], figures["content_endpointing"]) == (2, "aggressive", True)
    assert (figures["model"], figures["engine"], figures["broker"]) == ("paraformer-tiny", "onnx-fp32", "mosquitto")
    assert abs(figures["end_error_ms"]["max"]) < 200  # the daemon finds the end where it is known to be


def test_what_comes_late_is_counted_and_people_get_a_table(
    capsys: pytest.CaptureFixture[str], mosquitto_installed: None, muted: None
) -> None:
    assert bench("-o", "budget.response_ms=0.001", str(recording(SHORT))) == 0
    out, progress = capsys.readouterr()
    assert "1 transcripts, 1 late, 0 lost, 0 empty" in out
    assert "paraformer-tiny on onnx-fp32, 1 streams, preset default, content endpointing on" in out
    assert [line.split()[0] for line in out.splitlines()[3:8]] == ["ms", "endpoint", "response", "total", "end_error"]
    assert "replay: 0 % of" in progress


def test_what_the_engine_fails_on_is_lost_and_the_command_fails(
    capsys: pytest.CaptureFixture[str], mosquitto_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recognize, batch = Ladder.recognize, Ladder.recognize_batch

    def check(samples: Samples) -> None:
        if np.abs(samples).max() > 0.05:  # it is no trial run
            raise EngineError("on purpose")

    def recognize_some(ladder: Ladder, samples: Samples) -> Recognition:
        check(samples)
        return recognize(ladder, samples)

    def recognize_batch(ladder: Ladder, samples: Sequence[Samples]) -> list[Recognition]:
        for each in samples:
            check(each)
        return batch(ladder, samples)

    monkeypatch.setattr(Ladder, "recognize", recognize_some)
    monkeypatch.setattr(Ladder, "recognize_batch", recognize_batch)
    assert bench("--json", str(recording(SHORT))) == 1
    out, complaints = capsys.readouterr()
    figures = json.loads(out)
    assert (figures["count"], figures["lost"]) == (0, 1)
    assert figures["texts"] == {str(recording(SHORT)): ""}
    assert "edge-asr: segments lost because the engine failed on them: 1; see the log" in complaints


def test_clients_are_served_beside_the_streams(capsys: pytest.CaptureFixture[str], mosquitto_installed: None) -> None:
    assert bench("--json", "--clients", "2", str(recording(SHORT))) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["count"], figures["lost"], figures["clients"]) == (1, 0, 2)
    assert figures["client_requests"] >= 2
    assert figures["client_requests_cut"] <= figures["client_requests"]


def test_a_file_in_which_nobody_speaks_is_lost(
    capsys: pytest.CaptureFixture[str], mosquitto_installed: None, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).standard_normal(SAMPLE_RATE // 2).astype(np.float32) * 0.01
    assert bench("--json", str(write_wav(tmp_path / "noise.wav", noise))) == 1
    out, complaints = capsys.readouterr()
    figures = json.loads(out)
    assert (figures["count"], figures["lost"], figures["engine"]) == (0, 1, None)
    assert figures["total_ms"] == {"p50": None, "p95": None, "p99": None, "max": None}
    assert "edge-asr: 1 sentences were lost" in complaints


def test_a_file_that_is_none_is_said_before_anything_is_played(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("nowhere.wav") == 2
    out, complaint = capsys.readouterr()
    assert out == ""
    assert complaint.startswith("edge-asr: nowhere.wav: no such file")


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_replay_and_leaves_nothing_behind(
    tmp_path: Path, mosquitto_installed: None, how: signal.Signals
) -> None:
    temporary, log = tmp_path / "temporary", tmp_path / "log"
    temporary.mkdir()
    command = [sys.executable, "-m", "edge_asr", "bench", "latency", "--model", str(BUNDLE), str(recording(LONG))]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "TMPDIR": str(temporary)})
    try:
        wait_for(lambda: "replay: 0 %" in log.read_text("utf-8") or process.poll() is not None, "the replay")
        process.send_signal(how)
        assert process.wait(PATIENCE_S) == 130
    finally:
        process.kill()
        process.wait(PATIENCE_S)
    assert "Traceback" not in log.read_text("utf-8")
    assert list(temporary.iterdir()) == []


# The tape


@pytest.fixture
def tape(tmp_path: Path) -> Tape:
    """Return the tape of one stream with three recordings."""
    [made] = record_all(tmp_path, [str(recording(name)) for name in ("01.wav", "02.wav", "03.wav")], 1).values()
    return made


def test_streams_have_their_own_order_and_beginning_and_each_holds_everything(tmp_path: Path) -> None:
    sounds = {name: until_its_end(str(recording(name))) for name in TEXTS}
    first, second = (record(tmp_path / f"{k}.wav", sounds, k, 2) for k in range(2))
    assert [played.path for played in first.played] == list(sounds)
    assert {played.path for played in second.played} == set(sounds)
    assert [played.path for played in second.played] != list(sounds)
    assert first.played[0].start != second.played[0].start


def test_recordings_stand_on_the_tape_as_they_are_up_to_their_end(tape: Tape) -> None:
    played, sound = read(tape.path), sound_of("02.wav")
    second = tape.played[1]
    length = second.end - second.start
    assert 0 < length < len(sound)  # it ends in silence
    np.testing.assert_array_equal(played[second.start : second.end], sound[:length])
    assert np.abs(played[second.end : tape.played[2].start]).max() < 1e-3
    assert len(played) == tape.length


def test_silence_belongs_to_the_recording_that_is_nearer(tape: Tape) -> None:
    one, two, three = tape.played
    assert tape.at(0) is one
    assert tape.at(one.end + 1000) is one
    assert tape.at(two.start - 1000) is two
    assert tape.at((two.start + two.end) / 2) is two
    assert tape.at(tape.length) is three


def test_the_daemons_end_of_sound_is_found_as_it_finds_it(tape: Tape) -> None:
    played = tape.played[0]
    start = played.start // CHUNK_SAMPLES * CHUNK_SAMPLES
    found = tape.sound_ended(start, (played.end - start) // CHUNK_SAMPLES * CHUNK_SAMPLES + 4 * CHUNK_SAMPLES)
    assert abs(found - played.end) <= SAMPLE_RATE // 50


# The verdict


def message(number: int, tape: Tape, text: str = "好", **changed: Any) -> dict[str, Any]:
    """Return what a daemon would publish for a recording on a tape."""
    played = tape.played[number]
    start = (played.start - 4000) // CHUNK_SAMPLES * CHUNK_SAMPLES
    length = (played.end - start) // CHUNK_SAMPLES * CHUNK_SAMPLES + 6 * CHUNK_SAMPLES
    return {
        "id": str(number),
        "source": "s",
        "text": text,
        "offset_s": round(start / SAMPLE_RATE, 3),
        "duration_s": round(length / SAMPLE_RATE, 3),
        "latency_ms": {"endpoint": 400.0, "queue": 1.0, "response": 30.0, "total": 430.0},
        "within_budget": True,
        "decoded_at_pause": True,
        "enforced": [],
        **changed,
    }


def verdict(tape: Tape, events: list[dict[str, Any]], segments: float, empty: float = 0, cut: float = 0) -> Any:
    return judge(place(events, {"s": tape}), {"s": tape}, Counts(segments, empty, cut))


def test_a_message_that_comes_twice_counts_once(tape: Tape) -> None:
    events = [message(0, tape), message(1, tape), message(2, tape), message(1, tape)]
    figures = verdict(tape, events, segments=3)
    assert (figures["count"], figures["lost"], figures["cut"]) == (3, 0, 0)


def test_an_empty_segment_is_not_lost(tape: Tape) -> None:
    figures = verdict(tape, [message(0, tape), message(1, tape)], segments=3, empty=1)
    assert (figures["count"], figures["lost"], figures["empty"]) == (2, 0, 1)
    assert figures["texts"][tape.played[2].path] == ""


@pytest.mark.parametrize(
    ("segments", "cut", "why"),
    [(3, 0, "a segment whose message has not come"), (2, 0, "no segment"), (2, 1, "no segment, and one cut short")],
)
def test_what_has_not_arrived_is_lost(tape: Tape, segments: float, cut: float, why: str) -> None:
    events = [message(0, tape), message(1, tape)]
    assert verdict(tape, events, segments, cut=cut)["lost"] == 1 + cut, why


def test_what_was_given_up_is_lost_and_has_no_latency(tape: Tape) -> None:
    slow = {"endpoint": 1.0, "response": 99_000.0, "total": 99_001.0}
    events = [message(0, tape), message(1, tape), message(2, tape, text="", lost=True, latency_ms=slow)]
    figures = verdict(tape, events, segments=3)
    assert (figures["count"], figures["lost"], figures["response_ms"]["max"]) == (2, 1, 30.0)


def test_total_and_endpoint_count_from_the_recordings_own_end(tape: Tape) -> None:
    [heard] = place([message(0, tape)], {"s": tape})
    early = message(0, tape)
    early["duration_s"] -= 10 * CHUNK_SAMPLES / SAMPLE_RATE  # it ends before the speech does
    [shorter] = place([early], {"s": tape})
    assert heard.end_error_ms is not None
    assert shorter.end_error_ms is not None
    assert shorter.end_error_ms < heard.end_error_ms
    assert shorter.span("total") == 430 + shorter.end_error_ms
    assert shorter.span("endpoint") == 400 + shorter.end_error_ms
    assert shorter.span("response") == 30


def test_a_recording_in_parts_is_joined_and_only_its_last_part_knows_the_end(tape: Tape) -> None:
    whole = message(1, tape)
    half = round(whole["duration_s"] * SAMPLE_RATE / CHUNK_SAMPLES / 2) * CHUNK_SAMPLES / SAMPLE_RATE
    rest = whole["offset_s"] + half
    parts = [
        message(1, tape, "后", id="b", offset_s=rest, duration_s=whole["duration_s"] - half),
        message(1, tape, "前", id="a", duration_s=half),
    ]
    heard = {one.event["id"]: one for one in place(parts, {"s": tape})}
    assert heard["a"].end_error_ms is None
    assert heard["a"].span("total") == 430
    assert heard["b"].end_error_ms is not None
    figures = verdict(tape, [message(0, tape), *parts, message(2, tape)], segments=4)
    assert (figures["count"], figures["cut"], figures["lost"]) == (4, 1, 0)
    assert figures["texts"][tape.played[1].path] == "前后"


def test_what_was_split_in_the_middle_of_speech_has_no_total(tape: Tape) -> None:
    split = message(1, tape, latency_ms={"queue": 1.0, "response": 30.0}, enforced=["split"])
    figures = verdict(tape, [message(0, tape), split, message(2, tape)], segments=3)
    assert (figures["count"], figures["response_ms"]["p50"]) == (3, 30.0)
    assert figures["total_ms"]["max"] < 600


def test_what_streams_understand_differently_is_named(tape: Tape) -> None:
    both = {"s": tape, "t": tape}
    events = [
        message(k, tape, "好" if k else text, id=f"{s}{k}", source=s)
        for s, text in (("t", "他"), ("s", "是"))
        for k in range(3)
    ]
    figures = judge(place(events, both), both, Counts(6, 0, 0))
    assert figures["differing"] == [tape.played[0].path]
    assert figures["texts"][tape.played[0].path] == "是"
    assert figures["lost"] == 0


def test_the_figures_of_shares_and_steps(tape: Tape) -> None:
    events = [
        message(0, tape, within_budget=False, enforced=["batched", "cut"]),
        message(1, tape, decoded_at_pause=False, enforced=["batched"]),
        message(2, tape),
    ]
    figures = verdict(tape, events, segments=3)
    assert (figures["late"], figures["decoded_at_pause"]) == (1, 0.6667)
    assert figures["enforced"] == {"batched": 2, "cut": 1}
    assert figures["stages"] == {"queue": {"p50": 1.0, "p95": 1.0, "p99": 1.0, "max": 1.0}}
