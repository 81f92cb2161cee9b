"""Clients that want to hold the server up: slow ones, many, silent, deaf and greedy ones. Somebody else is answered."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import resource
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
from bundled import recording, transcripts
from fuzz_server import HOST, frame, handshake, request, wav
from mosquitto import PATIENCE_S, wait_for
from speech_server import Serving, serving

from bench.load import Client
from edge_asr.audio.decoders import Decoders
from edge_asr.serve import connections
from edge_asr.serve.connections import HEADER_BYTES
from edge_asr.serve.server import LONGEST_AT_ONCE
from edge_asr.types import SAMPLE_RATE, Samples

MOST = 20
SOON_S = 0.5
LIMITS = {"connections": MOST, "connections_per_client": 5, "header_s": SOON_S, "body_s": SOON_S, "idle_s": SOON_S}
ELSEWHERE = "127.0.0.2"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr(connections, "CLOSE_S", 0.1)
    with serving(http={"limits": LIMITS}) as running:
        yield running


@contextlib.asynccontextmanager
async def call(port: int, source: str = HOST) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(HOST, port, local_addr=(source, 0))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the server hangs up."""
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE_S)
    except ConnectionError:
        return b""


async def is_served(server: Serving) -> bool:
    name, text = min(transcripts().items())
    client = Client(server.port)
    try:
        return (await client.post("/recognize", recording(name).read_bytes()))[1].get("text") == text
    finally:
        await client.close()


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send byte after byte, far too slowly, until nobody takes them any more."""
    with contextlib.suppress(ConnectionError):
        for place in range(len(data)):
            writer.write(data[place : place + 1])
            await writer.drain()
            await asyncio.sleep(SOON_S / 5)


@pytest.mark.parametrize("start", [b"", request("GET", "/readyz")], ids=["the first", "the second"])
async def test_who_makes_a_request_too_slowly_is_sent_away(server: Serving, start: bytes) -> None:
    async with call(server.port) as (reader, writer):
        if start:
            writer.write(start)
            await reader.readuntil(b"\r\n\r\n")
        dripping = asyncio.create_task(drip(writer, request("GET", "/healthz", b"", f"X: {'a' * 1_000}")))
        assert await is_served(server)
        assert b"HTTP/1.1 200 OK\r\n" not in await rest(reader)
        dripping.cancel()


async def test_who_sends_a_body_too_slowly_is_told(server: Serving) -> None:
    async with call(server.port) as (reader, writer):
        head, body = request("POST", "/recognize", wav(), "Content-Type: audio/wav").split(b"\r\n\r\n", 1)
        writer.write(head + b"\r\n\r\n")
        dripping = asyncio.create_task(drip(writer, body))
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 408")
        assert await is_served(server)
        dripping.cancel()


async def test_headers_without_end_are_not_read_to_the_end(server: Serving) -> None:
    async with call(server.port) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\n" + b"X-A: " + b"a" * HEADER_BYTES)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("dialect", ["http", "websocket"])
async def test_no_more_connections_than_may_be_and_the_idle_ones_make_place(server: Serving, dialect: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        readers = []
        for _ in range(3 * MOST):
            reader, writer = await stack.enter_async_context(call(server.port))
            readers.append(reader)
            if dialect == "websocket":
                writer.write(handshake("/stream_recognize"))
        answers = await asyncio.gather(*map(rest, readers))
        accepted = sum(b"101" in answer for answer in answers)
        assert accepted == (MOST if dialect == "websocket" else 0)
        assert await is_served(server)


async def test_one_address_does_not_take_the_place_of_all(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine itself is not counted, or a proxy on it would be one client."""
    monkeypatch.setattr(connections, "is_loopback", lambda host: host == HOST)
    async with contextlib.AsyncExitStack() as stack:
        strangers = [await stack.enter_async_context(call(server.port, ELSEWHERE)) for _ in range(10)]
        for _, writer in strangers:
            writer.write(request("GET", "/healthz"))
        heads = await asyncio.gather(*(reader.read(12) for reader, _ in strangers), return_exceptions=True)
        assert heads.count(b"HTTP/1.1 200") == 5
        assert await is_served(server)


async def test_who_does_not_read_is_sent_away(server: Serving) -> None:
    """It asks again and again, until neither side can write."""
    async with call(server.port) as (reader, writer):
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        wanted = request("GET", "/openapi.json") * 100
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(wanted)
                await asyncio.wait_for(writer.drain(), PATIENCE_S)
    assert await is_served(server)


