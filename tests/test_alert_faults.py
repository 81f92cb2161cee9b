"""Each alert on its real fault: on an appliance that is at work, looked at by a real Prometheus."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from bundled import BUNDLE, recording, sound_of, write_wav
from daemons import SENTENCES, TEXTS, Daemon, Start
from machines import ORIN, lay_out
from mosquitto import PATIENCE_S, Mosquitto, free_port, send
from plans import RELEASE, plan, put_plan, put_processors
from prometheus import ALERTS, Prometheus, Watched, running
from pulse import MICROPHONE, PulseServer
from tensorrt_fakes import FOLDER as FAKES
from test_daemon_engine import somebody_building
from test_device import COOLING, DEVICES

from edge_asr.config_mqtt import OutboxConfig
from edge_asr.loader import engine_folder
from edge_asr.publish.outbox import DiskOutbox
from edge_asr.recognizer.bundle import read_bundle
from edge_asr.recognizer.manifest import read_manifest
from edge_asr.types import SAMPLE_RATE

Test = TypeVar("Test", bound=Callable[..., None])
INJECTED: set[str] = set()
MICROPHONE_SOURCE = f"{{kind: microphone, device: {MICROPHONE}}}"


def injects(alert: str) -> Callable[[Test], Test]:
    """Say for which alert a test brings the fault about; it gets the name as `alert`."""
    INJECTED.add(alert)
    return pytest.mark.parametrize("alert", [alert])


def test_every_alert_has_its_fault() -> None:
    assert ALERTS.keys() == INJECTED


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with running(tmp_path_factory.mktemp("prometheus")) as started:
        yield started


@pytest.fixture
def watched(prometheus: Prometheus) -> Watched:
    """The appliance that a test starts."""
    return prometheus.watch()


Run = Callable[..., Daemon]


@pytest.fixture
def run(start: Start, watched: Watched) -> Run:
    """Start the appliance with these options; `port`: of its broker, 0: it has none."""

    def begin(
        *options: str, port: int = 0, sources: str = "{kind: stdin}", program: tuple[str, ...] = ("-m", "edge_asr")
    ) -> Daemon:
        given = [f"mqtt.enabled={str(bool(port)).lower()}", "http.enabled=true", f"http.port={watched.port}"]
        given += ["engine.threads=1", f"sources=[{sources}]", *options]
        arguments = [part for option in given for part in ("-o", option)]
        daemon = start(port or 1, "--model", str(BUNDLE), *arguments, program=program)
        daemon.wait_for("http listens on")
        return daemon

    return begin


@pytest.fixture
def fault(tmp_path: Path) -> Path:
    """What FAULTY reads."""
    (tmp_path / "fault").touch()
    return tmp_path / "fault"


FAULTY = """
import sys, time
from pathlib import Path
from edge_asr import cli
from edge_asr.recognizer.onnx_network import OnnxNetwork

fault, run = Path(sys.argv.pop(1)), OnnxNetwork.run

def faulty(network, inputs):
    found, kind = run(network, inputs), fault.read_text()
    if kind == "nan":
        return {name: array * float("nan") for name, array in found.items()}
    time.sleep(float(kind or 0))
    return found

OnnxNetwork.run = faulty
cli.main()
"""
"""The program, but each run of a network takes so many seconds more as a file says; `nan`: it answers that."""
ELSEWHERE = """
import sys
from pathlib import Path
from edge_asr import app, cli, device
from edge_asr.tree import Tree

