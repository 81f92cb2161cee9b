"""Why a server hangs up or refuses: it is asked once more, on another connection, for paho does not keep its answer.

All functions block, for some seconds where the server is slow.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from http import HTTPStatus
from typing import Any

from edge_asr.config_mqtt import MqttConfig
from edge_asr.errors import ConfigError
from edge_asr.publish import reasons, tls
from edge_asr.publish.reasons import Problem

STEP_S = 5.0
"""For the connection, and for each step on it."""
ALERT_S = 1.0
"""How long a broker may take to say that it does not accept our certificate."""
CONNACK, TLS_ALERT = b"\x20", b"\x15\x03"
"""How these packets begin."""
STATUS = re.compile(rb"HTTP/\d\.\d (\d{3})")


def cut_short(config: MqttConfig, protocol: str, first: bytes, error: OSError | None) -> Problem:
    """Return why CONNECT was not answered: `first` is what came instead, `error` what the network said."""
    if first.startswith(TLS_ALERT):
        return speaks_tls()
    if first.startswith(b"HTTP"):
        return web_server()
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return tls.failed(error, config)
    if first.startswith(CONNACK):  # which only the other version can read
        return reasons.refused_connection(reasons.UNSUPPORTED_VERSION, f"no MQTT {protocol}")
    if first:
        return Problem("it answers, but not with MQTT", "correct mqtt.port and mqtt.transport", lasting=True)
    return _hung_up(config)


def _hung_up(config: MqttConfig) -> Problem:
    """Return why the server closed the connection when we said what we want."""
    if config.tls.enabled:
        if (refused := _refused_certificate(config)) is not None:
            return refused
        if config.transport == "tcp" and _status_of_upgrade(config) is not None:
            return web_server()
    elif _speaks_tls(config):
        return speaks_tls()
    remedy = "see whether mqtt.port, mqtt.transport, mqtt.tls and mqtt.protocol are what it expects, and its log"
    return Problem("it hangs up without an answer", remedy)


def speaks_tls() -> Problem:
    """Return what to say where we did not, and the server does."""
    remedy = "set mqtt.tls (ca_file, or enabled: true), or mqtt.port to its port without TLS"
    return Problem("it speaks TLS on this port", remedy, lasting=True)


def web_server() -> Problem:
    """Return what to say where MQTT was answered with HTTP."""
    remedy = "set mqtt.transport to websockets, or correct mqtt.port"
    return Problem("a web server answers there", remedy, lasting=True)


def no_websocket(config: MqttConfig) -> Problem:
    """Return why the server does not open a WebSocket."""
    status = _status_of_upgrade(config)
    if status is None:
        if not config.tls.enabled and _speaks_tls(config):
            return speaks_tls()
        remedy = "correct mqtt.port, or set mqtt.transport to tcp"
        return Problem("it does not answer as a WebSocket server", remedy, lasting=True)
    name = f"HTTP {status} {_name(status)}".rstrip()
    if status == HTTPStatus.SWITCHING_PROTOCOLS:
        return Problem("it broke off the opening of the WebSocket", "see the broker's log")
    if status == HTTPStatus.NOT_FOUND:
        why = f"it has no WebSocket at {config.websocket_path} ({name})"
        return Problem(why, "correct mqtt.websocket_path", lasting=True)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        remedy = "let the web server in front of the broker admit this device"
        return Problem(f"it refuses the WebSocket ({name})", remedy, lasting=True)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Problem(f"the web server there does not reach the broker ({name})", "start the broker behind it")
    why = f"it answers, but opens no WebSocket ({name})"
    return Problem(why, "correct mqtt.websocket_path and mqtt.port", lasting=True)


def valid_names(config: MqttConfig) -> list[str]:
    """Return the hosts that the broker's certificate is valid for."""
    context = tls.make_context(config.tls)
    context.check_hostname = False  # to look at a certificate; nothing is sent
    try:
        with _plain(config) as plain, context.wrap_socket(plain, server_hostname=config.host) as sock:
            certificate: dict[str, Any] = sock.getpeercert() or {}
    except OSError:
        return []
    return [value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]


def _plain(config: MqttConfig) -> socket.socket:
    return socket.create_connection((config.host, config.port), STEP_S)


def _speaks_tls(config: MqttConfig) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # to see whether it is TLS at all; nothing is sent
    try:
        with _plain(config) as plain, context.wrap_socket(plain, server_hostname=config.host):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # it says in TLS what it does not like
    except OSError:
        return False


def _refused_certificate(config: MqttConfig) -> Problem | None:
    """Return what the broker says of our certificate, or of the lack of one; None: nothing."""
    try:
        with (
            _plain(config) as plain,
            tls.make_context(config.tls).wrap_socket(plain, server_hostname=config.host) as sock,
        ):
            sock.settimeout(ALERT_S)
            sock.recv(1)
    except ssl.SSLEOFError:
        return None
    except ssl.SSLError as error:
        return tls.failed(error, config)
    except (OSError, ConfigError):
        return None
    return None


def _status_of_upgrade(config: MqttConfig) -> int | None:
    """Return the status that the request for a WebSocket is answered with; None: that is no HTTP."""
    request = (
        f"GET {config.websocket_path} HTTP/1.1\r\nHost: {config.host}:{config.port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: ZWRnZV9hc3IgYXNrcyBhZw==\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Protocol: mqtt\r\n\r\n"
    )
    try:
        with contextlib.ExitStack() as closing:
            sock = closing.enter_context(_plain(config))
            if config.tls.enabled:
                secure = tls.make_context(config.tls).wrap_socket(sock, server_hostname=config.host)
                sock = closing.enter_context(secure)
            sock.sendall(request.encode())
            found = STATUS.match(_first_bytes(sock, 12))
    except (OSError, ConfigError):
        return None
    return int(found[1]) if found else None


def _first_bytes(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def _name(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
