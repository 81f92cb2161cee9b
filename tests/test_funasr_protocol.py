"""FunASR's protocol, as its published clients speak it: they append online texts, and replace them by offline ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import soxr
from bundled import recording, sound_of, transcripts
from mosquitto import PATIENCE_S, wait_for
from speech_server import Serving, serving
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from edge_asr.serve.funasr import MODES, OFFLINE, ONLINE, TWO_PASS, Wording
from edge_asr.speech.energy import end_of_sound
from edge_asr.types import SAMPLE_RATE, Partial, Samples, SegmentId, Token, Transcript

TEXTS = transcripts()
NAMES = sorted(TEXTS)
PAUSE = np.zeros(SAMPLE_RATE, np.float32)
CHUNK_BYTES = 60 * 10 // 10 * 2 * SAMPLE_RATE // 1000
"""What the published Python client sends at a time with chunk_size 5,10,5 and chunk_interval 10."""


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as one:
        wait_for(lambda: one.service.ready, "the model")
        yield one


def pcm(samples: Samples) -> bytes:
    return np.round(samples * 32767).astype("<i2").tobytes()


@dataclass
class PublishedClient:
    """What the Python client of FunASR makes of messages, and when it takes an utterance for done."""

    online: str = ""
    offline: str = ""
    done: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)

    def take(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        text, mode = message["text"], message["mode"]
        if mode in ("online", "2pass-online"):
            self.online += text
        else:
            self.online = ""
            self.offline += text
        self.done = message.get("is_final", False)

    @property
    def shown(self) -> str:
        return self.offline + self.online


def agrees(mode: str, client: PublishedClient, text: str) -> bool:
    """Tell whether a client shows a text; online nothing can be taken back that more sound has proved wrong."""
    pairs = list(zip(client.shown.replace(" ", ""), text.replace(" ", ""), strict=True))
    return sum(this != that for this, that in pairs) <= (len(pairs) // 4 if mode == ONLINE else 0)


def hello(mode: str, **more: Any) -> str:
    first = {
        "mode": mode, "chunk_size": [5, 10, 5], "chunk_interval": 10, "encoder_chunk_look_back": 4,
        "decoder_chunk_look_back": 0, "audio_fs": SAMPLE_RATE, "wav_name": "demo", "wav_format": "pcm",
        "is_speaking": True, "hotwords": '{"阿里巴巴": 20}', "itn": True,
    }  # fmt: skip
    return json.dumps({**first, **more})


def call(server: Serving, path: str = "") -> connect:
    url = f"ws://127.0.0.1:{server.funasr_port}{path}"
    return connect(url, subprotocols=[Subprotocol("binary")], ping_interval=None, close_timeout=PATIENCE_S)


async def speak(socket: ClientConnection, data: bytes) -> None:
    for start in range(0, len(data), CHUNK_BYTES):
        await socket.send(data[start : start + CHUNK_BYTES])
    await socket.send('{"is_speaking": false}')


async def listen(socket: ClientConnection) -> PublishedClient:
    client = PublishedClient()
    while not client.done:
        client.take(json.loads(await asyncio.wait_for(socket.recv(), PATIENCE_S)))
    return client


async def ask(server: Serving, mode: str, data: bytes, **more: Any) -> PublishedClient:
    async with call(server) as socket:
        await socket.send(hello(mode, **more))
        speaking = asyncio.create_task(speak(socket, data))
        client = await listen(socket)
        await speaking
        return client


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES[:3])
async def test_a_published_client_shows_what_was_said(server: Serving, mode: str, name: str) -> None:
    client = await ask(server, mode, pcm(sound_of(name)))
    assert agrees(mode, client, TEXTS[name])
    assert {message["wav_name"] for message in client.messages} == {"demo"}
    assert [message["is_final"] for message in client.messages][:-1] == [False] * (len(client.messages) - 1)


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [(ONLINE, {"online"}), (OFFLINE, {"offline"}), (TWO_PASS, {"2pass-online", "2pass-offline"})],
)
async def test_several_sentences_are_joined_and_worded_as_the_mode_wants(
    server: Serving, mode: str, kinds: set[str]
) -> None:
    sound = np.concatenate([part for name in NAMES for part in (sound_of(name), PAUSE)])
    client = await ask(server, mode, pcm(sound))
    assert agrees(mode, client, "".join(TEXTS[name] for name in NAMES))
    assert {message["mode"] for message in client.messages} <= kinds
    assert "offline" not in kinds or len(client.messages) == 1


async def test_times_are_text_in_milliseconds_one_for_each_token(server: Serving) -> None:
    client = await ask(server, TWO_PASS, pcm(sound_of(NAMES[0])))
    [message] = [message for message in client.messages if message["mode"] == "2pass-offline" and message["text"]]
    times = json.loads(message["timestamp"])
    assert len(times) == len(TEXTS[NAMES[0]])
    assert times == sorted(times)
    assert all(begin < end for begin, end in times)
    [sentence] = message["stamp_sents"]
    assert sentence["text_seg"] == " ".join(TEXTS[NAMES[0]])
    assert sentence["ts_list"] == times
    assert (sentence["start"], sentence["end"]) == (times[0][0], times[-1][1])


@pytest.mark.parametrize("mode", [OFFLINE, TWO_PASS])
async def test_the_last_message_has_the_last_text(server: Serving, mode: str) -> None:
    """The published client's `close` returns that one alone."""
    sound = sound_of(NAMES[0])
    client = await ask(server, mode, pcm(sound[: end_of_sound(sound)]))
    assert client.messages[-1]["text"] == TEXTS[NAMES[0]]
    assert (client.messages[-1]["is_final"], client.messages[-1]["is_end"]) == (True, True)
    assert json.loads(client.messages[-1]["timestamp"])


