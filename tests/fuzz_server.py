"""Requests, frames and events that are nearly right: what clients of each dialect send, with bytes of it changed."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mosquitto import PATIENCE_S

from edge_asr.types import SAMPLE_RATE

HOST = "127.0.0.1"
AT_ONCE = 64
"""Connections; most wait for the server to lose patience."""
HANGS_UP = 0.2
"""So many do not wait for an answer."""
TOKENS = (
    b"\r\n", b"\n", b"\0", b"--part", b"--part--\r\n", b"{", b"}", b"[" * 2_000, b'"', b"null", b"-1", b"NaN", b"1e999",
    b"9" * 400, b"chunked", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 4\r\n", b"Expect: 100-continue\r\n",
    b"Content-Encoding: gzip\r\n", b"\xff\xfe", b"\xed\xa0\x80", b"%00", b"/../..", b"RIFF", b"data", b"fmt ",
    b"\xff\xff\xff\xff", b"\x7f" * 8, "语音".encode(), b"\x81\xfe\xff\xff", b"\x82\xff" + b"\xff" * 8, b"\x88\x80",
)  # fmt: skip
TELLTALES = (b"Traceback", b"site-packages", b'.py"', b"HTTP/1.1 500", bytes(Path.cwd()))
"""What no answer may hold."""


def wav(seconds: float = 0.2) -> bytes:
    """Return a short noise as a file."""
    pcm = random.Random(0).randbytes(2 * round(seconds * SAMPLE_RATE))
    kind = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", 36 + len(pcm), b"WAVE") + kind + struct.pack("<4sI", b"data", len(pcm)) + pcm


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """Return a request, as it is sent."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def chunked(data: bytes) -> bytes:
    """Return a body as chunks."""
    parts = (data[start : start + 700] for start in range(0, len(data), 700))
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def frame(data: bytes, kind: int) -> bytes:
    """Return a frame of a WebSocket as clients send it."""
    length = len(data)
    size = struct.pack(">BH", 126, length) if length > 125 else bytes([length])
    mask = b"\1\2\3\4"
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
    return bytes([0x80 | kind, 0x80 | size[0]]) + size[1:] + mask + masked


def handshake(path: str) -> bytes:
    """Return the request that opens a WebSocket."""
    lines = (f"GET {path} HTTP/1.1", f"Host: {HOST}", "Upgrade: websocket", "Connection: Upgrade",
             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13",
             "Sec-WebSocket-Protocol: binary", "", "")  # fmt: skip
    return "\r\n".join(lines).encode()


def event(kind: str, data: bytes, payload: bytes) -> bytes:
    """Return an event of Wyoming."""
    head = {"type": kind, "data_length": len(data), "payload_length": len(payload)}
    return json.dumps(head).encode() + b"\n" + data + payload


def form() -> bytes:
    """Return a form as OpenAI's clients send it."""
    fields = {"model": "whisper-1", "response_format": "verbose_json", "language": "zh",
              "timestamp_granularities[]": "word", "temperature": "0"}  # fmt: skip
    parts = [
        f'--part\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()
    ]
    file = '--part\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    return "".join([*parts, file]).encode() + wav() + b"\r\n--part--\r\n"


TEXT, BINARY, END, PING = 1, 2, 8, 9
SOUND = wav()[44:]
KIND = f'{{"rate": {SAMPLE_RATE}, "width": 2, "channels": 1}}'.encode()
Part = tuple[Callable[[bytes], bytes], bytes]
"""What a client says, and what makes a request, a frame or an event of it."""


def post(path: str, kind: str, body: bytes) -> tuple[Part, ...]:
    """Return a request with its body, of whatever length."""
    return ((lambda data: request("POST", path, data, f"Content-Type: {kind}"), body),)


def get(path: str) -> tuple[Part, ...]:
    """Return a request for a path, whatever it says."""
    return ((lambda data: request("GET", data.decode("latin-1")), path.encode()),)


def frames(*parts: tuple[int, bytes]) -> tuple[Part, ...]:
    """Return frames of a WebSocket: their kinds, and what they hold."""
    return tuple((partial(frame, kind=kind), data) for kind, data in parts)


def events(*parts: tuple[str, bytes, bytes]) -> tuple[Part, ...]:
    """Return events of Wyoming: their kinds, data and payload."""
    return tuple((partial(event, kind, payload=payload), data) for kind, data, payload in parts)


