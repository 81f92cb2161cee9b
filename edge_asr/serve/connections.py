"""Connections, and how long each may take for what: nobody holds the server up by being slow, or by being many."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from edge_asr.config_server import LimitsConfig, is_loopback
from edge_asr.serve.limits import client_of

log = logging.getLogger(__name__)

HEADER_BYTES = 32_768
"""All headers of a request together."""
OTHER_FILES = 128
"""What the daemon has open beside connections."""


def http_protocol(limits: LimitsConfig) -> type[H11Protocol]:
    """Return what speaks HTTP on a connection, within these limits."""
    most = most_connections(limits)

    class Guarded(_GuardedH11):
        _limits = limits
        _most = most

    return Guarded


def websocket_protocol(limits: LimitsConfig) -> type[WebSocketsSansIOProtocol]:
    """Return what speaks WebSocket on a connection, within these limits."""

    class Guarded(_GuardedWebSocket):
        _limits = limits

    return Guarded


def most_connections(limits: LimitsConfig) -> int:
    """Return how many connections there may be: no more than the process may have files open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or files - OTHER_FILES >= limits.connections:
        return limits.connections
    fewer = max(1, files - OTHER_FILES)
    log.warning("%d connections instead of %d: the process may open %d files", fewer, limits.connections, files)
    return fewer


def is_crowded(connections: set[Any], address: str, limits: LimitsConfig, most: int) -> bool:
    """Tell whether there are too many connections with the newest one, in all or from its address."""
    if len(connections) > most:
        return True
    client = client_of(address)
    if is_loopback(client):
        return False
    peers = (one.client[0] for one in tuple(connections) if one.client)
    return sum(client_of(peer) == client for peer in peers) > limits.connections_per_client


OF_HANDSHAKE = (b"sec-websocket-", b"connection", b"upgrade")
NO_TEXT = 1007
"""How a WebSocket closes where a text frame is not UTF-8."""
CLOSE_S = 3.0
"""So long a client has to answer that a WebSocket closes."""
BAD_HANDSHAKE = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class _Patience:
    """Ends a connection on which something takes too long."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._timer is not None

    def start(self, seconds: float) -> None:
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _GuardedH11(H11Protocol):
    _limits: LimitsConfig
    _most: int
    _headers: _Patience
    _writing: _Patience

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers, self._writing = _Patience(transport), _Patience(transport)
        address = self.client[0] if self.client else ""
        if is_crowded(self.connections, address, self._limits, self._most):
            transport.abort()
        else:
            self._headers.start(self._limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers.stop()
        self._writing.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_idle() and not self._headers.running:  # the first bytes of the next request
            self._headers.start(self._limits.header_s)
        super().data_received(data)
        if not self._is_idle():
            self._headers.stop()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; uvicorn would let an application that has half of a request answer as well."""
        if not self._is_idle():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        super().send_400_response(msg)

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._headers.stop()
        if not all(value.isascii() for name, value in self.headers if name.startswith(OF_HANDSHAKE)):
            self.send_400_response("Invalid WebSocket handshake.")  # websockets would stumble over it
            return
        super().handle_websocket_upgrade(event)

    def pause_writing(self) -> None:
        self._writing.start(self._limits.idle_s)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._writing.stop()
        super().resume_writing()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


class _GuardedWebSocket(WebSocketsSansIOProtocol):
    _limits: LimitsConfig
    _writing: _Patience

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:  # uvicorn says nothing, for ever
            self.transport.write(BAD_HANDSHAKE)
            self.transport.close()

    def eof_received(self) -> None:
        """Know that the client has gone; uvicorn would call an answer that it did not take an error."""
        self.disconnected = self.handshake_complete = True
        super().eof_received()

    async def send(self, message: Any) -> None:
        """Send; a handshake that was refused is complete, which uvicorn would take for forgotten."""
        await super().send(message)
        self.handshake_complete |= self.initial_response is not None and self.close_sent

    def send_receive_event_to_app(self) -> None:
        """Close where a text frame is no text; uvicorn would log each with a traceback."""
        if self.curr_msg_data_type == "text" and not self.close_sent and not _is_text(b"".join(self.frames)):
            if self.conn.close_sent is None:  # it may have come with the client's own close
                self.conn.send_close(NO_TEXT)
            self.handle_parser_exception()
        else:
            super().send_receive_event_to_app()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._writing = _Patience(self.transport)
        self.close_timeout = CLOSE_S

    def connection_lost(self, exc: Exception | None) -> None:
        self._writing.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._writing.start(self._limits.idle_s)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._writing.stop()
        super().resume_writing()


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
