"""TLS and WebSockets that do not come about: what is said of it."""

from __future__ import annotations

import base64
import hashlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificate, Certificates, openssl
from connections import VERSIONS, Served, way_in
from mosquitto import PATIENCE_S, Mosquitto
from odd_brokers import Visitor, odd_broker

from edge_asr.config_mqtt import MqttConfig, TlsConfig
from edge_asr.errors import ConfigError
from edge_asr.publish import second_look, tls
from edge_asr.publish.client import in_words

Start = Callable[..., Mosquitto]


@pytest.fixture
def start_broker(tmp_path_factory: pytest.TempPathFactory, mosquitto_installed: None) -> Iterator[Start]:
    """Return what starts a Mosquitto; at the end none is left."""
    started: list[Mosquitto] = []

    def run(**keys: Any) -> Mosquitto:
        started.append(Mosquitto(tmp_path_factory.mktemp("broker"), **keys))
        started[-1].start()
        return started[-1]

    yield run
    for broker in started:
        broker.kill()


@pytest.fixture(scope="module")
def everywhere(
    tmp_path_factory: pytest.TempPathFactory, mosquitto_installed: None, certificates: Certificates
) -> Iterator[Mosquitto]:
    """Yield a Mosquitto that can be reached on all ways."""
    server = Mosquitto(tmp_path_factory.mktemp("everywhere"), tls=certificates.server, websockets=True)
    server.start()
    yield server
    server.kill()


def failure(config: MqttConfig, *, version: str = "5", lasting: bool = True) -> str:
    """Return why there is no connection."""
    with Served(config, protocol=version) as served:
        why = served.fail()
        assert served.connection.lasting == lasting, why
        assert not served.connection.hung_up or not lasting, "the version is not to blame"
        return why


@pytest.mark.parametrize("way", ["tls", "websockets+tls"])
@pytest.mark.parametrize("trusted", ["foreign", None])
def test_a_certificate_that_nobody_trusted_has_signed(
    everywhere: Mosquitto, certificates: Certificates, way: str, trusted: str | None
) -> None:
    keys = {"ca_file": certificates.foreign.file} if trusted else {"enabled": True}
    why = failure(way_in(everywhere, way, tls=keys))
    assert why.startswith("its certificate is not trusted (")
    assert why.endswith("; set mqtt.tls.ca_file to the certificate of whoever signed it")


def test_the_certificate_of_the_broker_itself_may_be_what_is_trusted(
    everywhere: Mosquitto, certificates: Certificates
) -> None:
    with Served(way_in(everywhere, "tls", tls={"ca_file": certificates.server.file})) as served:
        served.connect()


def test_a_certificate_for_another_host_is_said_to_be_so(start_broker: Start, certificates: Certificates) -> None:
    broker = start_broker(tls=certificates.authority.issue("elsewhere", ("broker.lan", "10.0.0.7")))
    for host in ("127.0.0.1", "localhost"):
        why = failure(way_in(broker, "tls", certificates, host=host))
        assert why.startswith(f"its certificate is valid for broker.lan, 10.0.0.7, not for {host}; set mqtt.host")


def test_a_certificate_that_has_expired(start_broker: Start, certificates: Certificates) -> None:
    broker = start_broker(tls=certificates.authority.issue("old", ("127.0.0.1",), days=-1))
    assert failure(way_in(broker, "tls", certificates)).startswith("its certificate has expired; renew it")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", ["tls", "websockets+tls"])
def test_a_broker_that_wants_a_certificate_of_ours(
    start_broker: Start, certificates: Certificates, version: str, way: str
) -> None:
    broker = start_broker(tls=certificates.server, client_authority=certificates.authority.file, websockets=True)
    trust = {"ca_file": certificates.authority.file}

    def with_own(own: Certificate) -> MqttConfig:
        return way_in(broker, way, tls={**trust, "cert_file": own.file, "key_file": own.key})

    why = failure(way_in(broker, way, certificates), version=version)
    assert why == "it asks for a certificate of ours; set mqtt.tls.cert_file and mqtt.tls.key_file"
    for wrong in (certificates.foreign.issue("stranger"), certificates.authority.issue("expired", days=-1)):
        why = failure(with_own(wrong), version=version)
        assert why.startswith("it does not accept our certificate; set mqtt.tls.cert_file")
    with Served(with_own(certificates.client), protocol=version) as served:
        served.connect()
        served.deliver("edge_asr/hall/transcript", "x")


