"""What every request passes before its route: who asks, how often, and with how much. Pure ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_asr.config_server import LimitsConfig
from edge_asr.serve.access import Access
from edge_asr.serve.errors import RefusedError

OPEN = ("/healthz", "/readyz", "/login")
"""What nobody needs a token for."""
SAFE = ("GET", "HEAD", "OPTIONS")
REMEMBERED = 4_096
"""Addresses whose rate is known; of the others too little has come to matter."""
IPV6_PREFIX = 64
"""One client has so many of its bits, and all addresses below."""
MB = 1_000_000
UPLOADS = 8
"""So many of the largest uploads may be in memory at a time."""
DISCARD_S = 10.0
"""So long the rest of a body that nobody wants is still read."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
"""For every answer that does not say otherwise: nothing of it is a page."""
POLICY_VIOLATION = 1008


class Rates:
    """How often each address may ask: a bucket each, that fills again with time."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_minute / 60
        self._most = max(1.0, per_minute / 6)
        """Ten seconds' worth may come at once."""
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str) -> float:
        """Count a request; return 0 where it may be, else the seconds until it may."""
        now, client = self._clock(), client_of(address)
        left, at = self._buckets.pop(client, (self._most, now))
        left = min(self._most, left + (now - at) * self._per_s)
        wait_s = 0.0 if left >= 1 else (1 - left) / self._per_s
        self._buckets[client] = (left - (not wait_s), now)
        if len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        return wait_s


def client_of(address: str) -> str:
    """Return whom an address belongs to: IPv6 gives each of them many."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, IPV6_PREFIX), strict=False))
    return str(found)


class Gate:
    """Lets a request through to the application, or answers it itself."""

    def __init__(self, app: ASGIApp, access: Access, limits: LimitsConfig) -> None:
        self._app = app
        self._access = access
        self._limits = limits
        self._rates = Rates(limits.requests_per_minute)
        self._held = _Held(UPLOADS * limits.body_mb * MB)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        if scope["type"] == "websocket":
            await self._pass_websocket(connection, receive, send)
            return
        body = _Body(connection.headers, receive, self._limits, self._held)
        answer = _Answer(send, body).send
        try:
            self._check(connection)
            await self._app(scope, body.receive, answer)
        except RefusedError as refused:  # by the check: the application answers its own
            await _refusal(refused, connection)(scope, receive, answer)
        finally:
            self._held.bytes -= body.size

    async def _pass_websocket(self, connection: HTTPConnection, receive: Receive, send: Send) -> None:
        try:
            self._check(connection)
        except RefusedError as refused:
            await _refuse_websocket(refused, connection.scope, receive, send)
        else:
            await self._app(connection.scope, receive, send)

    def _check(self, connection: HTTPConnection) -> None:
        """Raise RefusedError where it may not be answered."""
        client = "" if connection.client is None else connection.client.host
        if wait_s := self._rates.take(client):
            most = self._limits.requests_per_minute
            raise RefusedError(429, f"more than {most} requests a minute; ask less often", retry_after_s=wait_s)
        if not self._access.is_meant(connection):
            raise RefusedError(421, "this server goes by another name; use its address, or set http.host")
        if connection.url.path not in OPEN and not self._access.allows(connection):
            raise RefusedError(401, "a token is needed: Authorization: Bearer TOKEN", code="invalid_api_key")
        changes = connection.scope["type"] == "websocket" or connection.scope["method"] not in SAFE
        if changes and not self._access.has_good_origin(connection):
            raise RefusedError(403, "pages of this origin may not ask here; add it to http.origins", code="bad_origin")
        announced = connection.headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > self._limits.body_mb * MB:
            raise too_large(self._limits)


def _refusal(refused: RefusedError, connection: HTTPConnection) -> Response:
    """Return the answer: a person at the page is asked for the token."""
    at_the_page = connection.scope["method"] in SAFE and connection.url.path == "/"
    return RedirectResponse("/login", 303) if refused.status == 401 and at_the_page else refused.response()


def too_large(limits: LimitsConfig) -> RefusedError:
    """Return what is said of an upload that is too large."""
    return RefusedError(413, f"more than {limits.body_mb:g} MB; cut it, or raise http.limits.body_mb", code="too_large")


@dataclass(slots=True)
class _Held:
    """Bytes of all bodies that are in memory."""

    most: float
    bytes: int = 0


class _Body:
    """The body of a request, which must come in time and must not be larger than is allowed, whatever was announced."""

    def __init__(self, headers: Headers, receive: Receive, limits: LimitsConfig, held: _Held) -> None:
        self._receive = receive
        self._limits = limits
        self._held = held
        self.size = 0
        """Bytes that have come."""
        self.ended = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        """Nothing of it is still to come."""
        self._late_at = asyncio.get_running_loop().time() + limits.body_s

    async def receive(self) -> Message:
        """Return the next part; raises RefusedError. After the last one this waits for the client to go."""
        if self.ended:
            return await self._receive()
        left_s = self._late_at - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left_s))
        except asyncio.TimeoutError:
            raise RefusedError(408, f"the body did not come within {self._limits.body_s:g} s; send it faster") from None
        self.size += len(message.get("body", b""))
        self._held.bytes += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        if self.size > self._limits.body_mb * MB:
            raise too_large(self._limits)
        if self._held.bytes > self._held.most:
            raise RefusedError(503, "too many uploads at a time; try again later", code="overloaded", retry_after_s=5)
        return message

    async def discard(self) -> None:
        """Read what is still to come, for some time, and keep none of it."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._skip(), DISCARD_S)

    async def _skip(self) -> None:
        while not self.ended:
            self.ended = not (await self._receive()).get("more_body", False)


class _Answer:
    """Sends an answer. If its request has not been read to the end, the connection ends with it.

    Not at once: who is still writing then could not read it.
    """

    def __init__(self, send: Send, body: _Body) -> None:
        self._send = send
        self._body = body

    async def send(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if not self._body.ended:
                headers["connection"] = "close"
        elif not message.get("more_body", False) and not self._body.ended:
            await self._send({**message, "more_body": True})
            await self._body.discard()
            message = {"type": message["type"], "body": b""}
        await self._send(message)


async def _refuse_websocket(refused: RefusedError, scope: Scope, receive: Receive, send: Send) -> None:
    await receive()  # the handshake
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": refused.message[:120]})
        return
    response = refused.response()
    for name, value in {**HEADERS, "connection": "close"}.items():
        response.headers.setdefault(name, value)
    await response(scope, receive, send)


def content_type(headers: Headers) -> str:
    """Return the media type of a body, without its parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()
