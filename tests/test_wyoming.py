"""Wyoming, asked by the library's own clients, as Home Assistant does, and by those who mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import soxr
from bundled import load, sound_of, transcripts
from mosquitto import PATIENCE_S
from speech_server import serving
from test_service import Answering, until
from wyoming.asr import Transcribe, Transcript, TranscriptChunk
from wyoming.client import AsyncClient, AsyncTcpClient
from wyoming.error import Error
from wyoming.event import Event
from wyoming.ping import Ping, Pong

from edge_asr.budget import LatencyBudget
from edge_asr.config_server import LimitsConfig, WyomingConfig
from edge_asr.errors import BusyError
from edge_asr.recognizer.bundle import FP32
from edge_asr.recognizer.scheduler import Scheduler
from edge_asr.serve.access import AllowedNetworks
from edge_asr.serve.pcm import PcmStream
from edge_asr.serve.wyoming import WyomingServer, _Utterance, serve_wyoming
from edge_asr.serve.wyoming_events import DATA_BYTES, LINE_BYTES, PAYLOAD_BYTES
from edge_asr.service import Hearing, Pauses, SpeechService, SpeechStream
from edge_asr.speech.segmenter import ENDPOINTS, Rules
from edge_asr.speech.vad import SileroDetector
from edge_asr.types import SAMPLE_RATE, Partial, Samples, SegmentId
from edge_asr.types import Transcript as Said

with warnings.catch_warnings():  # of a module of Python that the library is about to do without
    warnings.simplefilter("ignore", DeprecationWarning)
    from wyoming.audio import AudioChunk, AudioStart, AudioStop
    from wyoming.info import Describe, Info

TEXTS = transcripts()
NAMES = sorted(TEXTS)
TAIL = np.zeros(SAMPLE_RATE * 7 // 10, np.float32)
"""What Home Assistant waits for before it says that somebody has finished."""
CHUNK_BYTES = 2048
STREAMED = ["transcript-start", "transcript-chunk", "transcript", "transcript-stop"]


def pcm(samples: Samples, width: int = 2) -> bytes:
    """Return samples as raw sound of 16, 24 or 32 bits, or unsigned 8."""
    if width == 1:
        return bytes(np.round(samples * 127 + 128).astype(np.uint8))
    scaled = np.round(np.clip(samples, -1, 1) * (2.0 ** (8 * width - 1) - 1)).astype("<i4")
    return scaled.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()


def said(*names: str) -> bytes:
    return pcm(np.concatenate([*(sound_of(name) for name in names), TAIL]))


class Room:
    """A server in this loop, and its clients."""

    def __init__(self, service: SpeechService) -> None:
        self.service = service
        self.server: WyomingServer | None = None
        self.port = 0

    @asynccontextmanager
    async def open(self, config: WyomingConfig | None = None, **limits: float) -> AsyncIterator[Room]:
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        config = config or WyomingConfig(enabled=True)
        self.server = await serve_wyoming(self.service, config, LimitsConfig.model_validate(limits), sock)
        try:
            yield self
        finally:
            await self.server.close(0)

    def client(self) -> AsyncTcpClient:
        return AsyncTcpClient("127.0.0.1", self.port, connect_timeout=PATIENCE_S, read_timeout=PATIENCE_S)

    async def raw(self, data: bytes) -> list[Event]:
        """Send bytes, and return the events that come until the server closes the connection."""
        client = self.client()
        await client.connect()
        try:
            assert client._writer is not None
            client._writer.write(data)
            return await all_of(client)
        finally:
            # The server has not read all of it, and since Python 3.12 the end of a connection says so.
            with contextlib.suppress(ConnectionResetError):
                await client.disconnect()

    async def is_closed_at_once(self) -> bool:
        """Tell whether a connection ends without a word."""
        try:
            return await self.raw(b"") == []
        except ConnectionError:
            return True


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    scheduler = Scheduler(lambda: load(FP32))
    await scheduler.start()
    presets = {name: Pauses(chunks) for name, chunks in ENDPOINTS.items()}
    hearing = Hearing(Rules(), presets, lambda: "default", 300, SileroDetector)
    service = SpeechService(scheduler, Answering(), hearing, LatencyBudget(300), "hall", streams=5)
    async with Room(service).open() as opened:
        yield opened
    await service.close()
    await scheduler.close(PATIENCE_S)


async def all_of(client: AsyncClient) -> list[Event]:
    found = []
    while (event := await client.read_event()) is not None:
        found.append(event)
    return found


async def send(client: AsyncClient, sound: bytes, rate: int = SAMPLE_RATE, width: int = 2, channels: int = 1) -> None:
    """Say something, as Home Assistant does: it reads nothing before the end."""
    await client.write_event(Transcribe(language="zh").event())
    await client.write_event(AudioStart(rate, width, channels).event())
    await send_rest(client, sound, rate, width, channels)


async def send_rest(client: AsyncClient, sound: bytes, rate: int, width: int, channels: int) -> None:
    for start in range(0, len(sound), CHUNK_BYTES):
        piece = sound[start : start + CHUNK_BYTES]
        await client.write_event(AudioChunk(rate, width, channels, piece).event())
    await client.write_event(AudioStop().event())


async def answer(client: AsyncClient) -> list[Event]:
    """Return the events up to the end of an answer."""
    found: list[Event] = []
    while not found or found[-1].type not in ("transcript-stop", "error"):
        event = await client.read_event()
        assert event is not None
        found.append(event)
    return found


def text_of(events: list[Event]) -> str:
    (transcript,) = (Transcript.from_event(event) for event in events if Transcript.is_type(event.type))
    assert transcript.language is None
    return transcript.text


def shown(events: list[Event]) -> str:
    chunks = [TranscriptChunk.from_event(event) for event in events if TranscriptChunk.is_type(event.type)]
    return "".join(chunk.text for chunk in chunks)


def kinds(events: list[Event]) -> list[str]:
    """Return the types of events, each once where it follows itself."""
    found = [event.type for event in events]
    return [kind for number, kind in enumerate(found) if number == 0 or kind != found[number - 1]]


def refusal(events: list[Event]) -> Error:
    assert [event.type for event in events] == ["error"], events
    return Error.from_event(events[0])


async def test_a_home_hears_what_was_said(room: Room) -> None:
    async with room.client() as client:
        await send(client, said(NAMES[0]))
        events = await answer(client)
    assert kinds(events) == STREAMED
    assert text_of(events) == TEXTS[NAMES[0]]
    assert len(shown(events)) == len(TEXTS[NAMES[0]])  # a character of it may be another than in the end


async def test_a_home_asks_what_there_is(room: Room) -> None:
    async with AsyncClient.from_uri(f"tcp://127.0.0.1:{room.port}", read_timeout=PATIENCE_S) as client:
        await client.write_event(Describe().event())
        event = await client.read_event()
    assert event is not None
    (program,) = Info.from_event(event).asr
    assert (program.name, program.installed, program.supports_transcript_streaming) == ("edge_asr", True, True)
    (model,) = program.models
    assert (model.name, model.installed, model.languages) == ("paraformer-tiny", True, ["zh", "en"])


async def test_many_utterances_on_one_connection(room: Room) -> None:
    async with room.client() as client:
        for name in NAMES[:3]:
            await send(client, said(name))
            assert text_of(await answer(client)) == TEXTS[name]
    await until(lambda: room.service.streams == 0)


async def test_what_follows_a_pause_belongs_to_the_same_utterance(room: Room) -> None:
    async with room.client() as client:
        await send(client, pcm(np.concatenate([sound_of(NAMES[0]), TAIL, sound_of(NAMES[1]), TAIL])))
        events = await answer(client)
    assert text_of(events) == TEXTS[NAMES[0]] + TEXTS[NAMES[1]]


@pytest.mark.parametrize(
    ("rate", "width", "channels"), [(48_000, 2, 2), (8_000, 2, 1), (16_000, 3, 1), (44_100, 4, 8), (16_000, 1, 1)]
)
async def test_sound_of_other_kinds(room: Room, rate: int, width: int, channels: int) -> None:
    sound = np.concatenate([sound_of(NAMES[4]), TAIL])
    sound = np.clip(soxr.resample(sound, SAMPLE_RATE, rate), -1, 1)
    async with room.client() as client:
        await send(client, pcm(np.repeat(sound, channels), width), rate, width, channels)
        assert text_of(await answer(client)) == TEXTS[NAMES[4]]


async def test_the_end_of_sound_of_another_rate_is_heard(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    push = SpeechStream.push

    async def counted(stream: SpeechStream, samples: Samples) -> None:
        heard.append(len(samples))
        await push(stream, samples)

    monkeypatch.setattr(SpeechStream, "push", counted)
    async with room.client() as client:
        await send(client, pcm(np.zeros(48_000, np.float32)), 48_000)
        assert text_of(await answer(client)) == ""
    assert sum(heard) == SAMPLE_RATE


async def test_nothing_said_is_an_empty_text(room: Room) -> None:
    async with room.client() as client:
        await client.write_event(AudioStop().event())
        assert [event.type for event in await answer(client)] == ["transcript-start", "transcript", "transcript-stop"]
        for sound in (b"", pcm(TAIL)):
            await send(client, sound)
            assert text_of(await answer(client)) == ""
        await client.write_event(AudioStop().event())
        assert text_of(await answer(client)) == ""


class Deaf:
    """A service whose streams hear nothing: the test says what was understood."""

    def stream(self, sink: object, name: str, preset: str) -> Deaf:
        return self

    async def push(self, samples: Samples) -> None: ...

    def end(self) -> None: ...

    async def flush(self) -> None: ...


def partial(segment: str, text: str, *, end: bool = False) -> Partial:
    return Partial(SegmentId(segment), "", text, text, None, end)


def final(text: str, *, lost: bool = False) -> Said:
    return Said(SegmentId("a"), "", "", text, text, None, None, None, 1.0, (), {}, None, False, "", "", lost=lost)


async def test_what_is_shown_grows_and_what_a_gate_drops_is_not_in_the_text() -> None:
    sent: list[Event] = []
    utterance = _Utterance(Deaf(), PcmStream(), lambda event: sent.append(event.event()), "", 9)  # type: ignore[arg-type]
    for shown_now in (partial("a", "turn"), partial("a", "turn it"), partial("a", "", end=True), partial("b", "lamp")):
        utterance.offer_partial(shown_now)
    utterance.offer(final("lamp on"))
    utterance.offer(final("please"))
    await utterance.finish()
    chunks = [event.data["text"] for event in sent if event.type == "transcript-chunk"]
    assert chunks == ["turn", " it", "lamp", " on", " please"]
    assert kinds(sent) == STREAMED
    assert text_of(sent) == "lamp on please"


async def test_what_there_was_no_time_for_is_an_error() -> None:
    sent: list[Event] = []
    utterance = _Utterance(Deaf(), PcmStream(), lambda event: sent.append(event.event()), "", 9)  # type: ignore[arg-type]
    utterance.offer(final("", lost=True))
    with pytest.raises(BusyError, match="say it again"):
        await utterance.finish()
    assert sent == []


async def test_the_kind_of_sound_may_change(room: Room) -> None:
    sound = sound_of(NAMES[0])
    half = len(sound) // 2
    async with room.client() as client:
        await client.write_event(AudioChunk(SAMPLE_RATE, 2, 1, pcm(sound[:half])).event())
        await send_rest(client, pcm(np.repeat(np.concatenate([sound[half:], TAIL]), 2), 4), SAMPLE_RATE, 4, 2)
        assert text_of(await answer(client)) == TEXTS[NAMES[0]]


async def test_sound_without_a_start_and_unknown_events_are_taken(room: Room) -> None:
    async with room.client() as client:
        await client.write_event(Event("select-program", {"name": "edge_asr"}))
        await client.write_event(AudioChunk(SAMPLE_RATE, 2, 1, said(NAMES[2])).event())
        await client.write_event(AudioStop().event())
        assert text_of(await answer(client)) == TEXTS[NAMES[2]]


async def test_a_new_start_forgets_what_was_said(room: Room) -> None:
    async with room.client() as client:
        await client.write_event(AudioStart(SAMPLE_RATE, 2, 1).event())
        await client.write_event(AudioChunk(SAMPLE_RATE, 2, 1, pcm(sound_of(NAMES[2]))).event())
        await send(client, said(NAMES[0]))
        assert text_of(await answer(client)) == TEXTS[NAMES[0]]
        await until(lambda: room.service.streams == 0)


async def test_a_ping_is_answered(room: Room) -> None:
    async with room.client() as client:
        for text in ("there?", None):
            await client.write_event(Ping(text).event())
            event = await client.read_event()
            assert event is not None
            assert Pong.from_event(event).text == text


async def test_five_who_speak_at_once_hear_their_own_words(room: Room) -> None:
    async def ask(name: str) -> str:
        async with room.client() as client:
            await send(client, said(name))
            return text_of(await answer(client))

    assert await asyncio.gather(*map(ask, NAMES[:5])) == [TEXTS[name] for name in NAMES[:5]]


async def test_a_client_that_goes_in_the_middle_frees_its_stream(room: Room) -> None:
    client = room.client()
    await client.connect()
    await client.write_event(AudioStart(SAMPLE_RATE, 2, 1).event())
    await until(lambda: room.service.streams == 1)
    await client.disconnect()
    await until(lambda: room.service.streams == 0)
    assert room.server is not None
    await until(lambda: room.server is not None and room.server.connections == 0)


async def test_no_more_streams_than_may_be(room: Room) -> None:
    async with room.client() as first, room.client() as last:
        held = [room.client() for _ in range(4)]
        for client in held:
            await client.connect()
        for client in (first, *held):
            await client.write_event(AudioStart(SAMPLE_RATE, 2, 1).event())
        await until(lambda: room.service.streams == 5)
        await last.write_event(AudioStart(SAMPLE_RATE, 2, 1).event())
        error = refusal(await all_of(last))
        assert error.code == "busy"
        assert "5 streams" in error.text
        for client in held:
            await client.disconnect()


async def test_a_model_that_is_not_there_yet_is_an_error(room: Room) -> None:
    room.service._model.engine = None  # type: ignore[misc]
    assert refusal(await room.raw(line("audio-start", rate=16_000, width=2, channels=1))).code == "not-ready"


def line(kind: str, **data: object) -> bytes:
    return json.dumps({"type": kind, "data": data}).encode() + b"\n"


HOSTILE = {
    "a line without an end": b"{" * (2 * LINE_BYTES + 1),
    "no JSON": b"GET / HTTP/1.1\r\n\r\n",
    "no text": b"\xff\xfe\n",
    "deep JSON": b"[" * (LINE_BYTES // 2) + b"\n",
    "no object": b"[1]\n",
    "null": b"null\n",
    "no type": b"{}\n",
    "a number as type": b'{"type": 7}\n',
    "data that is none": b'{"type": "ping", "data": [1]}\n',
    "endless data": json.dumps({"type": "ping", "data_length": DATA_BYTES + 1}).encode() + b"\n",
    "endless sound": json.dumps({"type": "audio-chunk", "payload_length": 10**18}).encode() + b"\n",
    "more sound than may be": json.dumps({"type": "x", "payload_length": PAYLOAD_BYTES + 1}).encode() + b"\n",
    "a negative length": b'{"type": "ping", "payload_length": -1}\n',
    "half a length": b'{"type": "ping", "data_length": 0.5}\n',
    "a true length": b'{"type": "ping", "data_length": true}\n',
    "data that is no JSON": b'{"type": "ping", "data_length": 3}\nabc',
    "deep data": b'{"type": "ping", "data_length": 30000}\n' + b"[" * 30_000,
    "data that is a list": b'{"type": "ping", "data_length": 2}\n[]',
    "a huge number": b'{"type": ' + b"9" * 5_000 + b"}\n",
    "no rate": line("audio-start", width=2, channels=1),
    "a rate of zero": line("audio-start", rate=0, width=2, channels=1),
    "a rate that is text": line("audio-chunk", rate="16000", width=2, channels=1),
    "wide samples": line("audio-start", rate=16_000, width=1_000_000, channels=1),
    "many channels": line("audio-start", rate=16_000, width=2, channels=10**9),
    "a language that is none": line("transcribe", language=["zh"]),
    "a model that is none": line("transcribe", name={"a": 1}),
    "a ping that is none": line("ping", text=[]),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
async def test_what_makes_no_sense_is_told_and_ends_the_connection(room: Room, data: bytes) -> None:
    assert refusal(await room.raw(data)).code == "bad-event"
    assert room.service.streams == 0


async def test_half_a_surrogate_is_answered(room: Room) -> None:
    async with room.client() as client:
        assert client._writer is not None
        client._writer.write(b'{"type": "ping", "data": {"text": "\\ud800"}}\n')
        event = await client.read_event()
    assert event is not None
    assert Pong.is_type(event.type)


async def test_who_says_nothing_or_too_slowly_is_sent_away(room: Room) -> None:
    async with Room(room.service).open(idle_s=0.2) as other:
        assert refusal(await other.raw(b"")).code == "idle"
        assert refusal(await other.raw(b'{"type": "audio-chunk", "payload_length": 1000}\nsome')).code == "idle"


async def test_who_speaks_too_long_is_told(room: Room) -> None:
    async with Room(room.service).open(audio_s=1) as other:
        data = json.dumps(
            {"type": "audio-chunk", "data": {"rate": 16_000, "width": 2, "channels": 1}, "payload_length": 33_000}
        )
        error = refusal(await other.raw(data.encode() + b"\n" + bytes(33_000)))
    assert "audio_s" in error.text
    assert room.service.streams == 0


async def test_who_does_not_read_is_sent_away(room: Room) -> None:
    ping = line("ping", text="x" * 30_000)
    async with Room(room.service).open(idle_s=0.2) as other:
        with socket.create_connection(("127.0.0.1", other.port)) as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(loop.sock_sendall(client, ping * 2_000), PATIENCE_S)


async def test_more_connections_than_may_be_are_closed(room: Room) -> None:
    async with Room(room.service).open(connections=2) as other, other.client() as one, other.client() as two:
        for client in (one, two):
            await client.write_event(Ping("there?").event())
            assert await client.read_event() is not None
        assert await other.is_closed_at_once()
        await one.write_event(Ping("still?").event())
        assert await one.read_event() is not None


async def test_strangers_are_closed_and_told_of_once(
    room: Room, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AllowedNetworks, "admits", lambda self, address: False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await room.is_closed_at_once()
    assert [record.getMessage().count("127.0.0.1") for record in caplog.records] == [1]


async def test_a_server_that_closes_lets_who_speaks_finish(room: Room) -> None:
    assert room.server is not None
    async with room.client() as idle, room.client() as speaking:
        await idle.write_event(Ping("there?").event())
        assert await idle.read_event() is not None
        await speaking.write_event(AudioStart(SAMPLE_RATE, 2, 1).event())
        await until(lambda: room.service.streams == 1)
        closing = asyncio.create_task(room.server.close(2 * PATIENCE_S))
        assert await idle.read_event() is None
        await speaking.write_event(AudioChunk(SAMPLE_RATE, 2, 1, said(NAMES[0])).event())
        await speaking.write_event(AudioStop().event())
        assert text_of(await answer(speaking)) == TEXTS[NAMES[0]]
        assert await speaking.read_event() is None
        await closing
        with pytest.raises(OSError, match="Connect call failed"):
            await room.client().connect()


def test_the_daemon_speaks_it() -> None:
    async def ask(port: int) -> str:
        async with AsyncTcpClient("127.0.0.1", port, read_timeout=PATIENCE_S) as client:
            await send(client, said(NAMES[0]))
            return text_of(await answer(client))

    with serving(http={"enabled": False}, funasr={"enabled": False}) as server:
        assert asyncio.run(ask(server.wyoming_port)) == TEXTS[NAMES[0]]
