"""A real Mosquitto on a free loopback port, and a subscriber that is the real mosquitto_sub."""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

from certificates import Certificate

PATIENCE_S = 30.0
"""How long a test waits for what must happen; far more than it takes."""


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return as soon as the condition holds; fail with `what` was waited for."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > give_up_at:
            raise AssertionError(f"waited {timeout_s:.0f} s in vain for: {what}")
        time.sleep(0.005)


def find_program(name: str) -> str | None:
    """Return the path of a program, also from the directory that Debian keeps daemons in."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


class Mosquitto:
    """A broker that keeps its ports over restarts, and forgets everything else unless it has `persistence`.

    Beside the plain `port`, from which tests read, it listens to TLS and WebSockets where that is asked for.
    """

    def __init__(
        self,
        directory: Path,
        *,
        username: str | None = None,
        password: str | None = None,
        tls: Certificate | None = None,
        client_authority: Path | None = None,
        websockets: bool = False,
        access: Sequence[str] = (),
        persistence: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        """Write the settings: `tls` is the broker's certificate, and `client_authority` signs those of clients, who
        then need one there. `access` is a list of access rules, `options` are further lines of mosquitto.conf.
        """
        self.port = free_port()
        self.tls_port = free_port() if tls else 0
        self.websocket_port = free_port() if websockets else 0
        self.websocket_tls_port = free_port() if tls and websockets else 0
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        lines = [f"persistence {_flag(persistence)}", f"allow_anonymous {_flag(username is None)}", *options]
        lines += ["log_type error", "log_type warning", "log_type notice", "log_type subscribe"]
        if persistence:
            lines += [f"persistence_location {directory}/", "autosave_interval 1", "autosave_on_changes true"]
        if username is not None:
            passwords = directory / "passwords"
            passwords.touch(mode=0o600)
            subprocess.run(
                ["mosquitto_passwd", "-b", passwords, username, password or ""], check=True, timeout=PATIENCE_S
            )
            lines += [f"password_file {passwords}"]
        if access:
            (directory / "access").write_text("\n".join(access) + "\n")
            lines += [f"acl_file {directory / 'access'}"]
        # Started by root, Mosquitto would become another user, who may not read the files.
        lines += [f"user {getpass.getuser()}", f"listener {self.port} 127.0.0.1"]
        secured = [f"certfile {tls.file}", f"keyfile {tls.key}"] if tls else []
        if client_authority is not None:
            secured += [f"cafile {client_authority}", "require_certificate true"]
        if tls:
            lines += [f"listener {self.tls_port} 127.0.0.1", *secured]
        if websockets:
            lines += [f"listener {self.websocket_port} 127.0.0.1", "protocol websockets"]
        if tls and websockets:
            lines += [f"listener {self.websocket_tls_port} 127.0.0.1", "protocol websockets", *secured]
        (directory / "mosquitto.conf").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """Start, and return when it accepts connections."""
        with (self._directory / "mosquitto.log").open("ab") as output:
            command = [find_program("mosquitto") or "mosquitto", "-c", str(self._directory / "mosquitto.conf")]
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_for(self._accepts, f"Mosquitto on port {self.port}")
        except AssertionError:
            self.kill()
            raise

    def stop(self) -> None:
        """End it as an administrator would."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it without warning."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it and start it anew on the same port."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Make it a black hole: the kernel accepts connections and bytes, nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on where it was frozen."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        """Return what it has written so far; it writes down every subscription."""
        return (self._directory / "mosquitto.log").read_text()

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.send_signal(signal.SIGCONT)
            self._process.wait(PATIENCE_S)
            self._process = None

    def _accepts(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            for port in filter(None, (self.port, self.tls_port, self.websocket_port, self.websocket_tls_port)):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class Message:
    """One line of mosquitto_sub."""

    topic: str
    qos: int
    retained: bool
    payload: str

    @property
    def json(self) -> dict[str, Any]:
        """The payload, where it is a JSON object."""
        content = json.loads(self.payload)
        assert isinstance(content, dict)
        return content


def send(port: int, topic: str, payload: str | bytes, *, retained: bool = False) -> None:
    """Publish a message with QoS 1, by the real mosquitto_pub."""
    raw = payload.encode() if isinstance(payload, str) else payload
    command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(port), "-q", "1", "-t", topic, "-s" if raw else "-n"]
    subprocess.run([*command, "-r"] if retained else command, input=raw, check=True, timeout=PATIENCE_S)


