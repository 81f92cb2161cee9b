"""Why a WebSocket was not granted: asked once more, for paho does not keep the answer."""

from __future__ import annotations

import contextlib
import re
import socket
from http import HTTPStatus

from edge_asr.config_mqtt import MqttConfig
from edge_asr.publish import tls
from edge_asr.publish.reasons import Problem

TIMEOUT_S = 5.0
PORT = "correct mqtt.port, or set mqtt.transport to tcp"
ANSWER = re.compile(rb"HTTP/\d\.\d (\d{3})")


def explain(config: MqttConfig) -> Problem:
    """Return why the server at that port does not open a WebSocket."""
    status = _status(config)
    if status is None:
        return Problem("it does not answer as a WebSocket server", PORT, lasting=True)
    name = f"HTTP {status} {_name(status)}".rstrip()
    if status == HTTPStatus.SWITCHING_PROTOCOLS:
        return Problem("it broke off the opening of the WebSocket", "see the broker's log")
    if status == HTTPStatus.NOT_FOUND:
        why = f"it has no WebSocket at {config.websocket_path} ({name})"
        return Problem(why, "correct mqtt.websocket_path", lasting=True)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        why = f"it refuses the WebSocket ({name})"
        return Problem(why, "let the web server in front of the broker admit this device", lasting=True)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Problem(f"the web server in front of it does not reach it ({name})", "start the broker behind it")
    why = f"it answers, but opens no WebSocket ({name})"
    return Problem(why, "correct mqtt.websocket_path and mqtt.port", lasting=True)


def _status(config: MqttConfig) -> int | None:
    """Return the status that the request for a WebSocket is answered with; None: that is no HTTP."""
    request = (
        f"GET {config.websocket_path} HTTP/1.1\r\nHost: {config.host}:{config.port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: ZWRnZV9hc3IgYXNrcyBhZw==\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Protocol: mqtt\r\n\r\n"
    )
    try:
        with contextlib.ExitStack() as closing:
            sock = closing.enter_context(socket.create_connection((config.host, config.port), TIMEOUT_S))
            if config.tls.enabled:
                secure = tls.make_context(config.tls).wrap_socket(sock, server_hostname=config.host)
                sock = closing.enter_context(secure)
            sock.sendall(request.encode())
            found = ANSWER.match(_first_bytes(sock, 12))
    except OSError:
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
