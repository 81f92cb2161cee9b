"""Ports of the speech server: encrypted ones, and ones that somebody else has."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
import ssl
from pathlib import Path

import pytest
from bundled import recording, transcripts
from certificates import Certificates
from mosquitto import PATIENCE_S, wait_for
from speech_server import serving
from websockets.asyncio.client import connect

from edge_asr.app import Daemon
from edge_asr.config import Config
from edge_asr.errors import ConfigError
from edge_asr.serve import server as server_module


def get(port: int, path: str, context: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    connection = (
        http.client.HTTPConnection("localhost", port, timeout=PATIENCE_S)
        if context is None
        else http.client.HTTPSConnection("localhost", port, timeout=PATIENCE_S, context=context)
    )
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


async def test_http_and_funasr_are_encrypted_where_a_certificate_is_configured(certificates: Certificates) -> None:
    tls = {"cert_file": certificates.server.file, "key_file": certificates.server.key}
    trusting = ssl.create_default_context(cafile=certificates.authority.file)
    with serving(http={"tls": tls}, funasr={"tls": tls}) as server:
        assert (await asyncio.to_thread(get, server.port, "/readyz", trusting))[0] == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(get, server.port, "/readyz", ssl.create_default_context())
        with pytest.raises((http.client.HTTPException, OSError)):
            await asyncio.to_thread(get, server.port, "/readyz")
        name, text = min(transcripts().items())
        async with connect(f"wss://localhost:{server.funasr_port}", ssl=trusting) as client:
            await client.send(json.dumps({"mode": "offline", "wav_name": "demo", "is_speaking": True}))
            await client.send(recording(name).read_bytes())
            await client.send('{"is_speaking": false}')
            answer = json.loads(await asyncio.wait_for(client.recv(), PATIENCE_S))
        assert answer["text"] == text


@pytest.mark.parametrize("section", ["http", "funasr"])
def test_what_does_not_encrypt_is_one_line_when_it_starts(
    section: str, certificates: Certificates, tmp_path: Path
) -> None:
    locked = certificates.authority.issue("locked", ("localhost",), key_password=password(tmp_path))
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for tls, why in (
        ({"cert_file": nothing}, "hold no certificate and key in PEM form"),
        ({"cert_file": certificates.server.file, "key_file": certificates.client.key}, "does not belong to"),
        ({"cert_file": locked.file, "key_file": locked.key}, "is encrypted"),
    ):
        config = Config.model_validate({"mqtt": {"enabled": False}, section: {"enabled": True, "tls": tls}})
        with pytest.raises(ConfigError, match=rf"^{section}\.tls: .*{why}"):
            Daemon(config)


def password(folder: Path) -> Path:
    file = folder / "password"
    file.write_text("secret")
    return file


def test_a_port_that_is_taken_is_told_and_opened_when_it_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "RETRY_S", (0.01, 0.02))
    with socket.create_server(("127.0.0.1", 0)) as other, caplog.at_level(logging.WARNING):
        port = other.getsockname()[1]
        told = f"funasr: 127.0.0.1:{port} cannot be opened (Address already in use); "
        with serving(funasr={"port": port}, taken=frozenset({"funasr"})) as server:
            wait_for(lambda: server.server.trouble.startswith(told), "the trouble")
            assert get(server.port, "/readyz")[0] == 200
            other.close()
            wait_for(lambda: server.daemon.ports.get("funasr") == port, "the port")
            assert server.server.trouble == ""
    assert [message.startswith(told) for message in caplog.messages] == [True]
