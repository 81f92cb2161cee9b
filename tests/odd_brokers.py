"""Brokers that do what a real one does rarely or never, packet by packet."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from certificates import Certificate

CONNECT, PUBLISH, SUBSCRIBE = 1, 3, 8
ACCEPTED = {"3.1.1": b"\x20\x02\x00\x00", "5": b"\x20\x03\x00\x00\x00"}


@dataclass
class Visitor:
    """A client, as the broker sees it."""

    sock: socket.socket
    packets: list[tuple[int, bytes]] = field(default_factory=list)
    """Kind and body of what it has sent."""

    def read(self) -> tuple[int, bytes]:
        """Return the next packet; raise EOFError at the end."""
        kind = self._exactly(1)[0] >> 4
        length = shift = 0
        while True:
            byte = self._exactly(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        self.packets.append((kind, self._exactly(length)))
        return self.packets[-1]

    def read_kind(self, kind: int) -> bytes:
        """Return the body of the next packet of this kind."""
        while True:
            found, body = self.read()
            if found == kind:
                return body

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def stay(self) -> None:
        """Read until the client has gone."""
        while True:
            self.read()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data


@dataclass
class OddBroker:
    """What has come to it so far."""

    port: int
    visitors: list[Visitor] = field(default_factory=list)


@contextmanager
def odd_broker(talk: Callable[[Visitor], None], *, certificate: Certificate | None = None) -> Iterator[OddBroker]:
    """Run a broker that talks so to each of its clients, one after the other, and then hangs up."""
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.file, certificate.key)
    listener = socket.create_server(("127.0.0.1", 0))
    broker = OddBroker(listener.getsockname()[1])
    current: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                plain, _ = listener.accept()
                current[:] = [plain]
                with contextlib.suppress(OSError, EOFError), plain:  # the client has gone
                    sock = context.wrap_socket(plain, server_side=True) if context else plain
                    with sock:
                        broker.visitors.append(Visitor(sock))
                        talk(broker.visitors[-1])

    thread = threading.Thread(target=serve, name="odd broker", daemon=True)
    thread.start()
    try:
        yield broker
    finally:
        for sock in (listener, *current):
            with contextlib.suppress(OSError):  # it may be gone
                sock.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(30)


def text(value: str) -> bytes:
    """Return a string as MQTT writes it."""
    raw = value.encode()
    return len(raw).to_bytes(2, "big") + raw


def packet(first: int, body: bytes) -> bytes:
    """Return a packet of up to 16 kB."""
    if len(body) < 128:
        return bytes([first, len(body)]) + body
    return bytes([first, len(body) & 0x7F | 0x80, len(body) >> 7]) + body
