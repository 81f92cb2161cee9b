"""Three servers behind a real HAProxy: one is killed under load, and who asks again loses nothing."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from bundled import BUNDLE, REPOSITORY, transcripts
from mosquitto import PATIENCE_S, find_program, free_port, wait_for
from websockets.sync.client import connect

CONFIG = REPOSITORY / "deploy" / "haproxy" / "haproxy.cfg"
TEXTS = transcripts()
SOUNDS = {name: (BUNDLE / "samples" / name).read_bytes() for name in TEXTS}
CLIENTS, REQUESTS = 6, 40
AGAIN = {429, 502, 503, 504}
"""What a client that asks again takes for a reason to."""


def haproxy() -> str:
    if (found := find_program("haproxy")) is None:
        pytest.skip("not installed: haproxy (Debian: apt install haproxy)")
    return found


class Server:
    """`edge-asr run` as a server only, on a port that it keeps over restarts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.port = free_port()
        self._folder = folder
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "state_dir": self._folder / self._name,
            "mqtt.enabled": "false",
            "outbox.enabled": "false",
            "engine.threads": 1,
            "http.enabled": "true",
            "http.port": self.port,
            "http.limits.requests_per_minute": 100_000,
        }
        command = [sys.executable, "-W", "error", "-m", "edge_asr", "run", "--model", os.fspath(BUNDLE)]
        command += [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
        with (self._folder / f"{self._name}.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(PATIENCE_S)
            self._process = None

    @property
    def answered(self) -> int:
        """How many requests it has answered since its start; -1 if it does not answer this one."""
        try:
            metrics = ask(self.port, "GET", "/metrics")[1].decode()
        except (OSError, http.client.HTTPException):
            return -1
        counts = re.findall(r"^edge_asr_request_seconds_count\S* (\S+)$", metrics, re.MULTILINE)
        return int(sum(float(count) for count in counts))


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, body, {"Content-Type": "audio/wav"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Server]]:
    made = [Server(tmp_path, name) for name in ("one", "two", "three")]
    for server in made:
        server.start()
    try:
        wait_for(lambda: all(is_ready(server.port) for server in made), "the servers")
        yield made
    finally:
        for server in made:
            server.end(signal.SIGTERM)


def is_ready(port: int) -> bool:
    try:
        return ask(port, "GET", "/readyz")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


@pytest.fixture
def front(tmp_path: Path, servers: list[Server]) -> Iterator[int]:
    """The port of a HAProxy before the servers: the shipped configuration, but for its ports."""
    port = free_port()
    text = CONFIG.read_text(encoding="utf-8")
    ports = {"8000": port, **{str(8081 + index): server.port for index, server in enumerate(servers)}}
    for old, new in ports.items():
        assert text.count(f"127.0.0.1:{old}\n") == 1
        text = text.replace(f"127.0.0.1:{old}\n", f"127.0.0.1:{new}\n")
    (tmp_path / "haproxy.cfg").write_text(text, encoding="utf-8")
    with (tmp_path / "haproxy.log").open("wb") as log:
        process = subprocess.Popen([haproxy(), "-f", tmp_path / "haproxy.cfg"], stdout=log, stderr=log)
    try:
        wait_for(lambda: is_ready(port), "HAProxy")
        yield port
    finally:
        process.kill()
        process.wait(PATIENCE_S)


class Load:
    """Clients that ask for all recordings again and again, until each has had `REQUESTS` answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.answers = 0
        self.repeated = 0
        self.failed: list[str] = []
        self.wrong: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        except BaseException:  # also Ctrl-C: nobody waits for the answers any more
            self._over.set()
            raise
        finally:
            for thread in threads:
                thread.join()

    def _client(self, number: int) -> None:
        names = list(TEXTS)
        for index in range(REQUESTS):
            if self._over.is_set():
                return
            name = names[(number + index) % len(names)]
            text = self._text(SOUNDS[name])
            with self._lock:
                self.answers += 1
                if text not in (None, TEXTS[name]):
                    self.wrong.append(f"{name}: {text}")

    def _text(self, sound: bytes) -> str | None:
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            try:
                status, body = ask(self._port, "POST", "/recognize", sound)
                if status == 200:
                    return str(json.loads(body)["text"])
                problem = f"HTTP {status}: {body[:200]!r}"
                lasting = status not in AGAIN
            except (OSError, http.client.HTTPException) as error:
                problem, lasting = repr(error), False
            if lasting or time.monotonic() > give_up_at or self._over.is_set():
                with self._lock:
                    self.failed.append(problem)
                return None
            with self._lock:
                self.repeated += 1
            self._over.wait(0.1)  # a client is polite


def test_the_shipped_file_is_valid() -> None:
    result = subprocess.run([haproxy(), "-c", "-f", CONFIG], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr


@pytest.mark.slow
def test_who_asks_again_loses_nothing_where_one_is_killed_under_load(servers: list[Server], front: int) -> None:
    load = Load(front)
    victim = servers[1]
    with load.running():
        wait_for(lambda: load.answers > CLIENTS * REQUESTS // 4, "a quarter of the answers")
        assert victim.answered > 0
        victim.end(signal.SIGKILL)
        others = [server.answered for server in (servers[0], servers[2])]
        wait_for(lambda: load.answers > CLIENTS * REQUESTS // 2, "half of the answers")
        victim.start()
    assert (load.failed, load.wrong) == ([], [])
    assert load.answers == CLIENTS * REQUESTS
    assert all(server.answered > before for server, before in zip((servers[0], servers[2]), others, strict=True))
    # It is one of them again.
    wait_for(lambda: is_ready(victim.port), "the one that was killed")

    def is_asked_again() -> bool:
        with ThreadPoolExecutor(CLIENTS) as pool:
            codes = list(pool.map(lambda sound: ask(front, "POST", "/recognize", sound)[0], SOUNDS.values()))
        assert codes == [200] * len(SOUNDS)
        return victim.answered > 0

    wait_for(is_asked_again, "a request for the one that was killed")


@pytest.mark.slow
def test_streams_go_through_it(front: int) -> None:
    name, text = next(iter(TEXTS.items()))
    with connect(f"ws://127.0.0.1:{front}/stream_recognize") as socket:
        socket.send(SOUNDS[name][44:])
        socket.send('{"type": "end"}')
        finals = [reply["text"] for reply in map(json.loads, socket) if reply["type"] == "final"]
    assert finals == [text]