def test_a_key_may_be_locked_and_a_certificate_and_its_key_in_one_file(
    start_broker: Start, certificates: Certificates, tmp_path: Path
) -> None:
    broker = start_broker(tls=certificates.server, client_authority=certificates.authority.file)
    password = tmp_path / "password"
    password.write_text("open-sesame\n")
    own = certificates.authority.issue("locked", key_password=password)
    both = tmp_path / "both.pem"
    both.write_bytes(own.file.read_bytes() + own.key.read_bytes())
    keys = {"ca_file": certificates.authority.file, "cert_file": both, "key_password_file": password}
    with Served(way_in(broker, "tls", tls=keys)) as served:
        served.connect()
    password.write_text("wrong-word\n")
    why = failure(way_in(broker, "tls", tls=keys))
    assert why == f"mqtt.tls.key_password_file: its password does not open the key in {both}; correct it"


def wrong_tls(certificates: Certificates, tmp_path: Path) -> dict[str, tuple[dict[str, Path], str]]:
    garbage, password = tmp_path / "garbage.pem", tmp_path / "password"
    garbage.write_text("nothing of the kind\n")
    password.write_text("open-sesame\n")
    own, other = certificates.client, certificates.server
    locked = certificates.authority.issue("locked-key", key_password=password)
    return {
        "garbage as authority": ({"ca_file": garbage}, "mqtt.tls.ca_file: .*garbage.pem holds no certificate in PEM"),
        "garbage as certificate": ({"cert_file": garbage}, "hold no certificate and key in PEM form"),
        "no key": ({"cert_file": own.file}, "hold no certificate and key in PEM form"),
        "another's key": ({"cert_file": own.file, "key_file": other.key}, "does not belong to .*; correct key_file"),
        "a locked key": ({"cert_file": locked.file, "key_file": locked.key}, "is encrypted; name the file with its"),
    }


@pytest.mark.parametrize(
    "name", ["garbage as authority", "garbage as certificate", "no key", "another's key", "a locked key"]
)
def test_files_that_cannot_be_used_are_named(name: str, certificates: Certificates, tmp_path: Path) -> None:
    keys, words = wrong_tls(certificates, tmp_path)[name]
    config = TlsConfig.model_validate(keys)
    with pytest.raises(ConfigError, match=words):
        tls.make_context(config)


@pytest.mark.parametrize("key", ["ca_file", "cert_file", "key_password_file"])
def test_a_file_that_has_gone_is_named_and_may_come_back(
    key: str, everywhere: Mosquitto, certificates: Certificates, tmp_path: Path
) -> None:
    password = tmp_path / "password"
    password.write_text("open-sesame")
    locked = certificates.authority.issue("gone-later", key_password=password)
    keys = {"ca_file": certificates.authority.file, "cert_file": locked.file, "key_file": locked.key}
    files = {**keys, "key_password_file": password}
    files[key] = tmp_path / f"{key}.pem"
    content = {**keys, "key_password_file": password}[key].read_bytes()
    files[key].write_bytes(content)
    config = way_in(everywhere, "tls", tls=files)
    files[key].unlink()
    why = failure(config)
    assert key in why
    assert f"cannot read {files[key]}" in why
    files[key].write_bytes(content)
    with Served(config) as served:
        served.connect()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("spoken", "port", "words"),
    [
        ("tcp", "tls_port", "it speaks TLS on this port; set mqtt.tls"),
        ("tcp", "websocket_port", "a web server answers there; set mqtt.transport to websockets"),
        ("tcp", "websocket_tls_port", "it speaks TLS on this port; set mqtt.tls"),
        ("tls", "port", "it does not speak TLS on this port; set mqtt.port"),
        ("tls", "websocket_port", "it does not speak TLS on this port; set mqtt.port"),
        ("tls", "websocket_tls_port", "a web server answers there; set mqtt.transport to websockets"),
        ("websockets", "port", "it does not answer as a WebSocket server; correct mqtt.port"),
        ("websockets", "tls_port", "it speaks TLS on this port; set mqtt.tls"),
        ("websockets+tls", "port", "it does not speak TLS on this port; set mqtt.port"),
        ("websockets+tls", "tls_port", "it does not answer as a WebSocket server; correct mqtt.port"),
    ],
)
def test_a_port_for_something_else_is_said_to_be_so(
    everywhere: Mosquitto,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    spoken: str,
    port: str,
    words: str,
) -> None:
    monkeypatch.setattr(second_look, "ALERT_S", 0.1)
    config = way_in(everywhere, spoken, certificates).model_copy(update={"port": getattr(everywhere, port)})
    assert failure(config, version=version).startswith(words)