root = Path(sys.argv.pop(1))
device.Tree = lambda: Tree(root)
app.STATE_EVERY_S = 0.2
cli.main()
"""
"""The program on a machine whose files are below another folder; it looks at them more often."""


@injects("EdgeAsrDown")
def test_the_appliance_is_gone(alert: str, watched: Watched, run: Run) -> None:
    daemon = run()
    watched.is_quiet()
    daemon.process.kill()
    watched.fires(alert)
    run()
    watched.is_quiet()


@injects("EdgeAsrStarting")
def test_an_engine_is_built_for_long(alert: str, watched: Watched, run: Run, tmp_path: Path) -> None:
    with somebody_building(engine_folder(read_bundle(BUNDLE), tmp_path / "state")):
        run(f"state_dir={tmp_path / 'state'}")
        watched.fires(alert)
    watched.is_quiet()


@injects("EdgeAsrDegraded")
def test_a_port_is_taken(alert: str, watched: Watched, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        run("funasr.enabled=true", f"funasr.port={other.getsockname()[1]}")
        watched.fires(alert)
    watched.is_quiet()


@injects("EdgeAsrBrokerAway")
def test_the_broker_is_gone(alert: str, watched: Watched, run: Run, broker: Mosquitto) -> None:
    run(port=broker.port)
    watched.is_quiet()
    broker.kill()
    watched.fires(alert)
    broker.start()
    watched.is_quiet()


@injects("EdgeAsrTranscriptsWait")
def test_a_transcript_waits_for_the_broker(alert: str, watched: Watched, run: Run, broker: Mosquitto) -> None:
    daemon = run(port=broker.port)
    watched.is_quiet()
    broker.kill()
    daemon.is_told(SENTENCES[0])
    watched.fires(alert, "EdgeAsrBrokerAway")
    broker.start()
    watched.is_quiet()


@injects("EdgeAsrTranscriptsLost")
def test_the_broker_takes_no_message_of_such_a_size(
    alert: str, watched: Watched, run: Run, tmp_path: Path, mosquitto_installed: None
) -> None:
    broker = Mosquitto(tmp_path, options=["message_size_limit 1000"])
    broker.start()
    try:
        daemon = run(port=broker.port)
        watched.is_quiet()
        daemon.is_told(max(SENTENCES, key=len))
        watched.fires(alert)
        watched.is_quiet()
    finally:
        broker.kill()


@injects("EdgeAsrLate")
def test_every_answer_is_too_late(alert: str, watched: Watched, run: Run, broker: Mosquitto) -> None:
    daemon = run("budget.response_ms=1", port=broker.port)
    watched.is_quiet()
    daemon.is_told(SENTENCES[0])
    watched.fires(alert)
    watched.is_quiet()


@pytest.mark.slow
@injects("EdgeAsrTranscriptsLost")
def test_the_engine_cannot_follow(alert: str, watched: Watched, run: Run, fault: Path) -> None:
    longest = max((sound_of(name) for name in TEXTS), key=len)
    tape = write_wav(fault.with_name("tape.wav"), np.tile(np.pad(longest, (0, SAMPLE_RATE)), 20))
    run(
        "budget.max_backlog_s=10",
        sources=f"{{kind: file, path: {tape}, realtime: true}}",
        program=("-c", FAULTY, str(fault)),
    )
    watched.is_quiet()
    fault.write_text("5")
    watched.fires(alert, "EdgeAsrBusy", "EdgeAsrLate", "EdgeAsrDegraded")
    fault.write_text("")
    watched.is_quiet()


@injects("EdgeAsrTranscriptsLost")
def test_the_outbox_is_full(alert: str, watched: Watched, run: Run, tmp_path: Path) -> None:
    limits = OutboxConfig(file=tmp_path / "full.sqlite3", max_mb=0.25)
    outbox = DiskOutbox(limits, tmp_path / "full.sqlite3")
    while not outbox.stats().dropped:
        outbox.add([("an id", f'{{"text": "{"长" * 1000}"}}')])
    outbox.close()
    daemon = run(f"outbox.file={limits.file}", f"outbox.max_mb={limits.max_mb}", port=free_port())
    watched.fires("EdgeAsrTranscriptsWait", "EdgeAsrBrokerAway", "EdgeAsrStarting")
    for sentence in SENTENCES:
        daemon.is_told(sentence)
    watched.fires(alert, "EdgeAsrBrokerAway", "EdgeAsrTranscriptsWait")
    watched.ends(alert)


@injects("EdgeAsrEngineFails")
def test_the_engine_answers_what_is_no_number(alert: str, watched: Watched, run: Run, fault: Path) -> None:
    daemon = run(program=("-c", FAULTY, str(fault)))
    watched.is_quiet()
    fault.write_text("nan")
    daemon.is_told(SENTENCES[0])
    watched.fires(alert)
    watched.is_quiet()


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the appliance find the fakes of TensorRT; return a state folder with the processor's engine."""
    plan()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FAKE_TENSORRT", RELEASE)
    put_processors(tmp_path / "state")
    return tmp_path / "state"


