"""/captions: whoever watches sees what is spoken as it is spoken; nobody who comes later does, nor who may not."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled import sound_of, transcripts, write_wav
from mosquitto import PATIENCE_S, wait_for
from speech_server import Serving, serving
from test_access import TOKEN
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from edge_asr.serve import captions
from edge_asr.serve.access import hash_of
from edge_asr.serve.captions import HISTORY, VIEWERS, Captions
from edge_asr.serve.replies import BEHIND
from edge_asr.types import SAMPLE_RATE, Partial, SegmentId, Transcript

TEXTS = transcripts()
NAMES = ("01.wav", "03.wav")
SOURCE = "tape"


def tape(folder: Path) -> dict[str, Any]:
    """Return a source that begins to speak a while after the model is there."""
    gap = np.zeros(round(1.5 * SAMPLE_RATE), np.float32)
    samples = np.concatenate([gap, *(part for name in NAMES for part in (sound_of(name), gap))])
    return {"kind": "file", "path": write_wav(folder / "tape.wav", samples), "name": SOURCE}


def said(number: int, text: str = "打开客厅灯") -> Transcript:
    return Transcript(
        id=SegmentId(f"0192f6e2-0000-7000-8000-{number:012}"),
        device="hall",
        source=SOURCE,
        text=text,
        text_raw=text,
        confidence=0.9,
        started_at=1_700_000_000.0,
        offset_s=0.0,
        duration_s=1.0,
        tokens=(),
        latency_ms={"endpoint": 160.0, "response": 2.0 + number},
        within_budget=True,
        decoded_at_pause=True,
        model="tiny",
        engine="onnx-int8",
    )


def watch(server: Serving, **headers: str) -> connect:
    return connect(f"{server.ws_url}/captions", additional_headers=headers, open_timeout=PATIENCE_S)


async def seen(socket: ClientConnection, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """Return what a viewer is told until that is enough."""
    found: list[dict[str, Any]] = []

    async def read() -> None:
        async for message in socket:
            found.append(json.loads(message))
            if enough(found):
                return

    try:
        await asyncio.wait_for(read(), PATIENCE_S)
    except asyncio.TimeoutError:
        pytest.fail(f"not enough: {[message for message in found if message['type'] != 'levels']}")
    return found


def of(kind: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["type"] == kind]


async def test_what_is_spoken_is_seen_as_it_is_spoken_and_by_nobody_later(tmp_path: Path) -> None:
    with serving(sources=[tape(tmp_path)]) as server:
        async with watch(server) as socket:
            found = await seen(socket, lambda messages: len(of("said", messages)) == len(NAMES))
        assert [message["type"] for message in found[:3]] == ["hello", "state", "history"]
        finals = of("said", found)
        assert [final["text"] for final in finals] == [TEXTS[name] for name in NAMES]
        for final in finals:
            own = [message for message in found if message.get("id") == final["id"]]
            assert own[-1] is final
            partials = of("partial", own)
            assert partials
            assert all(partial["source"] == SOURCE and partial["text"] for partial in partials)
            assert final["latency_ms"]["response"] >= 0
            assert final["within_budget"] is True
        levels = [message["levels"][SOURCE] for message in of("levels", found) if message["levels"]]
        assert min(levels) == -80
        assert max(levels) > -20
        wait_for(lambda: not server.server.captions._viewers, "nobody to watch")
        async with watch(server) as socket:
            later = await seen(socket, lambda messages: bool(of("history", messages)))
        assert [one["source"] for one in of("history", later)[0]["sentences"]] == [SOURCE] * len(NAMES)
        assert not any(text in json.dumps(later, ensure_ascii=False) for text in TEXTS.values())


async def test_with_a_broker_the_trace_is_that_of_the_message(tmp_path: Path, broker: Any) -> None:
    outbox = {"file": tmp_path / "outbox.sqlite3"}
    with serving(sources=[tape(tmp_path)], mqtt={"port": broker.port}, outbox=outbox) as server:
        async with watch(server) as socket:
            found = await seen(socket, lambda messages: len(of("said", messages)) == len(NAMES))
        first = of("said", found)[0]
        assert first["text"] == TEXTS[NAMES[0]]
        assert {"endpoint", "encoder", "response", "total"} <= first["latency_ms"].keys()
        assert any(state["broker"]["connected"] for state in of("state", found))
        assert server.daemon.describe()["budget"]["count"] == len(NAMES)  # each is counted once


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(http={"tokens": [hash_of(TOKEN)]}) as one:
        wait_for(lambda: one.service.ready, "the model")
        yield one


MINE = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"Authorization": "Bearer x"}, 401), ({**MINE, "Origin": "http://elsewhere.example"}, 403)],
)
async def test_who_may_not_sees_nothing(headers: dict[str, str], status: int, server: Serving) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await watch(server, **headers)
    assert refused.value.response.status_code == status


async def test_a_viewer_has_nothing_to_say(server: Serving) -> None:
    async with watch(server, **MINE) as socket:
        await socket.send("hello")
        found = await seen(socket, lambda messages: bool(of("error", messages)))
        assert "nothing is taken here" in of("error", found)[0]["error"]["message"]
        await socket.wait_closed()
        assert socket.close_code == 1008


async def test_only_so_many_may_watch(server: Serving) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(VIEWERS):
            viewer = await stack.enter_async_context(watch(server, **MINE))
            await seen(viewer, lambda messages: bool(of("history", messages)))
        async with watch(server, **MINE) as another:
            found = await seen(another, lambda messages: bool(of("error", messages)))
            assert "close another page" in of("error", found)[0]["error"]["message"]
    wait_for(lambda: not server.server.captions._viewers, "nobody to watch")
    async with watch(server, **MINE) as socket:
        await seen(socket, lambda messages: bool(of("history", messages)))


async def test_a_name_that_is_no_text_is_sent_all_the_same(server: Serving) -> None:
    async with watch(server, **MINE) as socket:
        await seen(socket, lambda messages: bool(of("history", messages)))
        server.server.captions.offer_partial(Partial(SegmentId("1"), "file:\udcff.wav", "打开", "", None))
        found = await seen(socket, lambda messages: bool(of("partial", messages)))
    assert of("partial", found)[0]["source"] == "file:\udcff.wav"


@contextlib.asynccontextmanager
async def measured(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Captions, list[int]]]:
    """Yield captions, and how often they have asked for the levels."""
    monkeypatch.setattr(captions, "LEVELS_EVERY_S", 0.001)
    asked = [0]

    def levels() -> dict[str, float]:
        asked[0] += 1
        return {}

    yield Captions(levels), asked


async def test_levels_are_asked_for_only_while_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    async with measured(monkeypatch) as (shown, asked):
        with shown.watching(), shown.watching():
            while asked[0] < 3:
                await asyncio.sleep(0)
        count = asked[0]
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert asked[0] == count
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "levels"]


async def test_what_a_slow_viewer_misses_is_partials_and_levels_never_a_sentence() -> None:
    shown = Captions(dict)
    with shown.watching() as viewer:
        for number in range(10):
            for text in ("打", "打开"):
                shown.offer_partial(Partial(said(number).id, SOURCE, text, "", None))
            if number < 9:
                shown.offer(said(number))
        await asyncio.sleep(0.01)
        found = []
        while viewer._waiting:
            found.append(json.loads(await viewer.next() or ""))
        assert [one["id"] for one in of("said", found)] == [said(number).id for number in range(9)]
        assert [(one["id"], one["text"]) for one in of("partial", found)] == [(said(9).id, "打开")]
        for number in range(BEHIND + 1):
            shown.offer(said(number))
        await asyncio.sleep(0.01)
        assert viewer.overrun
        assert await viewer.next() is None


async def test_only_the_last_sentences_are_remembered_and_not_what_was_said() -> None:
    shown = Captions(dict)
    for number in range(HISTORY + 5):
        shown.offer(said(number))
    with shown.watching() as viewer:
        await viewer.next()
        text = await viewer.next() or ""
    sentences = json.loads(text)["sentences"]
    assert [one["latency_ms"]["response"] for one in sentences] == [2.0 + number for number in range(5, HISTORY + 5)]
    assert "打" not in text
    assert "\\u" not in text
