"""The WebSocket /stream_recognize: what is spoken into it comes back as text, and no client is a burden to others."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import soxr
from bundled import sound_of, transcripts
from mosquitto import PATIENCE_S, wait_for
from speech_server import Serving, serving
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from edge_asr.types import SAMPLE_RATE, Samples

TEXTS = transcripts()
NAMES = sorted(TEXTS)
PAUSE = np.zeros(SAMPLE_RATE, np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(http={"limits": {"idle_s": 5, "streams": 4}}) as one:
        wait_for(lambda: one.service.ready, "the model")
        yield one


def pcm(samples: Samples) -> bytes:
    return np.round(samples * 32767).astype("<i2").tobytes()


def call(server: Serving) -> connect:
    return connect(f"{server.ws_url}/stream_recognize", open_timeout=PATIENCE_S, close_timeout=PATIENCE_S)


async def speak(socket: ClientConnection, data: bytes, size: int = 3_200) -> None:
    for start in range(0, len(data), size):
        await socket.send(data[start : start + size])


async def told(socket: ClientConnection) -> list[dict[str, Any]]:
    """Return all messages until the server closes."""
    found: list[dict[str, Any]] = []

    async def read() -> None:
        async for message in socket:
            found.append(json.loads(message))

    with contextlib.suppress(ConnectionClosed):  # with another code than that of a good end
        await asyncio.wait_for(read(), PATIENCE_S)
    return found


def finals(messages: list[dict[str, Any]]) -> list[str]:
    return [message["text"] for message in messages if message["type"] == "final"]


async def ask(server: Serving, data: bytes, size: int = 3_200, **config: Any) -> list[dict[str, Any]]:
    async with call(server) as socket:
        if config:
            await socket.send(json.dumps({"type": "config", **config}))
        await speak(socket, data, size)
        await socket.send('{"type": "end"}')
        return await told(socket)


@pytest.mark.parametrize("size", [1, 333, 3_200, 1_000_000], ids=lambda size: f"{size} bytes at a time")
async def test_a_sentence_comes_back_however_it_is_cut(server: Serving, size: int) -> None:
    data = pcm(sound_of(NAMES[0]))
    messages = await ask(server, data[:2_001] if size == 1 else data, size)
    assert finals(messages) == ([] if size == 1 else [TEXTS[NAMES[0]]])
    assert messages[-1] == {"type": "end"}


async def test_a_final_is_a_transcript_and_partials_have_its_id(server: Serving) -> None:
    messages = await ask(server, pcm(np.concatenate([sound_of(NAMES[0]), PAUSE])), 1_600)
    [final] = [message for message in messages if message["type"] == "final"]
    assert final["schema"] == "edge_asr.transcript/1"
    assert final["source"] == "websocket"
    assert {message["id"] for message in messages if message["type"] == "partial"} <= {final["id"]}
    assert final["latency_ms"]["response"] >= 0


async def test_several_sentences_come_back_in_order(server: Serving) -> None:
    sound = np.concatenate([part for name in NAMES for part in (sound_of(name), PAUSE)])
    assert finals(await ask(server, pcm(sound), 32_000)) == [TEXTS[name] for name in NAMES]


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
async def test_sound_of_another_rate_is_understood(server: Serving, rate: int) -> None:
    sound = soxr.resample(sound_of(NAMES[0]), SAMPLE_RATE, rate)
    messages = await ask(server, pcm(np.clip(sound, -1, 1)), sample_rate=rate)
    assert len(finals(messages)) == 1
    if rate > SAMPLE_RATE:
        assert finals(messages) == [TEXTS[NAMES[0]]]


async def test_nobody_gets_partials_who_does_not_want_them(server: Serving) -> None:
    messages = await ask(server, pcm(np.concatenate([sound_of(name) for name in NAMES[:3]])), partials=False)
    assert {message["type"] for message in messages} == {"final", "end"}


async def test_a_stream_without_speech_has_no_text(server: Serving) -> None:
    assert await ask(server, pcm(np.tile(PAUSE, 3))) == [{"type": "end"}]
    assert await ask(server, b"") == [{"type": "end"}]


async def test_clients_at_the_same_time_are_not_mixed_up(server: Serving) -> None:
    found = await asyncio.gather(*(ask(server, pcm(sound_of(name))) for name in NAMES[:4]))
    assert [finals(messages) for messages in found] == [[TEXTS[name]] for name in NAMES[:4]]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no JSON", "should be a JSON object"),
        ("[1]", "should be a JSON object"),
        ("[" * 50_000, "should be a JSON object"),
        ('{"type": "config", "sample_rate": 100}', "sample_rate: Input should be greater"),
        ('{"type": "config", "sample_rate": "many"}', "sample_rate"),
        ('{"type": "config", "colour": 1}', "colour"),
        ('{"type": "start"}', "type"),
        ("x" * 70_000, "more than 65536 characters"),
    ],
)
async def test_what_makes_no_sense_is_told_and_ends_it(server: Serving, text: str, why: str) -> None:
    async with call(server) as socket:
        await socket.send(text)
        [message] = await told(socket)
        assert message["type"] == "error"
        assert why in message["error"]["message"]
        assert socket.close_code == CloseCode.UNSUPPORTED_DATA


async def test_an_unknown_preset_is_refused(server: Serving) -> None:
    async with call(server) as socket:
        await socket.send('{"type": "config", "preset": "hasty"}')
        await socket.send(pcm(PAUSE))
        [message] = await told(socket)
        assert "unknown preset hasty" in message["error"]["message"]


async def test_a_second_word_that_is_not_the_end_is_refused(server: Serving) -> None:
    async with call(server) as socket:
        await socket.send(pcm(PAUSE))
        await socket.send('{"type": "config"}')
        [message] = await told(socket)
        assert "'config' now; send sound, or" in message["error"]["message"]


async def test_a_message_that_is_too_large_ends_it(server: Serving) -> None:
    async with call(server) as socket:
        with contextlib.suppress(ConnectionClosed):  # before all of it is sent
            await socket.send(bytes(2_000_000))
        await told(socket)
        assert socket.close_code == CloseCode.MESSAGE_TOO_BIG
    wait_for(lambda: server.service.streams == 0, "the end of the stream")


async def test_there_are_so_many_streams_and_the_next_one_is_told_to_come_back(server: Serving) -> None:
    sockets = [await call(server) for _ in range(4)]
    for socket in sockets:
        await socket.send(pcm(PAUSE))
    await asyncio.to_thread(wait_for, lambda: server.service.streams == 4, "the streams")
    async with call(server) as late:
        await late.send(pcm(PAUSE))
        [message] = await told(late)
        assert "4 streams" in message["error"]["message"]
        assert late.close_code == CloseCode.TRY_AGAIN_LATER
    for socket in sockets:
        socket.transport.abort()  # gone without a word
    await asyncio.to_thread(wait_for, lambda: server.service.streams == 0, "the end of the streams")
    assert finals(await ask(server, pcm(sound_of(NAMES[0])))) == [TEXTS[NAMES[0]]]


async def test_who_says_nothing_any_more_is_hung_up_on() -> None:
    with serving(http={"limits": {"idle_s": 0.3}}) as impatient:
        wait_for(lambda: impatient.service.ready, "the model")
        async with call(impatient) as socket:
            await socket.send(pcm(PAUSE))
            [message] = await told(socket)
            assert "nothing came for 0.3 s" in message["error"]["message"]
            assert socket.close_code == CloseCode.POLICY_VIOLATION


async def test_the_server_stops_although_somebody_speaks() -> None:
    with serving() as short:
        wait_for(lambda: short.service.ready, "the model")
        socket = await call(short)
        await socket.send(pcm(PAUSE))
    await told(socket)
    assert socket.close_code in (CloseCode.SERVICE_RESTART, CloseCode.GOING_AWAY, CloseCode.ABNORMAL_CLOSURE)
