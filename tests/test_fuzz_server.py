"""Clients of all dialects that send nearly what they should: nothing fails, nothing hangs, nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Iterator

import pytest
from bundled import recording, transcripts
from fuzz_server import FUNASR, REQUESTS, STREAMS, WYOMING, Fuzz, handshake
from mosquitto import wait_for
from speech_server import Serving, serving

from bench.load import Client
from edge_asr.serve import connections, limits

SEED = 1
MORE = {"streams": 0, "tasks": 0, "files": 8, "threads": 8}
"""Children that decode, and threads that wait for them, come and go."""
MORE_OBJECTS = 500
"""That libraries may have come to keep."""
WELL_ANSWERED = {"http": "200 OK", "websocket": "all is said", "funasr": '"is_end": true', "wyoming": "transcript-stop"}
LIMITS = {"requests_per_minute": 1_000_000, "streams": 64, "idle_s": 0.5, "header_s": 0.5, "body_s": 0.5}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "CLOSE_S", 0.2)
        patch.setattr(limits, "DISCARD_S", 0.2)
        with serving(http={"limits": LIMITS}) as running:
            yield running


def fuzz_of(dialect: str, server: Serving) -> Fuzz:
    match dialect:
        case "http":
            return Fuzz(server.port, REQUESTS)
        case "websocket":
            return Fuzz(server.port, STREAMS, handshake("/stream_recognize"))
        case "funasr":
            return Fuzz(server.funasr_port, FUNASR, handshake("/"))
        case _:
            return Fuzz(server.wyoming_port, WYOMING)


async def right_answer(server: Serving) -> bool:
    name, text = min(transcripts().items())
    client = Client(server.port)
    try:
        return (await client.post("/recognize", recording(name).read_bytes()))[1].get("text") == text
    finally:
        await client.close()


def left_behind(server: Serving) -> dict[str, int]:
    """Count what a client could leave behind."""
    gc.collect()
    assert server.server._loop is not None
    return {
        "streams": server.service.streams,
        "tasks": len(asyncio.all_tasks(server.server._loop)),
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - a number only
        "threads": threading.active_count(),
    }


async def fuzzed(server: Serving, dialect: str, count: int, caplog: pytest.LogCaptureFixture) -> None:
    fuzz = fuzz_of(dialect, server)
    await fuzz.run(50, seed=0)  # what is made once is there
    assert await right_answer(server)
    await asyncio.to_thread(wait_for, lambda: not server.service.streams, "the end of the streams")
    before = left_behind(server)
    with caplog.at_level(logging.WARNING):
        await fuzz.run(count, SEED + count)
    assert fuzz.failures == []
    assert any(WELL_ANSWERED[dialect] in kind for kind in fuzz.answers), "none of it was nearly right"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert await right_answer(server)
    await asyncio.to_thread(
        wait_for,
        lambda: all(now <= before[kind] + MORE[kind] for kind, now in left_behind(server).items()),
        f"no more than {before}",
    )


@pytest.mark.parametrize("dialect", WELL_ANSWERED)
async def test_a_hundred_of_each_dialect(dialect: str, server: Serving, caplog: pytest.LogCaptureFixture) -> None:
    await fuzzed(server, dialect, 100, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", WELL_ANSWERED)
async def test_five_thousand_of_each_dialect(dialect: str, server: Serving, caplog: pytest.LogCaptureFixture) -> None:
    await fuzzed(server, dialect, 1_000, caplog)
    before = len(gc.get_objects())
    await fuzzed(server, dialect, 4_000, caplog)
    assert len(gc.get_objects()) < before + MORE_OBJECTS
