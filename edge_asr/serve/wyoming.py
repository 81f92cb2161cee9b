"""Wyoming: Home Assistant's Assist uses this machine as its speech-to-text."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable

from wyoming.asr import Transcribe, Transcript, TranscriptChunk, TranscriptStart, TranscriptStop
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event, async_read_event, async_write_event
from wyoming.info import AsrModel, AsrProgram, Attribution, Describe, Info
from wyoming.ping import Ping, Pong

from edge_asr import __version__
from edge_asr.config_server import LimitsConfig, WyomingConfig
from edge_asr.errors import EdgeAsrError
from edge_asr.serve.access import AllowedNetworks
from edge_asr.serve.announce import Announcement, announce
from edge_asr.serve.connections import most_connections
from edge_asr.serve.limits import client_of
from edge_asr.serve.pcm import PcmStream
from edge_asr.serve.replies import Deltas, Replies
from edge_asr.service import SpeechService, SpeechStream
from edge_asr.types import Partial

log = logging.getLogger(__name__)

SOURCE = "wyoming"
PRESET = "relaxed"
"""The client tells where an utterance ends: a pause in it is none."""
LANGUAGES = ["zh", "en"]
LINE_BYTES = 65_536
"""The longest line of JSON."""
DATA_BYTES = 262_144
PAYLOAD_BYTES = 1 << 20
"""The longest sound at a time: half a minute."""
TOLD = 256
"""Strangers that were logged, and are not again."""
URL = "https://github.com/modelscope/FunASR"


class ProtocolError(Exception):
    """What a client sent makes no sense, or is too much."""


class WyomingServer:
    """Takes connections until it is closed."""

    def __init__(self, service: SpeechService, config: WyomingConfig, limits: LimitsConfig) -> None:
        self._service = service
        self._networks = AllowedNetworks(config.allow_networks)
        self._limits = limits
        self._most = most_connections(limits)
        self._clients: dict[asyncio.Task[None], str] = {}
        self._strangers: OrderedDict[str, None] = OrderedDict()
        self._server: asyncio.Server | None = None
        self._announcement: Announcement | None = None

    async def open(self, sock: socket.socket, config: WyomingConfig) -> None:
        """Listen on a socket."""
        self._server = await asyncio.start_server(self._serve, sock=sock, limit=LINE_BYTES)
        self._announcement = await announce(config, sock.getsockname()[1], self._service.model)

    async def close(self, timeout_s: float) -> None:
        """Take no more; what is under way has so long to end."""
        assert self._server is not None
        if self._announcement is not None:
            await self._announcement.close()
        self._server.close()
        if self._clients:
            await asyncio.wait(self._clients, timeout=timeout_s)
        for task in tuple(self._clients):
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = str(writer.get_extra_info("peername")[0])
        task = asyncio.current_task()
        assert task is not None
        try:
            if not self._admits(address):
                writer.transport.abort()
                return
            self._clients[task] = client_of(address)
            await _Client(_Bounded(reader), writer, self._service, self._limits).run()
        except asyncio.CancelledError:  # the server closes: asyncio's own callback would call it an error
            pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # it has gone
        finally:
            self._clients.pop(task, None)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _admits(self, address: str) -> bool:
        if not self._networks.admits(address):
            if address not in self._strangers:
                log.warning("wyoming: %s may not come; add its network to wyoming.allow_networks", address)
                self._strangers[address] = None
                if len(self._strangers) > TOLD:
                    self._strangers.popitem(last=False)
            return False
        there = Counter(self._clients.values())[client_of(address)]
        local = AllowedNetworks(()).admits(address)
        return len(self._clients) < self._most and (local or there < self._limits.connections_per_client)


async def serve_wyoming(
    service: SpeechService, config: WyomingConfig, limits: LimitsConfig, sock: socket.socket
) -> WyomingServer:
    """Serve on a socket that is bound."""
    server = WyomingServer(service, config, limits)
    await server.open(sock, config)
    return server


class _Bounded:
    """A reader from which nobody reads more than is allowed; the library reads as much as a client announces."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def readline(self) -> bytes:
        return await self._reader.readline()

    async def readexactly(self, size: int) -> bytes:
        if size > PAYLOAD_BYTES:
            raise ProtocolError(f"{size} bytes at a time; {PAYLOAD_BYTES} are the most")
        return await self._reader.readexactly(size)


