"""What systemd hears, and SIGHUP: the model is loaded anew, or goes on and says why; that of a terminal ends it."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bundled import BUNDLE
from daemons import SENTENCES, Daemon, Start, is_ready
from mosquitto import Mosquitto, Subscriber, wait_for
from test_reload import put_model

from edge_asr.loader import engine_folder
from edge_asr.recognizer.bundle import read_bundle

SERVICE = "import os; os.setsid(); from edge_asr import cli; cli.main()"
"""As systemd starts it: without a terminal."""
NOHUP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); " + SERVICE
IN_A_TERMINAL = """
import fcntl, os, sys, termios
from edge_asr import cli

os.setsid()
fcntl.ioctl(os.open(sys.argv.pop(1), os.O_RDWR), termios.TIOCSCTTY, 0)
cli.main()
"""

BUILDING = "from edge_asr import child, cli; child._command = lambda *given: ['sleep', '60']; cli.main()"
"""It never ends to build its engine."""


class Systemd:
    """What systemd is told, in order."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self._heard: list[str] = []

    def __call__(self) -> list[str]:
        """Return all notifications so far, but for signs of life and the figures beside them."""
        while True:
            try:
                self._heard.append(self._server.recv(4096).decode())
            except BlockingIOError:
                return [re.sub("\nMONOTONIC_USEC.*", "", line) for line in self._heard]

    def reloads(self) -> list[str]:
        return [line for line in self() if line in ("RELOADING=1", "READY=1")]


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        server.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield Systemd(server)


@pytest.fixture
def run(start: Start, broker: Mosquitto, tmp_path: Path, state_folder: Path) -> Callable[..., Daemon]:
    """Return what starts a daemon by a program, on a model of its own with the engine that there is."""
    put_model(tmp_path / "model")
    engine = engine_folder(read_bundle(BUNDLE), state_folder)
    options = [f"state_dir={tmp_path / 'state'}", f"engine.dir={engine}", f"model={tmp_path / 'model'}"]
    arguments = [part for option in (*options, "log.level=DEBUG") for part in ("-o", option)]
    return lambda *program: start(broker.port, *arguments, "--source", "stdin", program=("-c", *program))


def errors(daemon: Daemon) -> list[str]:
    return [line.partition("ERROR")[2] for line in daemon.log.splitlines() if " ERROR " in line]


def test_it_loads_the_model_anew_or_the_old_one_goes_on(
    run: Callable[..., Daemon], broker: Mosquitto, systemd: Systemd, tmp_path: Path
) -> None:
    with Subscriber(broker.port) as subscriber:
        daemon = run(SERVICE)
        subscriber.wait_for(is_ready, "ready")
        put_model(tmp_path / "model", 灯="登")
        daemon.process.send_signal(signal.SIGHUP)
        wait_for(lambda: systemd.reloads() == ["READY=1", "RELOADING=1", "READY=1"], "a reload")
        daemon.hears(SENTENCES[0].replace("灯", "登"), SENTENCES[0])
        assert not errors(daemon)

        (tmp_path / "model" / "tokens.json").unlink()
        daemon.process.send_signal(signal.SIGHUP)
        wait_for(lambda: systemd.reloads()[3:] == ["RELOADING=1", "READY=1"], "another")
        [line] = errors(daemon)
        assert "onnx-fp32 of model goes on: " in line
        why = f"the last reload failed: {line.partition('goes on: ')[2]}"
        assert "no token list" in why
        subscriber.wait_for(lambda s: s.on("state")[-1].json["why"] == why, "the state says why")
        assert is_ready(subscriber)
        assert systemd().index(f"STATUS=ready: {why}") == len(systemd()) - 2, "before it is ready again"
        daemon.hears(SENTENCES[0].replace("灯", "登"), SENTENCES[0])

        put_model(tmp_path / "model")
        daemon.process.send_signal(signal.SIGHUP)
        subscriber.wait_for(lambda s: s.on("state")[-1].json["why"] == "", "all is well")
        assert daemon.stop() == 0
        assert systemd()[-1] == "STOPPING=1\nSTATUS=stopping"


def test_many_while_the_model_is_being_loaded_are_one_reload_and_at_the_stop_they_are_nothing(
    run: Callable[..., Daemon], systemd: Systemd
) -> None:
    daemon = run(SERVICE)
    daemon.wait_for("publishing on")
    for _ in range(20):
        daemon.process.send_signal(signal.SIGHUP)
    wait_for(lambda: systemd.reloads() == ["READY=1", "RELOADING=1", "READY=1"], "one reload")
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for("stopping")
    for _ in range(20):
        daemon.process.send_signal(signal.SIGHUP)
    assert daemon.end() == 0
    assert systemd.reloads() == ["READY=1", "RELOADING=1", "READY=1"]
    assert not errors(daemon)


def test_one_that_is_ignored_stays_ignored(run: Callable[..., Daemon], systemd: Systemd) -> None:
    daemon = run(NOHUP)
    daemon.wait_for("listening to")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.hears(SENTENCES[0])
    assert systemd.reloads() == ["READY=1"]
    assert daemon.stop() == 0


def test_that_of_a_terminal_which_is_gone_ends_it(run: Callable[..., Daemon], systemd: Systemd) -> None:
    ours, its = pty.openpty()
    daemon = run(IN_A_TERMINAL, os.ttyname(its))
    wait_for(lambda: systemd.reloads() == ["READY=1"], "ready")
    os.close(its)
    os.close(ours)
    assert daemon.end() == -signal.SIGHUP


def test_systemd_waits_while_an_engine_is_being_built(
    start: Start, broker: Mosquitto, systemd: Systemd, tmp_path: Path
) -> None:
    options = ["-o", f"state_dir={tmp_path / 'state'}", "--model", str(BUNDLE), "--source", "stdin"]
    daemon = start(broker.port, *options, program=("-c", BUILDING))
    wait_for(lambda: "EXTEND_TIMEOUT_USEC=120000000" in systemd(), "it asks for more time")
    assert "STATUS=starting: its engine is being built" in systemd()
    assert daemon.stop() == 0
    assert not systemd.reloads()