@injects("EdgeAsrLesserEngine")
def test_the_gpu_breaks(
    alert: str, watched: Watched, run: Run, tensorrt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_plan(tensorrt)
    broken = tensorrt / "broken"
    monkeypatch.setenv("FAKE_GPU_FAIL_WITH", str(broken))
    daemon = run(f"state_dir={tensorrt}")
    watched.is_quiet()
    broken.touch()
    daemon.is_told(SENTENCES[0])
    watched.fires(alert)
    daemon.process.kill()
    assert daemon.end() < 0
    broken.unlink()
    run(f"state_dir={tensorrt}")
    watched.is_quiet()


@injects("EdgeAsrLesserEngine")
def test_the_engine_is_damaged_from_the_start(alert: str, watched: Watched, run: Run, tensorrt: Path) -> None:
    folder = tensorrt / "own"
    shutil.copytree(plan(), folder)
    manifest = read_manifest(folder)
    assert manifest is not None
    (folder / manifest.encoder).write_bytes(b"damaged")
    run(f"state_dir={tensorrt}", f"engine.dir={folder}")  # which nobody builds anew
    watched.fires(alert, "EdgeAsrStarting")
    shutil.copytree(plan(), folder.with_name("draft"))
    folder.rename(folder.with_name("damaged"))
    folder.with_name("draft").rename(folder)
    watched.is_quiet()


@injects("EdgeAsrMicrophoneGone")
def test_the_microphone_is_unplugged(alert: str, watched: Watched, run: Run, pulse_server: PulseServer) -> None:
    run(sources=MICROPHONE_SOURCE)
    watched.is_quiet()
    pulse_server.remove_sink()
    watched.fires(alert, "EdgeAsrDegraded")
    pulse_server.add_sink()
    watched.is_quiet()


@pytest.mark.slow
@injects("EdgeAsrMicrophoneGaps")
def test_the_sound_stops_for_seconds(alert: str, watched: Watched, run: Run, pulse_server: PulseServer) -> None:
    run(sources=MICROPHONE_SOURCE)
    watched.is_quiet()
    pulse_server.suspend()
    try:
        watched.fires("EdgeAsrMicrophoneGone", "EdgeAsrDegraded")
    finally:
        pulse_server.resume()
    watched.fires(alert, "EdgeAsrMicrophoneGone", "EdgeAsrDegraded")
    watched.is_quiet()


@pytest.mark.slow
@injects("EdgeAsrMicrophoneClips")
def test_the_microphone_is_too_loud(
    alert: str, watched: Watched, run: Run, pulse_server: PulseServer, tmp_path: Path
) -> None:
    noise = np.random.default_rng(2).uniform(-3, 3, 12 * SAMPLE_RATE).astype(np.float32)
    run(sources=MICROPHONE_SOURCE, program=("-c", ELSEWHERE, str(tmp_path)))
    watched.is_quiet()
    with pulse_server.play(write_wav(tmp_path / "loud.wav", np.clip(noise, -1, 1))):
        watched.fires(alert)
    watched.is_quiet()


def test_nothing_is_wrong_while_the_microphone_is_muted(
    watched: Watched, run: Run, broker: Mosquitto, pulse_server: PulseServer, tmp_path: Path
) -> None:
    put_processors(tmp_path / "state")  # mute is remembered
    run(f"state_dir={tmp_path / 'state'}", port=broker.port, sources=MICROPHONE_SOURCE)
    watched.is_quiet()
    send(broker.port, "edge_asr/hall/cmd/mute", "on")
    watched.shows("edge_asr_microphone_up", "NaN")
    watched.is_quiet()
    send(broker.port, "edge_asr/hall/cmd/mute", "off")
    watched.shows("edge_asr_microphone_up", "1")
    watched.is_quiet()


@contextlib.contextmanager
def asking(port: int, clients: int) -> Iterator[None]:
    """Have so many clients ask for transcripts, one after another, until the block ends."""
    enough = threading.Event()
    sound = recording(next(iter(TEXTS))).read_bytes()

    def ask() -> None:
        while not enough.is_set():
            request = urllib.request.Request(f"http://127.0.0.1:{port}/recognize", sound, {"Content-Type": "audio/wav"})
            try:
                urllib.request.urlopen(request, timeout=PATIENCE_S).close()
            except urllib.error.HTTPError as refusal:
                refusal.close()
                enough.wait(0.05)  # it was told to wait for longer

    threads = [threading.Thread(target=ask, name=f"client {number}") for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()


@injects("EdgeAsrBusy")
def test_the_engine_has_no_time_left(alert: str, watched: Watched, run: Run, fault: Path) -> None:
    run(program=("-c", FAULTY, str(fault)))
    watched.is_quiet()
    fault.write_text("0.1")
    with asking(watched.port, clients=4):
        watched.fires(alert)
    watched.is_quiet()


@injects("EdgeAsrRefuses")
def test_more_is_asked_than_can_be_done(alert: str, watched: Watched, run: Run, fault: Path) -> None:
    run("http.limits.wait_s=0.5", "http.limits.requests_per_minute=100000", program=("-c", FAULTY, str(fault)))
    watched.is_quiet()
    fault.write_text("0.1")
    with asking(watched.port, clients=4):
        watched.fires(alert, "EdgeAsrBusy")
    watched.is_quiet()


@injects("EdgeAsrSlowedDown")
def test_the_device_is_too_hot(alert: str, watched: Watched, run: Run, tmp_path: Path) -> None:
    root = lay_out(tmp_path / "orin", {**ORIN, **DEVICES})
    run(program=("-c", ELSEWHERE, str(root)))
    watched.is_quiet()
    lay_out(root, {f"{COOLING}2/cur_state": "1"})
    watched.fires(alert, "EdgeAsrDegraded")
    lay_out(root, {f"{COOLING}2/cur_state": "0"})
    watched.ends(alert)