async def test_a_recording_has_a_longest_length_and_a_stream_has_none() -> None:
    with serving(http={"limits": {"audio_s": 1}}) as server:
        client = await ask(server, TWO_PASS, pcm(sound_of(NAMES[0])))
        assert client.shown == TEXTS[NAMES[0]]
        async with call(server) as socket:
            await socket.send(hello(OFFLINE))
            await socket.send(2 * pcm(PAUSE))
            message = json.loads(await asyncio.wait_for(socket.recv(), PATIENCE_S))
            assert "a recording of more than 1 s" in message["error"]


@pytest.mark.parametrize("mode", MODES)
async def test_silence_ends_with_an_empty_final_message(server: Serving, mode: str) -> None:
    for data in (pcm(PAUSE), b""):
        client = await ask(server, mode, data)
        assert [(message["text"], message["is_final"]) for message in client.messages] == [("", True)]


async def test_a_connection_goes_on_with_the_next_utterance_in_another_mode(server: Serving) -> None:
    async with call(server) as socket:
        for mode, name in zip((*MODES, TWO_PASS), NAMES, strict=False):
            await socket.send(hello(mode, wav_name=name))
            await speak(socket, pcm(sound_of(name)))
            client = await listen(socket)
            assert agrees(mode, client, TEXTS[name])
            assert {message["wav_name"] for message in client.messages} == {name}


async def test_another_rate_a_wav_header_and_any_path_will_do(server: Serving) -> None:
    name = NAMES[0]
    slow = np.clip(soxr.resample(sound_of(name), SAMPLE_RATE, 48_000), -1, 1)
    assert (await ask(server, OFFLINE, pcm(slow), audio_fs=48_000)).shown == TEXTS[name]
    assert (await ask(server, OFFLINE, recording(name).read_bytes())).shown == TEXTS[name]
    async with call(server, "/some/path?x=1") as socket:
        assert socket.subprotocol == "binary"
        await socket.send(hello(OFFLINE))
        await speak(socket, pcm(sound_of(name)))
        assert (await listen(socket)).shown == TEXTS[name]