class _Client:
    """One connection: utterance after utterance."""

    def __init__(
        self, reader: _Bounded, writer: asyncio.StreamWriter, service: SpeechService, limits: LimitsConfig
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._service = service
        self._limits = limits
        self._utterance: _Utterance | None = None

    async def run(self) -> None:
        """Answer events until the client goes."""
        try:
            while (event := await self._next()) is not None:
                await self._answer(event)
        except ProtocolError as error:
            log.debug("a Wyoming client: %s", error)
            await self._write(Error(str(error), "bad-request").event())
        except EdgeAsrError as error:
            log.debug("a Wyoming client is told: %s", error)
            await self._write(Error(str(error), "failed").event())
        finally:
            if self._utterance is not None:
                self._utterance.cancel()

    async def _next(self) -> Event | None:
        """Return the next event; None where there is none. Raises ProtocolError."""
        try:
            event = await asyncio.wait_for(async_read_event(self._reader), self._limits.idle_s)  # type: ignore[arg-type]
        except asyncio.TimeoutError:
            raise ProtocolError(f"nothing came for {self._limits.idle_s:g} s; connect again") from None
        except (KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON, but no event
            raise ProtocolError("that is no event of Wyoming") from error
        if event is not None and not (isinstance(event.type, str) and isinstance(event.data, dict)):
            raise ProtocolError("that is no event of Wyoming")
        return event

    async def _answer(self, event: Event) -> None:
        if Describe.is_type(event.type):
            await self._write(_info(self._service.model).event())
        elif Ping.is_type(event.type):
            await self._write(Pong(text=str(event.data.get("text", ""))[:LINE_BYTES]).event())
        elif Transcribe.is_type(event.type):
            self._begin()
        elif AudioStart.is_type(event.type):
            self._begin().use(*_kind(event))
        elif AudioChunk.is_type(event.type):
            utterance = self._utterance or self._begin()
            utterance.use(*_kind(event))
            await utterance.hear(event.payload or b"")
        elif AudioStop.is_type(event.type):
            utterance, self._utterance = self._utterance or self._begin(), None
            try:
                await utterance.finish()
            finally:
                utterance.cancel()

    def _begin(self) -> _Utterance:
        """Return the utterance that is being sent; a new one, if nothing of it has come yet."""
        if self._utterance is not None and self._utterance.begun:
            self._utterance.cancel()
            self._utterance = None
        if self._utterance is None:
            self._utterance = _Utterance(self._service, self._write)
        return self._utterance

    async def _write(self, event: Event) -> None:
        await asyncio.wait_for(async_write_event(event, self._writer), self._limits.idle_s)


_Write = Callable[[Event], Awaitable[None]]


class _Utterance:
    """What is said between audio-start and audio-stop."""

    def __init__(self, service: SpeechService, write: _Write) -> None:
        self._service = service
        self._write = write
        self._replies = Replies()
        self._deltas = Deltas()
        self._pcm = PcmStream()
        self._stream: SpeechStream | None = None
        self._telling: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        """Sound has come."""
        return self._stream is not None

    def use(self, rate: int, width: int, channels: int) -> None:
        """Take this kind of sound from now on. Raises ProtocolError."""
        if self._pcm.kind != (rate, width, channels):
            try:
                self._pcm = PcmStream(rate, width, channels)
            except ValueError as error:
                raise ProtocolError(str(error)) from error

    async def hear(self, data: bytes) -> None:
        """Take sound."""
        if self._stream is None:
            self._stream = self._service.stream(self._replies, SOURCE, preset=PRESET)
            self._telling = asyncio.create_task(self._tell(), name=SOURCE)
        await self._stream.push(self._pcm.push(data))

    async def finish(self) -> None:
        """Answer with what was said."""
        await self.hear(b"")
        assert self._stream is not None
        assert self._telling is not None
        await self._stream.push(self._pcm.flush())
        self._stream.end()
        await self._stream.flush()
        self._replies.end()
        await self._telling
        await self._write(Transcript(text=self._deltas.said).event())
        await self._write(TranscriptStop().event())

    def cancel(self) -> None:
        """Forget it; may be called more than once."""
        if self._stream is not None:
            self._stream.cancel()
        if self._telling is not None:
            self._telling.cancel()

    async def _tell(self) -> None:
        await self._write(TranscriptStart().event())
        while (reply := await self._replies.next()) is not None:
            if isinstance(reply, Partial):
                delta = "" if reply.end else self._deltas.grow(reply.stable)
            else:
                delta = self._deltas.settle(reply.text)
            if delta:
                await self._write(TranscriptChunk(text=delta).event())


def _kind(event: Event) -> tuple[int, int, int]:
    """Return rate, width and channels. Raises ProtocolError."""
    found = tuple(event.data.get(key) for key in ("rate", "width", "channels"))
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in found):
        raise ProtocolError("rate, width and channels should be numbers")
    return found  # type: ignore[return-value]


def _info(model: str) -> Info:
    """Return what the server is."""
    by = Attribution(name="FunASR", url=URL)
    known = AsrModel(
        name=model, attribution=by, installed=True, description="Paraformer", version=None, languages=LANGUAGES
    )
    program = AsrProgram(
        name="edge_asr",
        attribution=by,
        installed=True,
        description="Speech recognition on the edge",
        version=__version__,
        models=[known],
        supports_transcript_streaming=True,
    )
    return Info(asr=[program])