MULTIPART = "multipart/form-data; boundary=part"
CHUNKS = f"POST /recognize HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
REQUESTS = (
    post("/v1/audio/transcriptions", MULTIPART, form()),
    post("/v1/audio/transcriptions", MULTIPART, form().replace(b"verbose_json", b"srt")),
    post("/recognize", "audio/wav", wav()),
    post("/recognize", MULTIPART, form()),
    post("/login", "application/x-www-form-urlencoded", b"token=abc"),
    ((lambda data: CHUNKS + chunked(data), wav()),),
    get("/v1/models"),
    get("/v1/models/whisper-1"),
    get("/readyz?a=b"),
    get("/openapi.json"),
    get("/metrics"),
    get("/"),
    get("/page/page.js"),
    get("/admin/state"),
    post("/admin/listen", "application/json", b'{"seconds": 8}'),
    post("/admin/preset", "application/json", b'{"preset": "default"}'),
    ((lambda data: request("OPTIONS", "/recognize", b"", "Origin: " + data.decode("latin-1")), b"http://evil.example"),),
    ((lambda data: data, handshake("/stream_recognize")),),
)  # fmt: skip
CONFIG = b'{"type": "config", "sample_rate": 16000, "partials": true, "preset": "relaxed"}'
PIECES = ((BINARY, SOUND[:3_200]), (PING, b"?"), (BINARY, SOUND[3_200:]), (TEXT, b'{"type": "end"}'))
STREAMS = (
    frames(*PIECES),
    frames((TEXT, CONFIG), *PIECES),
    frames((TEXT, CONFIG), *PIECES, (END, b"\x03\xe8")),
)
FUNASR = tuple(
    frames(
        (TEXT, f'{{"mode": "{mode}", "wav_name": "a", "audio_fs": 16000, "is_speaking": true}}'.encode()),
        (BINARY, wav() if mode == "offline" else SOUND),
        (TEXT, b'{"is_speaking": false}'),
    )
    for mode in ("offline", "online", "2pass")
)
WYOMING = (
    events(("describe", b"", b""), ("ping", b'{"text": "a"}', b"")),
    events(
        ("transcribe", b'{"language": "zh"}', b""), ("audio-start", KIND, b""), ("audio-chunk", KIND, SOUND),
        ("audio-stop", b'{"timestamp": 200}', b""),
    ),
)  # fmt: skip


def mutated(good: Sequence[Part], chance: random.Random) -> bytes:
    """Return what a client sends, with changes in what it says, in its form, or in both; sometimes with none."""
    parts = list(good)
    if chance.random() < 0.6:
        place = chance.randrange(len(parts))
        match chance.randrange(5):
            case 0 if len(parts) > 1:
                del parts[place]
            case 1:
                parts[place:place] = [parts[place]] * chance.choice((1, 5))
            case 2:
                chance.shuffle(parts)
            case _:
                parts[place] = (parts[place][0], changed(parts[place][1], chance))
    data = b"".join(wrap(content) for wrap, content in parts)
    return changed(data, chance) if chance.random() < 0.5 else data


def changed(good: bytes, chance: random.Random) -> bytes:
    """Return bytes with a few changes."""
    data = bytearray(good)
    for _ in range(chance.randint(1, 4)):
        # Mostly where there is something to understand: sound makes sense whatever it is.
        place = chance.randrange(min(len(data), chance.choice((60, 400, 1_500, 1 << 20))) + 1)
        end = place + chance.choice((1, 2, 8, 100))
        match chance.randrange(7):
            case 0:
                data[place:place] = chance.choice(TOKENS)
            case 1:
                data[place:end] = chance.choice(TOKENS)
            case 2:
                del data[place:end]
            case 3:
                data[place:place] = data[place:end] * chance.choice((1, 3, 50))
            case 4:
                data[place:end] = chance.randbytes(end - place)
            case 5 if place < len(data):
                data[place] ^= 1 << chance.randrange(8)
            case _:
                del data[place + chance.randrange(len(data) + 1) :]
    return bytes(data)


def kind_of(answer: bytes) -> str:
    """Return its first line, or the frame or event that it ends with."""
    first = answer.split(b"\r\n")[0] if answer.startswith(b"HTTP") else answer[-120:]
    return "".join(chr(byte) for byte in first if 32 <= byte < 127)[-40:]


@dataclass
class Fuzz:
    """What is sent to a port, and what was wrong with what came back."""

    port: int
    good: Sequence[Sequence[Part]]
    before: bytes = b""
    """Sent as it is before each, and answered."""
    failures: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    """How often each kind of answer came, by its beginning or its last message."""

    async def run(self, count: int, seed: int) -> None:
        """Send so many, some at a time."""
        numbers = iter(range(count))
        await asyncio.gather(*(self._work(numbers, seed) for _ in range(AT_ONCE)))

    async def _work(self, numbers: Iterator[int], seed: int) -> None:
        for number in numbers:
            chance = random.Random(f"{seed} {number}")
            data = mutated(chance.choice(self.good), chance)
            try:
                answer = await asyncio.wait_for(self._ask(data, chance.random() < HANGS_UP), PATIENCE_S)
            except asyncio.TimeoutError:
                self.failures.append(f"{seed} {number}: no end of it: {data[:2_000]!r}")
                continue
            self.answers[kind_of(answer)] += 1
            self.failures += [f"{seed} {number}: {mark!r} for {data[:2_000]!r}" for mark in TELLTALES if mark in answer]

    async def _ask(self, data: bytes, hang_up: bool) -> bytes:
        """Return what comes back until the other side hangs up, having waited in vain for more."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            if self.before:
                writer.write(self.before)
                await reader.readuntil(b"\r\n\r\n")
            writer.write(data)
            if hang_up:
                writer.write_eof()
            return await reader.read()
        except ConnectionError:  # it has had enough
            return b""
        finally:
            writer.transport.abort()