async def test_clients_at_the_same_time_are_not_mixed_up(server: Serving) -> None:
    asked = [(mode, name) for mode in MODES for name in NAMES[:3]]
    found = await asyncio.gather(*(ask(server, mode, pcm(sound_of(name))) for mode, name in asked))
    for (mode, name), client in zip(asked, found, strict=True):
        assert agrees(mode, client, TEXTS[name])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no JSON", "should be a JSON object"),
        ('{"mode": "3pass"}', "mode should be one of online, offline, 2pass"),
        ('{"wav_name": 7}', "wav_name"),
        ('{"wav_format": "mp3"}', "wav_format should be pcm"),
        ('{"audio_fs": "many"}', "audio_fs should be a whole number"),
        ('{"audio_fs": 10}', "audio_fs: 10 samples per second"),
        ('{"audio_fs": 16000.5}', "audio_fs should be a whole number"),
        ('{"audio_fs": true}', "audio_fs should be a whole number"),
        ('{"mode": {"a": []}}', "mode should be one of"),
    ],
)
async def test_what_makes_no_sense_is_told_and_ends_it(server: Serving, text: str, why: str) -> None:
    async with call(server) as socket:
        await socket.send(text)
        message = json.loads(await asyncio.wait_for(socket.recv(), PATIENCE_S))
        assert why in message["error"]
        assert (message["text"], message["is_final"], message["is_end"]) == ("", False, True)
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(socket.recv(), PATIENCE_S)


async def test_who_vanishes_leaves_nothing_behind(server: Serving) -> None:
    socket = await call(server)
    await socket.send(hello(TWO_PASS))
    await socket.send(pcm(sound_of(NAMES[0])))
    await asyncio.to_thread(wait_for, lambda: server.service.streams == 1, "the stream")
    socket.transport.abort()
    await asyncio.to_thread(wait_for, lambda: server.service.streams == 0, "the end of the stream")


def partial(stable: str) -> Partial:
    return Partial(SegmentId("0"), "funasr", f"{stable}…", stable, None)


def final(text: str, offset_s: float = 0.0) -> Transcript:
    tokens = tuple(Token(token, 100 * place, 100 * place + 80, 1.0) for place, token in enumerate(text.split()))
    return Transcript(
        SegmentId("0"), "hall", "funasr", text, text, 1.0, None, offset_s, 1.0, tokens, {}, True, False, "m", "e"
    )  # fmt: skip


def shown(mode: str, *replies: Partial | Transcript) -> list[str]:
    """Return what a published client shows after each reply."""
    wording, client, found = Wording(mode, ""), PublishedClient(), []
    for reply in replies:
        for message in wording.of(reply):
            client.take(message)
        found.append(client.shown)
    return found


@pytest.mark.parametrize("mode", [ONLINE, TWO_PASS])
def test_what_is_shown_grows_with_what_is_stable_and_words_keep_apart(mode: str) -> None:
    replies = (partial("turn"), partial("turn on"), final("turn on the light"), partial("please"), final("please now"))
    assert shown(mode, *replies) == [
        "turn", "turn on", "turn on the light", "turn on the light please", "turn on the light please now",
    ]  # fmt: skip


def test_a_text_that_contradicts_what_was_shown_replaces_it_in_two_passes_only() -> None:
    replies = (partial("打开客厅"), final("打开卧室灯"))
    assert shown(TWO_PASS, *replies) == ["打开客厅", "打开卧室灯"]
    assert shown(ONLINE, *replies) == ["打开客厅", "打开客厅灯"]


def test_what_comes_to_nothing_is_taken_back_in_two_passes() -> None:
    taken_back = Partial(SegmentId("0"), "funasr", "", "", None, end=True)
    assert shown(TWO_PASS, partial("打开"), taken_back)[-1] == ""


def test_times_count_from_the_beginning_of_the_utterance() -> None:
    [message] = Wording(TWO_PASS, "").of(final("turn on", offset_s=2.0))
    assert message["timestamp"] == "[[2000,2080],[2100,2180]]"
