"""Wyoming: Home Assistant's Assist uses the appliance as its speech-to-text.

What is said is listened to as it comes: the text is there when the client says that it is over, and the silence at the
end, of which a model makes words, is not decoded.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import warnings
from collections.abc import Awaitable, Callable

from wyoming.asr import Transcript, TranscriptChunk, TranscriptStart, TranscriptStop
from wyoming.error import Error
from wyoming.event import Event, Eventable
from wyoming.ping import Pong

from edge_asr import __version__
from edge_asr.config_server import LimitsConfig, WyomingConfig
from edge_asr.errors import BusyError, EdgeAsrError, NotReadyError
from edge_asr.serve.access import AllowedNetworks
from edge_asr.serve.announce import Announcement
from edge_asr.serve.connections import is_crowded, most_connections
from edge_asr.serve.pcm import PcmStream
from edge_asr.serve.replies import Deltas
from edge_asr.serve.wyoming_events import LINE_BYTES, BadEventError, bytes_of, number_in, read_event, text_in
from edge_asr.service import SpeechService
from edge_asr.types import SAMPLE_RATE, Partial
from edge_asr.types import Transcript as Said

with warnings.catch_warnings():  # of a module of Python that the library is about to do without
    warnings.simplefilter("ignore", DeprecationWarning)
    from wyoming.info import AsrModel, AsrProgram, Attribution, Info

log = logging.getLogger(__name__)

LANGUAGES = ["zh", "en"]
"""What Paraformer understands."""
PRESET = "relaxed"
"""The client tells where an utterance ends: short pauses in it are none. What is decoded at each is a head start."""
AT_ONCE = 32_768
"""Bytes of sound that are converted before others get their turn."""
UNREAD_BYTES = 1 << 18
"""Of answers that a client may leave unread; beyond that it counts as gone."""
RETRY_S = 5.0
"""When it may be worth speaking again."""
TOLD = 256
"""Addresses that were refused, and are known: each is logged once, and beyond so many none."""
Kind = tuple[int, int, int]
"""Rate, width and channels of sound."""
PARAFORMER = Attribution("FunASR", "https://github.com/modelscope/FunASR")


async def serve_wyoming(
    service: SpeechService, config: WyomingConfig, limits: LimitsConfig, sock: socket.socket
) -> WyomingServer:
    """Serve on a socket that is bound to its port."""
    server = WyomingServer(service, config, limits)
    await server.open(sock)
    return server


class WyomingServer:
    """Wyoming on one port."""

    def __init__(self, service: SpeechService, config: WyomingConfig, limits: LimitsConfig) -> None:
        self._service = service
        self._config = config
        self._limits = limits
        self._most = most_connections(limits)
        self._networks = AllowedNetworks(config.allow_networks)
        self._refused: set[str] = set()
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._numbers = itertools.count(1)
        self._server: asyncio.Server | None = None
        self._announcement: Announcement | None = None

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    async def open(self, sock: socket.socket) -> None:
        """Take connections from now on."""
        self._server = await asyncio.start_server(self._meet, sock=sock, limit=LINE_BYTES)
        self._announcement = Announcement.of(self._config, sock)

    async def close(self, timeout_s: float) -> None:
        """Take no more; who is being listened to may finish within so many seconds."""
        if self._server is not None:
            self._server.close()
        if self._announcement is not None:
            await self._announcement.close()
        for connection, task in self._connections.items():
            connection.leaves = True
            if not connection.busy:
                task.cancel()
        if tasks := tuple(self._connections.values()):
            await asyncio.wait(tasks, timeout=timeout_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        address = str(peer[0]) if peer else ""
        if not self._networks.admits(address):
            self._tell_refused(address)
            writer.transport.abort()
            return
        connection = _Connection(self._service, self._limits, reader, writer, f"wyoming {next(self._numbers)}")
        task = asyncio.current_task()
        assert task is not None
        self._connections[connection] = task
        try:
            if is_crowded(set(self._connections), address, self._limits, self._most):
                log.debug("wyoming: too many connections, or too many from %s", address)
                writer.transport.abort()
            else:
                await connection.run()
        except asyncio.CancelledError:  # the server closes; asyncio's own callback would call it an error
            writer.transport.abort()
        finally:
            del self._connections[connection]

    def _tell_refused(self, address: str) -> None:
        if address not in self._refused and len(self._refused) < TOLD:
            self._refused.add(address)
            log.warning("wyoming: %s may not come; if it should, add its network to wyoming.allow_networks", address)


class _Connection:
    """What one client asks, event by event."""

    def __init__(
        self,
        service: SpeechService,
        limits: LimitsConfig,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        name: str,
    ) -> None:
        self._service = service
        self._limits = limits
        self._reader = reader
        self._writer = writer
        self._name = name
        self._utterance: _Utterance | None = None
        self.client = writer.get_extra_info("peername")
        """Address and port; see `is_crowded`."""
        self.leaves = False
        """It ends with what is being said."""
        self._answers: dict[str, Callable[[Event], Awaitable[None]]] = {
            "describe": self._describe,
            "ping": self._ping,
            "transcribe": self._transcribe,
            "audio-start": self._start,
            "audio-chunk": self._hear,
            "audio-stop": self._stop,
        }

    @property
    def busy(self) -> bool:
        """Somebody is speaking, or waits for the text."""
        return self._utterance is not None

    async def run(self) -> None:
        """Answer until the client goes, says nothing, or what it says makes no sense."""
        try:
            while not (self.leaves and not self.busy) and (event := await self._next()) is not None:
                if (answer := self._answers.get(event.type)) is not None:  # the protocol grows: others are ignored
                    await answer(event)
                await self._sent()
        except BadEventError as error:
            self._refuse(str(error), "bad-event")
        except EdgeAsrError as error:
            self._refuse(str(error), _code(error))
        except asyncio.TimeoutError:
            self._refuse(f"nothing came, or was read, for {self._limits.idle_s:g} s; connect again", "idle")
        except ConnectionError as error:
            log.debug("%s: %s", self._name, error)
        finally:
            self._forget()
            self._leave()

    async def _next(self) -> Event | None:
        return await asyncio.wait_for(read_event(self._reader), self._limits.idle_s)

    def _send(self, event: Eventable) -> None:
        self._writer.write(bytes_of(event))
        if self._writer.transport.get_write_buffer_size() > UNREAD_BYTES:
            self._writer.transport.abort()

    async def _sent(self) -> None:
        """Wait for a client that does not read, but not for ever."""
        if self._writer.transport.get_write_buffer_size():
            await asyncio.wait_for(self._writer.drain(), self._limits.idle_s)

    def _refuse(self, text: str, code: str) -> None:
        log.debug("%s: %s", self._name, text)
        self._send(Error(text, code))

    def _forget(self) -> None:
        if self._utterance is not None:
            self._utterance.cancel()
            self._utterance = None

    def _leave(self) -> None:
        """End the connection; a client that does not read what is left has had its time."""
        self._writer.close()
        if self._writer.transport.get_write_buffer_size():
            asyncio.get_running_loop().call_later(self._limits.idle_s, self._writer.transport.abort)

    async def _describe(self, event: Event) -> None:
        self._send(_info(self._service.model))

    async def _ping(self, event: Event) -> None:
        text = text_in(event, "text")
        self._send(Pong(None if text is None else text.encode(errors="replace").decode()))

    async def _transcribe(self, event: Event) -> None:
        """Nothing can be chosen: there is one model, and it finds the language itself."""
        for key in ("name", "language"):
            text_in(event, key)

    async def _start(self, event: Event) -> None:
        self._forget()
        self._listen(_kind(event))

    async def _hear(self, event: Event) -> None:
        kind = _kind(event)
        utterance = self._utterance or self._listen(kind)
        await utterance.hear(kind, event.payload or b"")

    async def _stop(self, event: Event) -> None:
        if self._utterance is None:  # nothing was said
            for answer in (TranscriptStart(), Transcript(""), TranscriptStop()):
                self._send(answer)
            return
        await self._utterance.finish()
        self._utterance = None

    def _listen(self, kind: Kind) -> _Utterance:
        self._utterance = _Utterance(self._service, _pcm(kind), self._send, self._name, self._limits.audio_s)
        return self._utterance


class _Utterance:
    """What is said between audio-start and audio-stop, and its text; see TranscriptSink."""

    def __init__(
        self, service: SpeechService, pcm: PcmStream, send: Callable[[Eventable], None], name: str, longest_s: float
    ) -> None:
        self._pcm = pcm
        self._send = send
        self._longest_s = longest_s
        self._left = round(longest_s * SAMPLE_RATE)
        self._deltas = Deltas()
        self._begun = self._lost = False
        self._stream = service.stream(self, name, preset=PRESET)

    async def hear(self, kind: Kind, data: bytes) -> None:
        """Listen to a piece of sound. Waits while too much waits; raises BadEventError where it has become too long."""
        if self._pcm.kind != kind:
            await self._stream.push(self._pcm.flush())
            self._pcm = _pcm(kind)
        for start in range(0, len(data), AT_ONCE):
            samples = self._pcm.push(data[start : start + AT_ONCE])
            self._left -= len(samples)
            if self._left < 0:
                raise BadEventError(f"longer than {self._longest_s:g} s; see http.limits.audio_s")
            await self._stream.push(samples)
            await asyncio.sleep(0)

    async def finish(self) -> None:
        """Send the text. Raises EngineError, and BusyError where there was no time to recognise all of it."""
        await self._stream.push(self._pcm.flush())
        self._stream.end()
        await self._stream.flush()
        if self._lost:
            raise BusyError("there was no time to recognise all of it; say it again", RETRY_S)
        self._begin()
        self._send(Transcript(self._deltas.said))
        self._send(TranscriptStop())

    def cancel(self) -> None:
        """Forget it."""
        self._stream.cancel()

    def offer(self, transcript: Said) -> None:
        """See TranscriptSink."""
        self._lost |= transcript.lost
        self._show(self._deltas.settle(transcript.text))

    def offer_partial(self, partial: Partial) -> None:
        """See TranscriptSink. What was shown cannot be taken back: the text at the end is what counts."""
        self._show(self._deltas.settle("") if partial.end else self._deltas.grow(partial.stable))

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._send(TranscriptStart())

    def _show(self, text: str) -> None:
        if text:
            self._begin()
            self._send(TranscriptChunk(text))


def _kind(event: Event) -> Kind:
    return number_in(event, "rate"), number_in(event, "width"), number_in(event, "channels")


def _pcm(kind: Kind) -> PcmStream:
    try:
        return PcmStream(*kind)
    except ValueError as error:
        raise BadEventError(str(error)) from None


def _code(error: EdgeAsrError) -> str:
    if isinstance(error, BusyError):
        return "busy"
    return "not-ready" if isinstance(error, NotReadyError) else "failed"


def _info(model: str) -> Info:
    asr = AsrProgram(
        name="edge_asr",
        attribution=PARAFORMER,
        installed=True,
        description="Speech recognition on the spot",
        version=__version__,
        models=[
            AsrModel(model, PARAFORMER, installed=True, description="Paraformer", version=None, languages=LANGUAGES)
        ],
        supports_transcript_streaming=True,
    )
    return Info(asr=[asr])
