"""What may be changed while the daemon runs, by MQTT: mute, preset, listening; and what it shows of a sentence."""

from __future__ import annotations

import fcntl
import itertools
import json
import termios
import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundled import BUNDLE, sound_of, write_wav
from daemons import SENTENCES, TEXTS, Daemon, Start, is_offline, is_ready, states, texts_on
from mosquitto import PATIENCE_S, Message, Mosquitto, Subscriber, send, send_lines, wait_for
from pulse import MICROPHONE, PulseServer
from test_reload import put_model

from edge_asr import app
from edge_asr.config_reader import load_config
from edge_asr.loader import engine_folder
from edge_asr.recognizer.bundle import CARD, read_bundle
from edge_asr.types import SAMPLE_RATE, Samples

NAMES = list(TEXTS)
BASE = "edge_asr/hall"
TAIL_S = 3.0
"""Silence behind a sentence on standard input: the longest pause, and more than the reader takes from the pipe at once.

So when the pipe is empty, the sentence has ended.
"""
WAKE = "打开客厅灯"
"""What the first recording says."""


@pytest.fixture
def apart(tmp_path: Path, state_folder: Path) -> list[str]:
    """Return the options for a state of one's own, with the engine that there is."""
    engine = engine_folder(read_bundle(BUNDLE), state_folder)
    return ["-o", f"state_dir={tmp_path / 'state'}", "-o", f"engine.dir={engine}", "-o", "log.level=DEBUG"]