async def test_a_flood_is_told_to_come_back_and_others_are_served() -> None:
    with serving(http={"limits": {"requests_per_minute": 60}}) as server:
        async with call(server.port, ELSEWHERE) as (reader, writer):
            for _ in range(30):
                writer.write(request("GET", "/readyz"))
            writer.write(request("GET", "/readyz", b"", "Connection: close"))
            answer = await rest(reader)
        assert 10 <= answer.count(b"HTTP/1.1 200") <= 15
        assert answer.count(b"HTTP/1.1 429") + answer.count(b"HTTP/1.1 200") == 31
        assert b"retry-after: " in answer
        assert await is_served(server)


@pytest.mark.parametrize("odd", [b"Content-Length: 4", b"Sec-WebSocket-Version: \xff"])
async def test_an_odd_handshake_is_answered(server: Serving, odd: bytes) -> None:
    async with call(server.port) as (reader, writer):
        writer.write(handshake("/stream_recognize")[:-2] + odd + b"\r\n\r\n")
        assert (await rest(reader)).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("port", ["http", "funasr"])
async def test_no_frame_is_larger_than_it_was_sent(server: Serving, port: str) -> None:
    async with call(server.daemon.ports[port]) as (reader, writer):
        asked = handshake("/stream_recognize")[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
        writer.write(asked)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101")
        assert b"extensions" not in head.lower()


async def test_a_body_is_never_larger_than_it_was_sent(server: Serving) -> None:
    async with call(server.port) as (reader, writer):
        body = gzip.compress(bytes(20_000_000))
        writer.write(request("POST", "/recognize", body, "Content-Type: audio/wav", "Content-Encoding: gzip"))
        assert (await reader.readuntil(b"\r\n")).split()[1] in (b"400", b"415")


async def test_small_files_of_long_sound_are_not_all_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[int] = [0]
    most = 0

    async def decode(_decoders: Decoders, _data: bytes) -> Samples:
        nonlocal most
        under_way[0] += 1
        most = max(most, under_way[0])
        await asyncio.sleep(0.02)
        under_way[0] -= 1
        return np.zeros(SAMPLE_RATE, np.float32)

    monkeypatch.setattr(Decoders, "decode", decode)
    with serving() as server:
        clients = [Client(server.port) for _ in range(16)]
        answers = await asyncio.gather(*(client.post("/recognize", b"a small file") for client in clients))
        assert [status for status, _ in answers] == [200] * len(clients)
        for client in clients:
            await client.close()
    assert most == LONGEST_AT_ONCE


DEEP = b"[" * 50_000


@pytest.mark.parametrize("message", [DEEP, b'{"type":' + DEEP, b"9" * 50_000], ids=["list", "field", "number"])
@pytest.mark.parametrize("port", ["http", "funasr"])
async def test_what_is_nested_too_deeply_is_refused(server: Serving, port: str, message: bytes) -> None:
    async with call(server.daemon.ports[port]) as (reader, writer):
        writer.write(handshake("/stream_recognize"))
        await reader.readuntil(b"\r\n\r\n")
        writer.write(frame(message, 1))
        assert b"should be a JSON object" in await rest(reader)


async def test_a_flood_of_pings_without_reading_is_bounded(server: Serving) -> None:
    async with call(server.port) as (reader, writer):
        writer.write(handshake("/stream_recognize"))
        await reader.readuntil(b"\r\n\r\n")
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        pings = frame(b"?" * 125, 9) * 1_000
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(pings)
                await asyncio.wait_for(writer.drain(), PATIENCE_S)
    assert await is_served(server)


@pytest.fixture
def many_files() -> Iterator[int]:
    """Let this process open many files; yield how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
async def test_ten_thousand_idle_sockets_neither_fill_the_server_nor_keep_others_out(many_files: int) -> None:
    with serving(http={"limits": {"header_s": 5.0}}) as server:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a number only
        loop = asyncio.get_running_loop()
        protocols = []
        for number in range(10_000):
            source = f"127.0.0.{2 + number % 200}"
            _, protocol = await loop.create_connection(Idle, HOST, server.port, local_addr=(source, 0))
            protocols.append(protocol)
            protocols = [one for one in protocols if not one.gone]
        files = len(os.listdir("/proc/self/fd")) - before  # noqa: PTH208 - a number only
        assert files <= 2 * (256 + 128)  # both ends, and what waits to be accepted
        await asyncio.to_thread(wait_for, lambda: all(one.gone for one in protocols), "the end of their patience")
        assert await is_served(server)


class Idle(asyncio.Protocol):
    gone = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