def send_lines(port: int, topic: str, payloads: list[str]) -> None:
    """Publish many messages with QoS 1, one after the other on one connection."""
    command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(port), "-q", "1", "-t", topic, "-l"]
    subprocess.run(command, input="\n".join(payloads).encode(), check=True, timeout=PATIENCE_S)


class Subscriber:
    """The real mosquitto_sub, QoS 1, in the background, until the end of the `with` block."""

    def __init__(
        self,
        port: int,
        topic: str = "#",
        *,
        username: str | None = None,
        password: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """Subscribe; `options` are further ones of mosquitto_sub, such as `--cafile` and its file."""
        self.messages: list[Message] = []
        self._subscribed = threading.Event()
        # -d: it says when the subscription is confirmed; stdbuf: in time, though it writes to a pipe.
        command = [
            "stdbuf",
            "-oL",
            "mosquitto_sub",
            "-h",
            "127.0.0.1",
            "-p",
            str(port),
            "-q",
            "1",
            "-t",
            topic,
            "-F",
            "%j",
            "-d",
        ]
        if username is not None:
            command += ["-u", username, "-P", password or ""]
        command += options
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._reader = threading.Thread(target=self._read, name="mosquitto_sub reader", daemon=True)
        self._reader.start()
        try:
            wait_for(self._subscribed.is_set, "the subscription")
        except AssertionError:
            self.close()  # no `with` block will do it
            raise

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def on(self, suffix: str) -> list[Message]:
        """Return what has arrived so far on topics that end so, in order."""
        return [message for message in list(self.messages) if message.topic.endswith("/" + suffix)]

    def wait_for(self, condition: Callable[[Subscriber], object], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Return as soon as the condition holds for what has arrived."""
        wait_for(
            lambda: condition(self), f"{what}; arrived: {[(m.topic, m.payload[:60]) for m in self.messages]}", timeout_s
        )

    def close(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(b"{"):
                fields = json.loads(line)
                retained = bool(fields["retain"])
                self.messages.append(Message(fields["topic"], fields["qos"], retained, fields["payload"] or ""))
            elif b"Subscribed" in line or b"SUBACK" in line:
                self._subscribed.set()


class Door:
    """A TCP forwarder in front of a broker: shut, it refuses connections and has cut those that went through it.

    A test opens it when the subscriber is there, so that nothing is published to nobody after a restart.
    """

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self._target_port = target_port
        self._listener: socket.socket | None = None
        self._passing: list[socket.socket] = []
        self._lock = threading.Lock()

    def open(self) -> None:
        """Let connections through."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._admit, args=(self._listener,), name="door", daemon=True).start()

    def shut(self) -> None:
        """Cut all connections and refuse new ones."""
        with self._lock:
            listener, self._listener = self._listener, None
            passing, self._passing = self._passing, []
        for sock in passing if listener is None else [listener, *passing]:
            with contextlib.suppress(OSError):  # already gone
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _admit(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the listener was shut
            while True:
                outside, _ = listener.accept()
                try:
                    inside = socket.create_connection(("127.0.0.1", self._target_port))
                except OSError:
                    outside.close()
                    continue
                with self._lock:
                    self._passing += [outside, inside]
                for pair in ((outside, inside), (inside, outside)):
                    threading.Thread(target=_pump, args=pair, name="door pump", daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):  # either side was cut
        while data := source.recv(65536):
            sink.sendall(data)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    """Return a port that no other process of tests uses, and that the kernel gives to no connection."""
    _, ports = _own_ports()
    while True:
        port = next(ports)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


@functools.cache
def _own_ports() -> tuple[socket.socket, Iterator[int]]:
    """Return a hundred ports below those of the kernel, and the socket on the first, which keeps others off."""
    for first in range(10_000, 32_000, 100):
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", first)), cycle(range(first + 1, first + 100))
    raise AssertionError("no ports left for tests")


def _flag(value: bool) -> str:
    return "true" if value else "false"
