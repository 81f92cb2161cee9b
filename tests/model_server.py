"""A web server with files, honest until told otherwise: it breaks, lies and stalls on command."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class Request:
    """What was asked, and how many bytes of a body were sent."""

    path: str
    headers: dict[str, str]
    sent: int = 0


@dataclass
class ModelServer:
    """Serves `files` by their path; `tricks` are used up one for each request of a path."""

    files: dict[str, bytes]
    tricks: dict[str, list[Callable[[Handler], None]]] = field(default_factory=lambda: defaultdict(list))
    requests: list[Request] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"site": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="model-server")
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def sent(self, path: str) -> int:
        """Return the bytes that were sent of a file, over all requests."""
        return sum(request.sent for request in self.requests if request.path == path)

    def asked(self, path: str) -> list[str | None]:
        """Return the `Range` of each request of a file."""
        return [request.headers.get("range") for request in self.requests if request.path == path]

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    site: ModelServer

    def do_GET(self) -> None:
        self.name = unquote(self.path).lstrip("/")
        self.request_seen = Request(self.name, {key.lower(): value for key, value in self.headers.items()})
        self.site.requests.append(self.request_seen)
        waiting = self.site.tricks[self.name]
        (waiting.pop(0) if waiting else honest)(self)

    @property
    def body(self) -> bytes:
        return self.site.files[self.name]

    def start(self) -> int:
        """Return where the asked part begins, 0 where the whole is due."""
        asked = self.request_seen.headers
        tag = asked.get("if-range")
        return int(asked["range"][6:-1]) if "range" in asked and tag in (None, etag(self.body)) else 0

    def head(self, code: int, **headers: Any) -> None:
        self.send_response(code)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def head_of(self, start: int, **changed: Any) -> None:
        """Send the head of an honest answer from `start` on, with `changed` headers."""
        length = len(self.body)
        headers: dict[str, Any] = {"Content_Length": length - start, "ETag": etag(self.body)}
        if start:
            headers["Content_Range"] = f"bytes {start}-{length - 1}/{length}"
        self.head(206 if start else 200, **{**headers, **changed})

    def send(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
            self.request_seen.sent += len(data)
        except OSError:  # the client had enough
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


Trick = Callable[[Handler], None]


def etag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()[:16]}"'


def honest(handler: Handler) -> None:
    if handler.name not in handler.site.files:
        handler.head(404)
        return
    start = handler.start()
    if start >= len(handler.body):
        handler.head(416, Content_Range=f"bytes */{len(handler.body)}")
        return
    handler.head_of(start)
    handler.send(handler.body[start:])


def breaks_after(count: int, **headers: Any) -> Trick:
    """End the connection after `count` bytes of the part that was asked for."""

    def trick(handler: Handler) -> None:
        start = handler.start()
        handler.head_of(start, **headers)
        handler.send(handler.body[start : start + count])

    return trick


def stalls_after(count: int) -> Trick:
    """Send `count` bytes, then nothing, without ending the connection."""

    def trick(handler: Handler) -> None:
        start = handler.start()
        handler.head_of(start)
        handler.send(handler.body[start : start + count])
        handler.site.released.wait()

    return trick


def answers(code: int, **headers: Any) -> Trick:
    return lambda handler: handler.head(code, **headers)


def sends(body: bytes, **headers: Any) -> Trick:
    """Send another file than the right one, whole."""

    def trick(handler: Handler) -> None:
        handler.head(200, **{"Content_Length": len(body), **headers})
        handler.send(body)

    return trick


def ignores_range(handler: Handler) -> None:
    handler.head_of(0)
    handler.send(handler.body)


def claims_range(text: str) -> Trick:
    """Answer in part, but name another part than was asked for."""

    def trick(handler: Handler) -> None:
        handler.head(206, Content_Range=text, Content_Length=len(handler.body))
        handler.send(handler.body)

    return trick


def in_chunks(handler: Handler, whole: bool = True) -> None:
    """Send the body in chunks, without saying how long it is; not `whole`: without the end."""
    handler.protocol_version = "HTTP/1.1"
    handler.head(200, Transfer_Encoding="chunked", Connection="close")
    half = len(handler.body) // 2
    for piece in (handler.body[:half], handler.body[half:]) if whole else (handler.body[:half],):
        handler.send(b"%x\r\n%b\r\n" % (len(piece), piece))
    if whole:
        handler.send(b"0\r\n\r\n")