@pytest.mark.parametrize(
    ("answer", "lasting", "words"),
    [
        ("HTTP/1.1 404 Not Found", True, "it has no WebSocket at /mqtt (HTTP 404 Not Found); correct mqtt.websocket"),
        ("HTTP/1.1 403 Forbidden", True, "it refuses the WebSocket (HTTP 403 Forbidden); let the web server"),
        ("HTTP/1.1 502 Bad Gateway", False, "the web server there does not reach the broker (HTTP 502 Bad Gateway)"),
        ("HTTP/1.1 200 OK", True, "it answers, but opens no WebSocket (HTTP 200 OK); correct"),
        ("HTTP/1.1 299", True, "it answers, but opens no WebSocket (HTTP 299); correct"),
        ("HTTP/1.1 101 Switching Protocols", False, "it broke off the opening of the WebSocket"),
        ("SSH-2.0-OpenSSH", True, "it does not answer as a WebSocket server"),
    ],
)
def test_a_web_server_that_opens_no_websocket(answer: str, lasting: bool, words: str) -> None:
    def talk(visitor: Visitor) -> None:
        visitor.sock.recv(4096)
        visitor.send(f"{answer}\r\nConnection: close\r\n\r\n".encode())

    with odd_broker(talk) as broker:
        config = MqttConfig.model_validate({"port": broker.port, "transport": "websockets"})
        assert failure(config, lasting=lasting).startswith(words)


def test_no_connect_follows_a_handshake_that_nobody_waits_for_any_more() -> None:
    """It would end the newer connection of the owner, which has the same client id."""

    def talk(visitor: Visitor) -> None:
        request = visitor.sock.recv(4096).decode()
        assert bound.wait(PATIENCE_S)
        served.connection.drop()
        key = request.partition("Sec-WebSocket-Key: ")[2].partition("\r\n")[0]
        accepted = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
        visitor.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(accepted) + b"\r\n\r\n"
        )
        received.append(visitor.sock.recv(4096))

    received: list[bytes] = []
    bound = threading.Event()  # it connects before its maker has it
    with odd_broker(talk) as broker:
        config = MqttConfig.model_validate({"port": broker.port, "transport": "websockets"})
        with Served(config) as served:
            bound.set()
            served.until(lambda s: received, "the end of the connection")
    assert received == [b""]


def test_a_server_that_never_answers_the_handshake_is_given_up(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr("edge_asr.publish.connection.CONNECT_TIMEOUT_S", 0.1)
        for keys in ({"tls": {"ca_file": certificates.authority.file}}, {"transport": "websockets"}):
            why = failure(MqttConfig.model_validate({"port": port, **keys}), lasting=False)
            assert why.startswith("it does not answer")


def test_a_server_that_hangs_up_in_the_handshake(certificates: Certificates) -> None:
    def talk(visitor: Visitor) -> None:
        visitor.sock.recv(5)

    with odd_broker(talk) as broker:
        keys = {"port": broker.port, "tls": {"ca_file": certificates.authority.file}}
        assert failure(MqttConfig.model_validate(keys)).startswith("it does not speak TLS on this port")


def test_old_tls_is_refused_on_our_side(certificates: Certificates) -> None:
    context = tls.make_context(TlsConfig.model_validate({"ca_file": certificates.authority.file}))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED


def test_every_error_of_tls_has_words(certificates: Certificates) -> None:
    config = MqttConfig()
    for reason, words in {
        "TLSV1_ALERT_PROTOCOL_VERSION": "it does not speak TLS 1.2 or later",
        "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.2 or later",
        "NO_SHARED_CIPHER": "TLS failed: no shared cipher",
        "CERTIFICATE_VERIFY_FAILED": "TLS failed: certificate verify failed",
    }.items():
        error = ssl.SSLError(1, "x")
        error.reason = reason
        assert in_words(error, config).startswith(words)


def test_the_certificates_of_these_tests_are_what_they_say(certificates: Certificates) -> None:
    openssl("verify", "-CAfile", certificates.authority.file, certificates.server.file, certificates.client.file)
    with pytest.raises(AssertionError):
        openssl("verify", "-CAfile", certificates.foreign.file, certificates.server.file)