def silence(seconds: float) -> Samples:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def words(name: str) -> Samples:
    """Return a recording without the silence around it."""
    samples = sound_of(name)
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    return samples[max(0, loud[0] - SAMPLE_RATE // 20) : loud[-1] + SAMPLE_RATE // 20]


def in_one_breath(*names: str, pause_s: float = 0.0) -> Samples:
    """Return recordings as one sentence: without the pauses around them, but for `pause_s` between."""
    parts = [part for name in names for part in (words(name), silence(pause_s))]
    return np.concatenate([silence(0.3), *parts, silence(0.3)])


def tell(daemon: Daemon, samples: Samples, tail_s: float = TAIL_S) -> None:
    """Say something into standard input, and return when it has been heard."""
    assert daemon.process.stdin is not None
    sound = np.concatenate([samples, silence(tail_s)])
    daemon.process.stdin.write((sound * 32767).astype("<i2").tobytes())
    daemon.process.stdin.flush()
    wait_for(lambda: not unread(daemon), "everything has been heard")


def unread(daemon: Daemon) -> int:
    """Return how many bytes wait in the pipe to its standard input."""
    assert daemon.process.stdin is not None
    count = array("i", [0])
    fcntl.ioctl(daemon.process.stdin, termios.FIONREAD, count)
    return count[0]


def command(broker: Mosquitto, subscriber: Subscriber, name: str, payload: str) -> dict[str, Any]:
    """Give a command and return the answer."""
    topic = f"cmd/{name}/result"
    before = len(subscriber.on(topic))
    send(broker.port, f"{BASE}/cmd/{name}", payload)
    subscriber.wait_for(lambda s: len(s.on(topic)) > before, f"an answer to {name} {payload}")
    return subscriber.on(topic)[before].json


def wait_out(seconds: float) -> None:
    """Return when what was asked for so many seconds is over, also for sound that arrived a moment ago."""
    over_at = time.monotonic() + seconds + 0.2
    wait_for(lambda: time.monotonic() > over_at, "the time is over")


def state_of(subscriber: Subscriber) -> dict[str, Any]:
    return subscriber.on("state")[-1].json


def shows(**expected: object) -> Any:
    """Return what tells whether the newest state says so."""
    return lambda s: s.on("state") and expected.items() <= state_of(s).items()


def health_of(subscriber: Subscriber) -> list[str]:
    return [source["health"] for source in state_of(subscriber)["sources"]]


def without(messages: Sequence[Message], text: str) -> bool:
    """Tell whether no message of any topic has a text, or the one before its ending."""
    return not any(text in message.payload or json.dumps(text)[1:-1] in message.payload for message in messages)


@pytest.mark.slow
def test_a_long_sentence_is_shown_as_it_grows_and_then_said(
    broker: Mosquitto, start: Start, apart: list[str], tmp_path: Path
) -> None:
    path = write_wav(tmp_path / "long.wav", in_one_breath(*NAMES[1:4:2]))
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", str(path), "-o", "segment.content_endpointing=false")
        assert daemon.end() == 0, daemon.log
        subscriber.wait_for(is_offline, "offline")
        [final] = subscriber.on("transcript")
        assert final.json["text"] == SENTENCES[1] + SENTENCES[3]
        partials = subscriber.on("partial")
        shown = [message.json for message in partials]
        assert len(shown) >= 4
        assert {message.qos for message in partials} == {0}
        assert not any(message.retained for message in partials)
        assert {(one["id"], one["source"]) for one in shown} == {(final.json["id"], f"file:{path}")}
        assert all(set(one) == {"id", "source", "text", "stable", "start"} for one in shown)
        for before, after in itertools.pairwise(shown):
            assert after["stable"].startswith(before["stable"]), shown
        assert shown[-1]["stable"], "it has become stable before the end"
        order = [message.topic.removeprefix(f"{BASE}/") for message in subscriber.messages]
        assert max(k for k, topic in enumerate(order) if topic == "partial") < order.index("transcript")
        assert max(k for k, topic in enumerate(order) if topic == "partial") < order.index("said")


def test_the_preset_holds_from_the_next_pause_on_and_outlives_a_restart(
    broker: Mosquitto, start: Start, apart: list[str]
) -> None:
    options = [*apart, "--source", "stdin", "-o", "segment.content_endpointing=false"]
    paused = in_one_breath(*NAMES[:3:2], pause_s=0.5)  # longer than the default's pause, shorter than relaxed's
    halves = [SENTENCES[0], SENTENCES[2]]
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *options)
        subscriber.wait_for(is_ready, "ready")
        assert state_of(subscriber)["preset"] == "default"
        tell(daemon, paused)
        subscriber.wait_for(lambda s: texts_on(s, "transcript") == halves, "two sentences")
        assert command(broker, subscriber, "preset", "relaxed") == {"ok": True, "preset": "relaxed"}
        subscriber.wait_for(shows(preset="relaxed"), "the new preset in the state")
        tell(daemon, paused)
        subscriber.wait_for(lambda s: texts_on(s, "transcript")[2:] == ["".join(halves)], "one sentence")
        refused = command(broker, subscriber, "preset", "hasty")
        assert refused == {"ok": False, "why": "preset takes aggressive, default or relaxed"}
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")
    with Subscriber(broker.port, f"{BASE}/transcript") as subscriber, Subscriber(broker.port) as everything:
        daemon = start(broker.port, *options)
        everything.wait_for(lambda s: is_ready(s) and shows(preset="relaxed")(s), "ready, and relaxed still")
        tell(daemon, paused)
        subscriber.wait_for(lambda s: texts_on(s, "transcript") == ["".join(halves)], "one sentence")
        assert daemon.stop() == 0


def test_another_model_takes_over_while_sentences_flow_and_a_broken_one_does_not(
    broker: Mosquitto, start: Start, apart: list[str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.symlink_to(put_model(tmp_path / "first"))
    send(broker.port, f"{BASE}/cmd/reload", "", retained=True)
    send(broker.port, f"{BASE}/cmd/reload", "{}", retained=True)
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "-o", f"model={model}", "--source", "stdin")
        subscriber.wait_for(lambda s: is_ready(s) and shows(model="first")(s), "ready")
        model.unlink()
        model.symlink_to(put_model(tmp_path / "second", 启="起"))
        (model / CARD).unlink()
        for number, name in enumerate(NAMES):
            if number == 2:
                send(broker.port, f"{BASE}/cmd/reload", "")
            tell(daemon, sound_of(name))
        subscriber.wait_for(lambda s: s.on("cmd/reload/result"), "it is answered")
        assert subscriber.on("cmd/reload/result")[-1].json == {"ok": True, "model": "second", "engine": "onnx-fp32"}
        subscriber.wait_for(shows(model="second"), "the state says so")
        tell(daemon, sound_of(NAMES[4]))
        subscriber.wait_for(lambda s: len(s.on("transcript")) == len(NAMES) + 1, "all sentences")
        heard = [(message.json["text"], message.json["model"]) for message in subscriber.on("transcript")]
        models = [model for _, model in heard]
        assert models == sorted(models)
        assert models[0] == "first"
        assert heard[-1] == (SENTENCES[4].replace("启", "起"), "second")
        assert [text.replace("起", "启") for text, _ in heard[:-1]] == SENTENCES

        (model / "tokens.json").unlink()
        wait_out(5.0)  # sooner it would be taken for the same wish
        refused = command(broker, subscriber, "reload", "{}")
        assert not refused["ok"]
        assert "no token list" in refused["why"]
        tell(daemon, sound_of(NAMES[0]))
        subscriber.wait_for(lambda s: len(s.on("transcript")) == len(NAMES) + 2, "it goes on")
        assert shows(model="second", state="ready")(subscriber)
        assert daemon.stop() == 0
        assert len(subscriber.on("cmd/reload/result")) == 2, "nothing that was retained has been obeyed"


def test_what_is_said_while_it_is_muted_is_never_heard_of(broker: Mosquitto, start: Start, apart: list[str]) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", "stdin")
        subscriber.wait_for(is_ready, "ready")
        assert command(broker, subscriber, "mute", "on") == {"ok": True, "mute": True}
        subscriber.wait_for(shows(mute=True), "muted, in the state")
        assert (health_of(subscriber), state_of(subscriber)["state"]) == (["muted"], "ready")
        assert command(broker, subscriber, "listen", "")["ok"] is False
        tell(daemon, sound_of(NAMES[0]))
        assert command(broker, subscriber, "mute", "off") == {"ok": True, "mute": False}
        subscriber.wait_for(shows(mute=False), "not muted, in the state")
        assert health_of(subscriber) == ["listening"]
        tell(daemon, sound_of(NAMES[1]))
        subscriber.wait_for(lambda s: s.on("said") and s.on("transcript"), "the second sentence")
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")
        assert texts_on(subscriber, "said") == texts_on(subscriber, "transcript") == SENTENCES[1:2]
        assert without(subscriber.messages, SENTENCES[0])
        assert SENTENCES[0] not in daemon.log


@pytest.mark.slow
def test_mute_in_the_middle_of_a_sentence_takes_back_what_was_shown_of_it(
    broker: Mosquitto, start: Start, apart: list[str], tmp_path: Path
) -> None:
    path = write_wav(tmp_path / "long.wav", in_one_breath(*NAMES[1:4:2]))
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", str(path))
        subscriber.wait_for(lambda s: s.on("partial"), "a partial")
        assert command(broker, subscriber, "mute", "on") == {"ok": True, "mute": True}
        subscriber.wait_for(lambda s: s.on("partial")[-1].json.get("end"), "it is taken back")
        assert daemon.end() == 0, daemon.log
        subscriber.wait_for(is_offline, "offline")
        shown = [message.json for message in subscriber.on("partial")]
        assert shown[-1] == {"id": shown[0]["id"], "source": f"file:{path}", "text": "", "end": True}
        assert len({one["id"] for one in shown}) == 1
        assert not any(one.get("end") for one in shown[:-1])
        assert subscriber.on("said") + subscriber.on("transcript") == []


def test_one_that_was_muted_by_a_retained_message_is_muted_from_the_start(
    broker: Mosquitto, start: Start, apart: list[str]
) -> None:
    send(broker.port, f"{BASE}/cmd/mute", "on", retained=True)
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", "stdin")
        subscriber.wait_for(lambda s: is_ready(s) and shows(mute=True)(s) and health_of(s) == ["muted"], "it is muted")
        tell(daemon, sound_of(NAMES[0]))
        send(broker.port, f"{BASE}/cmd/mute", "off", retained=True)
        subscriber.wait_for(shows(mute=False), "not muted")
        tell(daemon, sound_of(NAMES[1]))
        subscriber.wait_for(lambda s: s.on("transcript"), "the second sentence")
        assert daemon.stop() == 0
        assert texts_on(subscriber, "transcript") == SENTENCES[1:2]


def test_mute_outlives_a_restart(broker: Mosquitto, start: Start, apart: list[str]) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", "stdin")
        subscriber.wait_for(shows(mute=False), "the state")
        assert command(broker, subscriber, "mute", "on")["ok"], "while the engine is being loaded, or after"
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")
    with Subscriber(broker.port, f"{BASE}/state") as state, Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", "stdin")
        subscriber.wait_for(lambda s: is_ready(s) and health_of(s) == ["muted"], "ready, and muted still")
        assert all(message.json["mute"] for message in state.messages)
        assert daemon.stop() == 0


def test_one_that_may_have_been_muted_says_that_it_is_and_what_to_do(
    broker: Mosquitto, start: Start, apart: list[str], tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "controls.json").write_text('{"mute": fal', encoding="utf-8")
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", "stdin")
        subscriber.wait_for(lambda s: shows(state="degraded", mute=True)(s) and health_of(s) == ["muted"], "muted")
        assert "controls.json is damaged" in state_of(subscriber)["why"]
        assert "send off to cmd/mute" in state_of(subscriber)["why"]
        assert command(broker, subscriber, "mute", "off") == {"ok": True, "mute": False}
        subscriber.wait_for(shows(state="ready", mute=False, why=""), "all is well")
        assert daemon.stop() == 0


LOADING = """
import sys
import time
from pathlib import Path
from edge_asr import cli, ladder

go = Path(sys.argv.pop(1))
load = ladder.load_recognizer

def slow(*given):
    while not go.exists():
        time.sleep(0.005)
    return load(*given)

ladder.load_recognizer = slow
cli.main()
"""


def test_commands_are_obeyed_while_the_engine_is_being_loaded(
    broker: Mosquitto, start: Start, apart: list[str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", "stdin", program=("-c", LOADING, str(go)))
        subscriber.wait_for(shows(state="starting", mute=False), "starting")
        assert command(broker, subscriber, "mute", "on") == {"ok": True, "mute": True}
        assert command(broker, subscriber, "mute", "off") == {"ok": True, "mute": False}
        refused = command(broker, subscriber, "listen", "")
        assert refused["why"].startswith("nothing is listened to yet"), refused
        assert command(broker, subscriber, "mute", "on") == {"ok": True, "mute": True}
        assert command(broker, subscriber, "preset", "relaxed") == {"ok": True, "preset": "relaxed"}
        subscriber.wait_for(shows(state="starting", mute=True, preset="relaxed"), "both in the state")
        go.touch()
        subscriber.wait_for(lambda s: is_ready(s) and health_of(s) == ["muted"], "ready, and muted still")
        tell(daemon, sound_of(NAMES[0]))
        assert command(broker, subscriber, "mute", "off")["ok"]
        tell(daemon, sound_of(NAMES[1]))
        subscriber.wait_for(lambda s: s.on("transcript"), "the second sentence")
        assert daemon.stop() == 0
        assert texts_on(subscriber, "transcript") == SENTENCES[1:2]


def test_a_daemon_that_is_given_commands_while_it_stops_ends_in_time_and_without_a_word(
    broker: Mosquitto, start: Start, apart: list[str]
) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", "stdin")
        subscriber.wait_for(is_ready, "ready")
        many = threading.Thread(
            target=send_lines, args=(broker.port, f"{BASE}/cmd/mute", ["on", "off"] * 500), name="many commands"
        )
        many.start()
        try:
            subscriber.wait_for(lambda s: s.on("cmd/mute/result"), "the first answer")
            assert daemon.stop() == 0
        finally:
            many.join(PATIENCE_S)
        assert daemon.complaints == []
        assert "never awaited" not in daemon.log
        subscriber.wait_for(is_offline, "offline")


def test_push_to_talk_hears_a_sentence_when_asked_to_and_no_other(
    broker: Mosquitto, start: Start, apart: list[str]
) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", "stdin", "-o", "listen.mode=push_to_talk")
        subscriber.wait_for(lambda s: is_ready(s) and health_of(s), "ready")
        assert state_of(subscriber)["listen"] == "push_to_talk"
        tell(daemon, sound_of(NAMES[0]))
        heard = command(broker, subscriber, "listen", "")
        assert heard == {"ok": True, "listen": "push_to_talk", "seconds": 8.0}
        tell(daemon, sound_of(NAMES[1]))
        subscriber.wait_for(lambda s: s.on("transcript"), "what was said when asked")
        assert command(broker, subscriber, "listen", '{"seconds": 1}')["seconds"] == 1.0
        wait_out(1.0)
        tell(daemon, sound_of(NAMES[2]))
        assert command(broker, subscriber, "listen", '{"seconds": 120}')["seconds"] == 120.0
        half = len(sound_of(NAMES[3])) // 2
        tell(daemon, sound_of(NAMES[3])[:half], tail_s=0)
        ended = command(broker, subscriber, "listen", '{"seconds": 0}')
        assert ended == {"ok": True, "listen": "push_to_talk", "seconds": 0.0}
        tell(daemon, sound_of(NAMES[3])[half:])
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 2, "what was said when asked again, to its end")
        tell(daemon, sound_of(NAMES[2]))
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")
        assert texts_on(subscriber, "said") == texts_on(subscriber, "transcript") == SENTENCES[1:4:2]
        for other in (SENTENCES[0], SENTENCES[2]):
            assert without(subscriber.messages, other)
            assert other not in daemon.log


def test_only_what_follows_the_wake_phrase_is_published_or_logged(
    broker: Mosquitto, start: Start, apart: list[str]
) -> None:
    options = ["-o", "listen.mode=phrase", "-o", f"listen.phrases=[{WAKE}]", "-o", "listen.seconds=1"]
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, *options, "--source", "stdin")
        subscriber.wait_for(lambda s: is_ready(s) and health_of(s), "ready")
        assert state_of(subscriber)["listen"] == "phrase"
        tell(daemon, sound_of(NAMES[1]))
        tell(daemon, in_one_breath(NAMES[0], NAMES[3]))
        subscriber.wait_for(lambda s: s.on("transcript"), "the command behind the wake phrase")
        tell(daemon, np.concatenate([sound_of(NAMES[0]), silence(1), sound_of(NAMES[2])]))
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 2, "the command after the wake phrase")
        wait_out(1.0)
        tell(daemon, sound_of(NAMES[4]))
        tell(daemon, in_one_breath(NAMES[0], NAMES[5]))
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 3, "the last command")
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")
        wanted = [SENTENCES[3], SENTENCES[2], SENTENCES[5]]
        assert texts_on(subscriber, "said") == texts_on(subscriber, "transcript") == wanted
        raw = [message.json["text_raw"] for message in subscriber.on("transcript")]
        assert raw == [WAKE + wanted[0], wanted[1], WAKE + wanted[2]]
        for message in subscriber.on("transcript"):
            assert "".join(token["text"] for token in message.json["tokens"]) == message.json["text"]
        for other in (SENTENCES[1], SENTENCES[4], "卧室", "产线"):
            assert without(subscriber.messages, other)
            assert other not in daemon.log


