"""The daemon on a real microphone, the monitor of a private PulseAudio, from the sound to a real Mosquitto."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled import BUNDLE, recording, sound_of, write_wav
from daemons import SENTENCES, TEXTS, Daemon, Start, is_offline, is_ready, states, texts_on
from mosquitto import Mosquitto, Subscriber, send, wait_for
from pulse import MICROPHONE, PulseServer

from edge_asr.loader import engine_folder
from edge_asr.recognizer.bundle import read_bundle
from edge_asr.types import SAMPLE_RATE

NAMES = list(TEXTS)
SOURCE = f"microphone:{MICROPHONE}"
ROUND_S = 90.0
"""How long a round of all recordings may take."""


RENAMED = "other"
"""The sink of the microphone that has another name."""
WATCHDOG_S = 35.0
"""Longer than a watchdog waits for a sign of life: 30 s."""


def silence(seconds: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def spoken(path: Path, names: Sequence[str], pauses_s: Sequence[float] = (1.0,)) -> Path:
    """Write sentences with pauses after each: PulseAudio may swallow the first milliseconds, so one goes before."""
    parts = [silence(0.5)]
    for k, name in enumerate(names):
        parts += [sound_of(name), silence(pauses_s[k % len(pauses_s)])]
    return write_wav(path, np.concatenate(parts))


def speak(server: PulseServer, path: Path, sink: str = MICROPHONE) -> None:
    """Play a file to its end."""
    with server.play(path, sink) as player:
        assert player.wait(ROUND_S) == 0


def passes(seconds: float) -> None:
    """Return when so much time has passed."""
    until = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() >= until, f"{seconds} s", seconds + 1)


def health(subscriber: Subscriber, source: str = SOURCE) -> tuple[str, str]:
    """Return health and why of a source in the newest state."""
    found = [entry for entry in subscriber.on("state")[-1].json["sources"] if entry["name"] == source]
    return (found[0]["health"], found[0]["why"]) if found else ("", "")


def is_heard(source: str = SOURCE) -> Callable[[Subscriber], bool]:
    return lambda subscriber: is_ready(subscriber) and health(subscriber, source)[0] == "listening"


def children(daemon: Daemon) -> list[int]:
    """Return the processes that a daemon has started."""
    tasks = Path(f"/proc/{daemon.process.pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def ends_and_leaves_nothing(daemon: Daemon, server: PulseServer) -> None:
    """Stop a daemon that has microphones open."""
    started = children(daemon)
    assert started
    assert daemon.stop() == 0
    assert daemon.complaints == []
    assert [child for child in started if Path(f"/proc/{child}").exists()] == []
    wait_for(lambda: server.recordings() == 0, "nothing records")


def test_a_sentence_spoken_into_a_microphone_arrives_and_nothing_is_left_behind(
    broker: Mosquitto, start: Start, pulse_server: PulseServer, tmp_path: Path
) -> None:
    path = spoken(tmp_path / "one.wav", NAMES[:1])
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", SOURCE)
        subscriber.wait_for(is_heard(), "the microphone is heard")
        speak(pulse_server, path)
        subscriber.wait_for(lambda s: s.on("said") and s.on("transcript"), "the sentence")
        ends_and_leaves_nothing(daemon, pulse_server)
        subscriber.wait_for(is_offline, "offline")
        assert texts_on(subscriber, "said") == texts_on(subscriber, "transcript") == SENTENCES[:1]
        said = subscriber.on("said")[0].json
        assert (said["source"], said["decoded_at_pause"], said["replayed"]) == (SOURCE, True, False)
        assert states(subscriber) == ["starting", "ready"]


def test_a_daemon_whose_only_microphone_lacks_its_library_ends_with_the_remedy(
    start: Start, plug: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake/sounddevice.py").unlink()
    (tmp_path / "fake/sounddevice.py").write_text("raise ModuleNotFoundError('sounddevice')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    daemon = start(1, "--source", "microphone", "-o", "mqtt.enabled=false")
    assert daemon.end() == 2
    assert daemon.complaints == [
        "edge-asr: microphone:default: sounddevice is not installed; pip install 'edge-asr[microphone]'"
    ]


@pytest.mark.slow
def test_all_sentences_spoken_with_pauses_arrive_whole_and_in_order(
    broker: Mosquitto, start: Start, pulse_server: PulseServer, tmp_path: Path
) -> None:
    path = spoken(tmp_path / "all.wav", NAMES, pauses_s=(0.8, 0.5, 3.0, 1.5))
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", SOURCE)
        subscriber.wait_for(is_heard(), "the microphone is heard")
        speak(pulse_server, path)
        subscriber.wait_for(lambda s: len(s.on("transcript")) == len(NAMES), "all sentences")
        ends_and_leaves_nothing(daemon, pulse_server)
        subscriber.wait_for(is_offline, "offline")
        assert texts_on(subscriber, "said") == texts_on(subscriber, "transcript") == SENTENCES
        offsets = [message.json["offset_s"] for message in subscriber.on("transcript")]
        assert offsets == sorted(offsets)


def unplugged(server: PulseServer) -> Callable[[], None]:
    """Bring a fault about; return what ends it."""
    server.remove_sink()
    return server.add_sink


def renamed(server: PulseServer) -> Callable[[], None]:
    server.remove_sink()

    def back() -> None:
        server.add_sink(RENAMED)
        server.name_microphone(f"{MICROPHONE}_2", RENAMED)

    return back


def killed(server: PulseServer) -> Callable[[], None]:
    server.kill()
    return lambda: server.start(**{MICROPHONE: (SAMPLE_RATE, 1)})


def hanging(server: PulseServer) -> Callable[[], None]:
    server.suspend()
    return server.resume


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "lasts_s", "sink"),
    [
        pytest.param(unplugged, 0.0, MICROPHONE, id="unplugged"),
        pytest.param(renamed, 0.0, RENAMED, id="renamed"),
        pytest.param(killed, 0.0, MICROPHONE, id="sound server killed"),
        pytest.param(hanging, 10.0, MICROPHONE, id="no data for 10 s"),
        pytest.param(unplugged, WATCHDOG_S, MICROPHONE, id="absent for longer than a watchdog waits"),
    ],
)
def test_a_lost_microphone_degrades_the_state_and_is_heard_again_when_it_is_back(
    broker: Mosquitto,
    start: Start,
    pulse_server: PulseServer,
    tmp_path: Path,
    fault: Callable[[PulseServer], Callable[[], None]],
    lasts_s: float,
    sink: str,
) -> None:
    path = spoken(tmp_path / "one.wav", NAMES[:1])
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", SOURCE)
        subscriber.wait_for(is_heard(), "the microphone is heard")
        back = fault(pulse_server)
        try:
            subscriber.wait_for(lambda s: states(s)[-1] == "degraded", "the loss is told")
            assert health(subscriber)[0] in ("waiting", "stalled")
            assert subscriber.on("state")[-1].json["why"].startswith(f"{SOURCE} {health(subscriber)[0]}: ")
            passes(lasts_s)
            assert health(subscriber)[0] in ("waiting", "stalled")
        finally:
            back()
        subscriber.wait_for(is_heard(), "the microphone is heard again")
        speak(pulse_server, path, sink)
        subscriber.wait_for(lambda s: s.on("said"), "the sentence")
        ends_and_leaves_nothing(daemon, pulse_server)
        assert texts_on(subscriber, "said") == SENTENCES[:1]
        assert states(subscriber) == ["starting", "ready", "degraded", "ready"]


@pytest.mark.slow
def test_nothing_that_was_said_while_it_was_muted_comes_out_and_what_is_said_afterwards_is_whole(
    broker: Mosquitto, start: Start, pulse_server: PulseServer, tmp_path: Path, state_folder: Path
) -> None:
    secret, public = spoken(tmp_path / "secret.wav", NAMES[1:4]), spoken(tmp_path / "public.wav", NAMES[:1])
    engine = engine_folder(read_bundle(BUNDLE), state_folder)  # the state, which mute is kept in, is our own
    with Subscriber(broker.port) as subscriber:
        daemon = start(
            broker.port, "--source", SOURCE, "-o", f"state_dir={tmp_path / 'state'}", "-o", f"engine.dir={engine}"
        )
        subscriber.wait_for(is_heard(), "the microphone is heard")
        send(broker.port, "edge_asr/hall/cmd/mute", "on")
        subscriber.wait_for(lambda s: health(s)[0] == "muted", "it is muted")
        wait_for(lambda: pulse_server.recordings() == 0, "the device is closed")
        muted_at = time.monotonic()
        while time.monotonic() < muted_at + WATCHDOG_S:
            speak(pulse_server, secret)
            assert pulse_server.recordings() == 0
        assert states(subscriber) == ["starting", "ready"]
        send(broker.port, "edge_asr/hall/cmd/mute", "off")
        subscriber.wait_for(is_heard(), "the microphone is heard again")
        speak(pulse_server, public)
        subscriber.wait_for(lambda s: s.on("said"), "the sentence")
        ends_and_leaves_nothing(daemon, pulse_server)
        assert texts_on(subscriber, "said") == texts_on(subscriber, "transcript") == SENTENCES[:1]
        assert {message.json["id"] for message in subscriber.on("partial")} <= {subscriber.on("said")[0].json["id"]}


@pytest.mark.slow
def test_a_stereo_device_of_44100_hz_is_understood(
    broker: Mosquitto, start: Start, pulse_server: PulseServer, tmp_path: Path
) -> None:
    pulse_server.add_sink("wide", 44_100, 2)
    pulse_server.name_microphone("wide", "wide")
    path = spoken(tmp_path / "three.wav", NAMES[:3])
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "-o", "sources=[{kind: microphone, device: wide, rate: 44100}]")
        subscriber.wait_for(is_heard("microphone:wide"), "the microphone is heard")
        speak(pulse_server, path, "wide")
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 3, "all sentences")
        ends_and_leaves_nothing(daemon, pulse_server)
        assert texts_on(subscriber, "transcript") == SENTENCES[:3]


@pytest.mark.slow
def test_digital_silence_and_clipping_are_told_in_the_state_of_a_microphone_that_is_heard(
    broker: Mosquitto, start: Start, pulse_server: PulseServer, tmp_path: Path
) -> None:
    noise = np.random.default_rng(2).uniform(-1, 1, 12 * SAMPLE_RATE).astype(np.float32)
    loud = write_wav(tmp_path / "loud.wav", np.clip(3 * noise, -1, 1))
    quiet = write_wav(tmp_path / "quiet.wav", 0.001 * noise)
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", SOURCE)
        subscriber.wait_for(lambda s: is_heard()(s) and "digital silence" in health(s)[1], "the silence is told")
        speak(pulse_server, loud)
        subscriber.wait_for(lambda s: is_heard()(s) and health(s)[1].startswith("clipping: "), "the clipping is told")
        with pulse_server.play(quiet):
            subscriber.wait_for(lambda s: is_heard()(s) and health(s)[1] == "", "all is well")
        ends_and_leaves_nothing(daemon, pulse_server)
        assert states(subscriber) == ["starting", "ready"]


@pytest.mark.slow
def test_a_microphone_may_be_plugged_in_after_the_start(
    broker: Mosquitto, start: Start, pulse_server: PulseServer, tmp_path: Path
) -> None:
    pulse_server.remove_sink()
    path = spoken(tmp_path / "one.wav", NAMES[1:2])
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", SOURCE)
        subscriber.wait_for(lambda s: s.on("state") and health(s)[0] in ("waiting", "stalled"), "it is missed")
        pulse_server.add_sink()
        subscriber.wait_for(is_heard(), "the microphone is heard")
        speak(pulse_server, path)
        subscriber.wait_for(lambda s: s.on("said"), "the sentence")
        ends_and_leaves_nothing(daemon, pulse_server)
        assert texts_on(subscriber, "said") == SENTENCES[1:2]


@pytest.mark.slow
def test_two_microphones_a_file_and_standard_input_are_heard_side_by_side(
    broker: Mosquitto, start: Start, pulse_server: PulseServer, tmp_path: Path
) -> None:
    pulse_server.add_sink("other")
    (pulse_server.home / ".asoundrc").write_text(
        "".join(
            f'pcm.{sink} {{ type pulse device {sink}.monitor hint {{ show on description "virtual" }} }}\n'
            for sink in (MICROPHONE, "other")
        )
    )
    here, there = spoken(tmp_path / "here.wav", NAMES[:2]), spoken(tmp_path / "there.wav", NAMES[2:4])
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", SOURCE, "--source", "microphone:other", "--source", "stdin",
                       "--source", str(recording(NAMES[4])), "-o", "log.level=DEBUG")  # fmt: skip
        for source in (SOURCE, "microphone:other"):
            subscriber.wait_for(is_heard(source), source)
        with pulse_server.play(here) as first, pulse_server.play(there, "other") as second:
            daemon.hears(SENTENCES[5])
            assert (first.wait(ROUND_S), second.wait(ROUND_S)) == (0, 0)
        subscriber.wait_for(lambda s: len(s.on("transcript")) == 6, "all sentences")
        heard: dict[str, list[str]] = {}
        for message in subscriber.on("transcript"):
            heard.setdefault(message.json["source"], []).append(message.json["text"])
        assert heard == {
            SOURCE: SENTENCES[:2], "microphone:other": SENTENCES[2:4], "stdin": SENTENCES[5:6],
            f"file:{recording(NAMES[4])}": SENTENCES[4:5],
        }  # fmt: skip
        assert len(children(daemon)) == 2
        ends_and_leaves_nothing(daemon, pulse_server)


@pytest.mark.slow
def test_a_daemon_ends_in_time_while_its_sound_server_hangs(
    broker: Mosquitto, start: Start, pulse_server: PulseServer
) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = start(broker.port, "--source", SOURCE)
        subscriber.wait_for(is_heard(), "the microphone is heard")
        started = children(daemon)
        pulse_server.suspend()
        try:
            subscriber.wait_for(lambda s: health(s)[0] == "stalled", "the stall is told")
            assert states(subscriber)[-1] == "degraded"
            assert daemon.stop() == 0
        finally:
            pulse_server.resume()
        assert not any(Path(f"/proc/{child}").exists() for child in started)
