"""`edge-asr health` against a real daemon: ready, not ready, not there, somebody else, by TLS, and nobody to ask."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from certificates import Authority
from mosquitto import wait_for
from speech_server import serving

from edge_asr.cli import main


def ask(capsys: pytest.CaptureFixture[str], port: int, *options: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["health", "-o", "http.enabled=true", "-o", f"http.port={port}", *options])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@contextmanager
def another_server(status: int, body: bytes) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="another")
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_daemon_that_recognises_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        wait_for(lambda: ask(capsys, server.port) == (0, "ready\n", ""), "the daemon to be healthy")


def test_a_daemon_on_all_addresses_is_asked_on_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("t" * 43 + "\n")
    options = ("-o", "http.host=0.0.0.0", "-o", f"http.token_file={tokens}")
    with serving(http={"host": "0.0.0.0", "token_file": tokens}) as server:
        wait_for(lambda: ask(capsys, server.port, *options) == (0, "ready\n", ""), "the daemon to be healthy")


def test_a_daemon_with_a_certificate_is_asked_by_tls(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = Authority(tmp_path, "authority").issue("hall.local", ["hall.local"])
    options = ("-o", f"http.tls.cert_file={made.file}", "-o", f"http.tls.key_file={made.key}")
    with serving(http={"tls": {"cert_file": made.file, "key_file": made.key}}) as server:
        wait_for(lambda: ask(capsys, server.port, *options) == (0, "ready\n", ""), "the daemon to be healthy")


def test_a_daemon_without_a_model_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with another_server(503, b'{"state": "starting"}') as port:
        code, out, err = ask(capsys, port)
    assert (code, out) == (1, "")
    assert err == "edge-asr: not ready: starting (HTTP 503); see the log, and `why` in its state\n"


def test_nobody_there_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, out, err = ask(capsys, port)
    assert (code, out) == (1, "")
    assert err.startswith(f"edge-asr: no answer from 127.0.0.1:{port} (")
    assert err.endswith("does edge-asr run?\n")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b"7"])
def test_another_program_is_not_taken_for_it(capsys: pytest.CaptureFixture[str], body: bytes) -> None:
    with another_server(200, body) as port:
        code, _, err = ask(capsys, port)
    assert code == 1
    assert "is not edge-asr" in err


@pytest.mark.parametrize(("option", "key"), [("http.enabled=false", "http.enabled"), ("http.port=0", "http.port")])
def test_with_nobody_to_ask_it_says_so(capsys: pytest.CaptureFixture[str], option: str, key: str) -> None:
    code, _, err = ask(capsys, 8080, "-o", option)
    assert code == 2
    assert err.startswith(f"edge-asr: {key}: ")
    assert "without a health check" in err