@pytest.mark.slow
def test_mute_closes_the_microphone_and_the_preset_holds_when_it_is_open_again(
    broker: Mosquitto, start: Start, apart: list[str], pulse_server: PulseServer, tmp_path: Path
) -> None:
    paths = [
        write_wav(tmp_path / name, np.concatenate([silence(0.5), sound_of(name), silence(1.5)])) for name in NAMES[:3]
    ]
    options = ["--source", f"microphone:{MICROPHONE}", "-o", "segment.content_endpointing=false"]

    def speak(number: int) -> None:
        with pulse_server.play(paths[number]) as player:
            assert player.wait(PATIENCE_S) == 0

    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, *options)
        subscriber.wait_for(lambda s: is_ready(s) and health_of(s) == ["listening"], "it is heard")
        assert command(broker, subscriber, "preset", "relaxed")["ok"]
        speak(0)
        subscriber.wait_for(lambda s: len(s.on("said")) == 1, "the first sentence")
        assert pulse_server.recordings() == 1

        assert command(broker, subscriber, "mute", "on") == {"ok": True, "mute": True}
        wait_for(lambda: pulse_server.recordings() == 0, "the device is closed")
        subscriber.wait_for(lambda s: shows(mute=True)(s) and health_of(s) == ["muted"], "muted, in the state")
        assert state_of(subscriber)["state"] == "ready"
        speak(1)
        assert pulse_server.recordings() == 0

        assert command(broker, subscriber, "preset", "aggressive")["ok"]
        assert command(broker, subscriber, "mute", "off") == {"ok": True, "mute": False}
        subscriber.wait_for(lambda s: shows(mute=False)(s) and health_of(s) == ["listening"], "it is heard again")
        speak(2)
        subscriber.wait_for(lambda s: len(s.on("said")) == 2, "the last sentence")
        assert daemon.stop() == 0
        subscriber.wait_for(is_offline, "offline")
        assert texts_on(subscriber, "said") == texts_on(subscriber, "transcript") == SENTENCES[:3:2]
        relaxed, aggressive = (message.json["latency_ms"]["endpoint"] for message in subscriber.on("said"))
        assert relaxed > 600 > aggressive
        assert without(subscriber.messages, SENTENCES[1])
        assert SENTENCES[1] not in daemon.log
        assert "degraded" not in states(subscriber)


