"""The thread `http`: its event loop runs all servers, and opens a port again and again where it is taken."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import uvicorn

from edge_asr.audio.decoders import Decoders
from edge_asr.config_server import FunasrConfig, HttpConfig, LimitsConfig, WyomingConfig
from edge_asr.serve.access import Access, hashes_of
from edge_asr.serve.admission import Admission
from edge_asr.serve.api import make_app
from edge_asr.serve.captions import Captions
from edge_asr.serve.connections import HEADER_BYTES, http_protocol, websocket_protocol
from edge_asr.serve.context import Appliance, Context
from edge_asr.serve.funasr import make_funasr_app
from edge_asr.serve.room import Room
from edge_asr.serve.tls import load_certificate, server_context
from edge_asr.serve.wyoming import serve_wyoming
from edge_asr.service import SpeechService

log = logging.getLogger(__name__)

BACKLOG = 128
"""Connections that the kernel accepts before we do."""
RETRY_S = (1.0, 30.0)
"""When a port that is taken is tried again: at first, and in the end."""
LONGEST_AT_ONCE = 4
"""So many of the longest recordings may be in memory at a time."""
LARGEST_MESSAGE = 1 << 20
"""Bytes of a message of a WebSocket."""
PING_S = 20.0
"""So often a WebSocket is asked whether it is still there, and so long it has to answer."""


class Port(Protocol):
    """A server on one port."""

    async def close(self, timeout_s: float) -> None:
        """Take no more, and end what is under way within so many seconds."""


Open = Callable[[socket.socket], Awaitable[Port]]


class SpeechServer:
    """All dialects, on a thread of their own: no client holds a microphone up."""

    def __init__(
        self,
        service: SpeechService,
        http: HttpConfig,
        wyoming: WyomingConfig,
        funasr: FunasrConfig,
        appliance: Appliance,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`changed` is called, on the thread `http`, when `trouble` has changed.

        Raises ConfigError for bad tokens and certificates.
        """
        self._service = service
        self._http, self._wyoming, self._funasr = http, wyoming, funasr
        self._appliance = appliance
        self.captions = Captions(appliance.levels)
        """Whoever watches sees what is offered here."""
        self._changed = changed
        self._access = Access(http)
        self._tls = {
            "http": server_context("http", http.tls) if http.enabled else None,
            "funasr": server_context("funasr", funasr.tls) if funasr.enabled else None,
        }
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._close_within_s = 0.0
        self._troubles: dict[str, str] = {}
        self.ports: dict[str, int] = {}
        """The ports that are open, by the section of the configuration."""
        self._running = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def trouble(self) -> str:
        """Which port is not open, and why; empty where all are. For any thread."""
        return "; ".join(self._troubles.copy().values())

    def prepare(self, http: HttpConfig, funasr: FunasrConfig) -> Callable[[], None]:
        """Try other tokens, origins and certificates; return what uses them from then on. Raises ConfigError."""
        hashes = hashes_of(http)
        sections = (("http", http.tls), ("funasr", funasr.tls))
        renewed = {name: tls for name, tls in sections if self._tls[name] is not None}
        for name, tls in renewed.items():
            server_context(name, tls)

        def use() -> None:
            for name, tls in renewed.items():
                context = self._tls[name]
                assert context is not None
                load_certificate(context, name, tls)
            if self._loop is not None:
                with contextlib.suppress(RuntimeError):  # it has ended
                    self._loop.call_soon_threadsafe(self._access.use, hashes, http.origins)

        return use

    def start(self) -> None:
        """Open the ports, soon."""
        self._thread.start()
        self._running.wait()

    def close(self, timeout_s: float) -> None:
        """Take no more, give what is under way so many seconds, and end the thread."""
        if self._loop is None or self._stop is None:
            return
        self._close_within_s = timeout_s
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout_s + 2)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:  # a bug there must not end the listening
            log.exception("the speech server has failed")
            self._troubles["http"] = "the speech server has failed; see the log, and restart edge-asr"
            self._changed()
        finally:
            self._running.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        decoders = Decoders(max_audio_s=self._http.limits.audio_s)
        tasks = [
            asyncio.create_task(self._keep(section, config, opening), name=section)
            for section, config, opening in self._sections(decoders)
            if config.enabled
        ]
        self._running.set()
        try:
            await self._stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._service.close()
            await decoders.close()

    def _sections(self, decoders: Decoders) -> Sequence[tuple[str, HttpConfig | WyomingConfig | FunasrConfig, Open]]:
        limits = self._http.limits

        async def open_http(sock: socket.socket) -> Port:
            admission = Admission(limits.wait_s, self._service.backlog_s)
            room = Room(LONGEST_AT_ONCE * limits.audio_s, limits.wait_s)
            context = Context(
                self._service, self._http, decoders, admission, room, self._access, self._appliance, self.captions
            )
            return await _Uvicorn.open(make_app(context), sock, limits, self._tls["http"])

        async def open_funasr(sock: socket.socket) -> Port:
            app = make_funasr_app(self._service, self._funasr, limits)
            return await _Uvicorn.open(app, sock, limits, self._tls["funasr"])

        async def open_wyoming(sock: socket.socket) -> Port:
            return await serve_wyoming(self._service, self._wyoming, limits, sock)

        return (
            ("http", self._http, open_http),
            ("funasr", self._funasr, open_funasr),
            ("wyoming", self._wyoming, open_wyoming),
        )

    async def _keep(self, section: str, config: HttpConfig | WyomingConfig | FunasrConfig, opening: Open) -> None:
        """Open a port, however long it is taken, and close it when cancelled."""
        sock = await self._bind(section, config)
        port = await opening(sock)
        host, number = sock.getsockname()[:2]
        self.ports[section] = number
        log.info("%s listens on %s:%d", section, host, number)
        try:
            await asyncio.Event().wait()
        finally:
            await port.close(self._close_within_s)

    async def _bind(self, section: str, config: HttpConfig | WyomingConfig | FunasrConfig) -> socket.socket:
        pause_s, last_s = RETRY_S
        while True:
            try:
                sock = await asyncio.to_thread(_bound, config.host, config.port)
            except OSError as error:
                reason = (
                    os.strerror(error.errno) if error.errno and error.errno > 0 else error
                )  # a resolver's are below
                why = f"{section}: {config.host}:{config.port} cannot be opened ({reason})"
                remedy = f"end what uses it, or set {section}.port and {section}.host"
                if section not in self._troubles:
                    log.warning("%s; %s; it is tried again", why, remedy)
                self._tell(section, f"{why}; {remedy}")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, last_s)
            else:
                self._tell(section, "")
                return sock

    def _tell(self, section: str, trouble: str) -> None:
        if self._troubles.get(section, "") != trouble:
            self._troubles.pop(section, None)
            if trouble:
                self._troubles[section] = trouble
            self._changed()


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; a name is looked up. Raises OSError."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
    sock = socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
    sock.setblocking(False)
    return sock


class _Uvicorn(uvicorn.Server):
    """uvicorn on a loop that is there already, which sleeps while nobody asks."""

    @classmethod
    async def open(cls, app: Any, sock: socket.socket, limits: LimitsConfig, tls: ssl.SSLContext | None) -> _Uvicorn:
        """Serve an ASGI application on a socket."""
        config = uvicorn.Config(
            app,
            http=http_protocol(limits),
            ws=websocket_protocol(limits),
            lifespan="off",
            log_config=None,
            log_level=logging.ERROR,  # its warnings are what clients do wrong: they are told
            access_log=False,
            date_header=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=round(limits.idle_s),
            ws_max_size=LARGEST_MESSAGE,
            ws_max_queue=8,
            ws_per_message_deflate=False,  # a small frame could become a large one
            ws_ping_interval=PING_S,
            ws_ping_timeout=PING_S,
        )
        config.load()
        config.ssl = tls
        server = cls(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup([sock])
        server._sock = sock
        return server

    _sock: socket.socket

    async def close(self, timeout_s: float) -> None:
        """Close the port; what is under way has so long to end."""
        self.config.timeout_graceful_shutdown = max(1, round(timeout_s))
        self.should_exit = True
        await self.shutdown([self._sock])
