"""Fixtures that several test modules share."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import one_thread  # noqa: F401 - before anything else loads NumPy

# isort: split
import pytest
from bundled import BUNDLE
from certificates import Certificates, make_certificates
from daemons import Daemon, Start
from mosquitto import PATIENCE_S, Mosquitto, find_program
from pulse import MICROPHONE, PulseServer, missing_parts

from edge_asr.config import Config
from edge_asr.config_server import HttpConfig
from edge_asr.engine import trial
from edge_asr.engine.build import build_engine
from edge_asr.loader import engine_folder
from edge_asr.recognizer.bundle import FP32, read_bundle
from edge_asr.types import Samples


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the models that whoever runs the tests has pulled out of them; yield where state goes instead."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        patch.delenv("STATE_DIRECTORY", raising=False)
        # What most tests load. In fp32, for which of the two is faster would change from run to run.
        bundle = read_bundle(BUNDLE)
        build_engine(bundle, FP32, engine_folder(bundle, folder / "edge_asr"), threads=1)
        yield folder / "edge_asr"


@pytest.fixture(scope="session", autouse=True)
def no_server_unless_asked_for() -> Iterator[None]:
    """Open no port where a test says nothing of it: several daemons would want the same one."""
    field = Config.__pydantic_fields__["http"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_ASR_HTTP__ENABLED", "false")
        patch.setattr(field, "default", HttpConfig(enabled=False))
        Config.model_rebuild(force=True)
        yield
    Config.model_rebuild(force=True)


@pytest.fixture(scope="session", autouse=True)
def babble_made_once() -> Iterator[None]:
    """Make the babble that engines are tried on once for each length: to make it takes longer than to hear it."""
    make = trial.babble

    @cache
    def babble(seconds: float) -> Samples:
        sound = make(seconds)
        sound.setflags(write=False)
        return sound

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "babble", babble)
        yield


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard() -> None:
    """Handle what nohup, or a script's &, lets us ignore: processes that tests start would ignore it as well."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo what a command that ran in this process set up: its stream is gone after the test."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def mosquitto_installed() -> None:
    """Skip what needs the real broker where it is not installed."""
    missing = [name for name in ("mosquitto", "mosquitto_sub", "mosquitto_passwd") if find_program(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: apt install mosquitto mosquitto-clients)")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Return certificates for TLS: an authority's, the broker's, a client's, and those of strangers."""
    if find_program("openssl") is None:
        pytest.skip("not installed: openssl (Debian: apt install openssl)")
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def broker(tmp_path: Path, mosquitto_installed: None) -> Iterator[Mosquitto]:
    """Yield a running Mosquitto that admits everybody."""
    server = Mosquitto(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return what starts a daemon: `start(port, *arguments)`; at the end none is left."""
    daemons: list[Daemon] = []
    number = count()

    def run(port: int, *arguments: str, **keys: Any) -> Daemon:
        daemons.append(Daemon(tmp_path / f"daemon-{next(number)}.log", port, *arguments, **keys))
        return daemons[-1]

    yield run
    for daemon in daemons:
        daemon.process.kill()
        daemon.process.wait(PATIENCE_S)
        assert daemon.process.stdin is not None
        try:
            daemon.process.stdin.close()
        except BrokenPipeError:
            continue  # it had not read everything


@pytest.fixture
def plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let recording processes find made-up devices; yield what changes these, and their faults (fake_sounddevice)."""
    monkeypatch.setenv("FAKE_SOUNDDEVICE", str(tmp_path / "devices.json"))
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/sounddevice.py").symlink_to(Path(__file__).parent / "fake_sounddevice.py")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "fake"), *sys.path])

    def change(*devices: dict[str, object], **faults: object) -> None:
        (tmp_path / "part.json").write_text(json.dumps({"devices": devices, **faults}))
        (tmp_path / "part.json").replace(tmp_path / "devices.json")

    return change


@pytest.fixture
def pulse_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PulseServer]:
    """Yield a running PulseAudio with a virtual microphone of 16 kHz; recording processes find no other."""
    if missing := missing_parts():
        remedy = "Debian: apt install pulseaudio pulseaudio-utils libasound2-plugins libportaudio2"
        if os.environ.get("CI"):
            pytest.fail(f"not installed: {', '.join(missing)} ({remedy}); CI is set, so no test may be skipped")
        pytest.skip(f"not installed: {', '.join(missing)} ({remedy})")
    server = PulseServer()
    for name in ("PULSE_SERVER", "PULSE_SOURCE", "PULSE_SINK", "ALSA_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    try:
        server.start(**{MICROPHONE: (16_000, 1)})
        yield server
    finally:
        server.close()