@pytest.mark.slow
def test_a_microphone_that_is_missed_may_be_muted_and_is_not_missed_then(
    broker: Mosquitto, start: Start, apart: list[str], pulse_server: PulseServer
) -> None:
    pulse_server.remove_sink()
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, *apart, "--source", f"microphone:{MICROPHONE}")
        subscriber.wait_for(shows(state="degraded"), "it is missed")
        assert command(broker, subscriber, "mute", "on") == {"ok": True, "mute": True}
        subscriber.wait_for(lambda s: shows(state="ready", mute=True)(s) and health_of(s) == ["muted"], "it is muted")
        pulse_server.add_sink()
        assert pulse_server.recordings() == 0
        assert command(broker, subscriber, "mute", "off") == {"ok": True, "mute": False}
        subscriber.wait_for(lambda s: shows(state="ready")(s) and health_of(s) == ["listening"], "it is heard")
        pulse_server.suspend()
        try:
            subscriber.wait_for(lambda s: health_of(s) == ["stalled"], "the stall is told")
            assert command(broker, subscriber, "mute", "on") == {"ok": True, "mute": True}
            subscriber.wait_for(
                lambda s: shows(state="ready")(s) and health_of(s) == ["muted"], "muted, though the server hangs"
            )
        finally:
            pulse_server.resume()
        assert command(broker, subscriber, "mute", "off") == {"ok": True, "mute": False}
        subscriber.wait_for(lambda s: shows(state="ready")(s) and health_of(s) == ["listening"], "it is heard again")
        wait_for(lambda: pulse_server.recordings() == 1, "one recording, and none left behind")
        assert daemon.stop() == 0


def test_a_state_that_was_looked_at_before_is_not_published_after_a_newer_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    daemon = app.Daemon(load_config(None, [f"state_dir={tmp_path}", "mqtt.enabled=false"], {}))
    published: list[bool] = []
    looking, go_on = threading.Event(), threading.Event()

    def slow() -> dict[str, float | None]:
        looking.set()
        assert go_on.wait(PATIENCE_S)
        return {}

    sink = SimpleNamespace(set_state=lambda state: published.append(state["mute"]), trouble="", describe=dict)
    monkeypatch.setattr(daemon, "_publisher", sink)
    monkeypatch.setattr(daemon._responses, "percentiles", slow)
    publisher = threading.Thread(target=daemon._publish_state)
    publisher.start()
    assert looking.wait(PATIENCE_S)
    monkeypatch.setattr(daemon._responses, "percentiles", dict)
    newer = threading.Thread(target=daemon._controls.mute, args=(True,))
    newer.start()
    newer.join(0.1)  # it overtakes, where nothing holds it up
    go_on.set()
    for thread in (publisher, newer):
        thread.join(PATIENCE_S)
    assert published == [False, True]
