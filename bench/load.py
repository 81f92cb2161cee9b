"""Clients of the network while a microphone is spoken into: what each of them waits for, and whether any is forgotten.

The daemon is a process of its own with a file at the pace of speech as its microphone; each client knows what its
recordings say. Clients ask for a recording after another, each at its own times, as people do; streams play sentences
at the pace of speech. With `--every 0` each client asks again as soon as it is answered, as much as the machine can do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import wave
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import connect

from edge_asr.audio.decode import read
from edge_asr.bench.proc import read_process
from edge_asr.bench.subscriber import subscribed
from edge_asr.broker import HOST, serving
from edge_asr.config import BUNDLED_MODEL
from edge_asr.speech.energy import end_of_sound
from edge_asr.types import SAMPLE_RATE, Samples

ROOT = Path(__file__).parents[1]
DEVICE = "load"
PIECE_S = 0.1
"""What a stream sends at a time."""
GAPS_S = (1.2, 2.4)
"""Silence between sentences of a stream, and of the microphone."""
PATIENCE_S = 120.0
WARM_UP = 0.2
"""Of the time; what the daemon takes at first says nothing of what it goes on to take."""
RSS_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Sentence:
    """A recording and what it says; None: nobody knows, for the weights are random."""

    sound: Samples
    text: str | None

    @property
    def pcm(self) -> bytes:
        """The sound as signed 16 bits."""
        return np.round(self.sound * 32767).astype("<i2").tobytes()

    @property
    def wav(self) -> bytes:
        """The sound as a WAV file."""
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            out.writeframes(self.pcm)
        return file.getvalue()


@dataclass
class Outcome:
    """What became of the clients' requests."""

    latencies_ms: list[float] = field(default_factory=list)
    """Of the requests that were answered, from the first byte sent to the last received."""
    refused: Counter[int] = field(default_factory=Counter)
    """Told to come back later, by status."""
    wrong: list[str] = field(default_factory=list)
    """Answered with another text than was spoken, or not at all."""
    finals_ms: list[float] = field(default_factory=list)
    """Of the streams: from the end of a sentence's sound to its transcript."""
    sentences: int = 0
    """Played by streams."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How much is asked for."""

    clients: int
    streams: int
    seconds: float
    every_s: float
    model: Path | None = None
    options: tuple[str, ...] = ()


def bundled_sentences() -> list[Sentence]:
    """Return the recordings of the bundled model with their texts."""
    folder = BUNDLED_MODEL / "samples"
    lines = (folder / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    return [Sentence(read(folder / name), text) for name, text in (line.split("\t") for line in lines)]


def percentiles(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return how many there are, their mean, p50, p95, p99 and the largest."""
    if not values:
        return {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None, "max": None}
    found = {f"p{share}": round(float(np.percentile(values, share)), 1) for share in (50, 95, 99)}
    return {"count": len(values), "mean": round(float(np.mean(values)), 1), **found, "max": round(max(values), 1)}


class Client:
    """One that keeps its connection; hand-written, for a library would take half of the machine from the daemon."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self._port = port
        self._more = f"Authorization: Bearer {token}\r\n" if token else ""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: bytes, kind: str = "audio/wav") -> tuple[int, dict[str, Any]]:
        """Return status and answer."""
        if self._writer is None or self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(HOST, self._port)
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}:{self._port}\r\nContent-Type: {kind}\r\n{self._more}"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status, headers = await self._head(self._reader)
        answer = await self._reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("connection") == "close":
            await self.close()
        return status, json.loads(answer)

    async def close(self) -> None:
        """Hang up."""
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        self._reader = self._writer = None

    async def _head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        return int(first.split()[1]), {name.lower(): value.strip().lower() for name, _, value in pairs}


async def ask(number: int, port: int, setting: Setting, sentences: Sequence[Sentence], outcome: Outcome) -> None:
    """Ask for one recording after another until the time is over."""
    chance, client = random.Random(number), Client(port)
    ends_at = time.monotonic() + setting.seconds
    bodies = [(sentence, sentence.wav) for sentence in sentences]
    await asyncio.sleep(chance.random() * min(setting.every_s, setting.seconds))
    try:
        while (began_at := time.monotonic()) < ends_at:
            sentence, body = chance.choice(bodies)
            try:
                status, answer = await asyncio.wait_for(client.post("/recognize", body), PATIENCE_S)
            except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError) as error:
                outcome.wrong.append(f"client {number}: no answer: {error!r}")
                await client.close()
                continue
            took_s = time.monotonic() - began_at
            if status in (429, 503):
                outcome.refused[status] += 1
                await asyncio.sleep(1)
            elif status != 200 or (sentence.text is not None and answer["text"] != sentence.text):
                outcome.wrong.append(f"client {number}: {status} {str(answer)[:200]}, not {sentence.text}")
            else:
                outcome.latencies_ms.append(took_s * 1e3)
            pause_s = chance.uniform(0.5, 1.5) * setting.every_s
            await asyncio.sleep(max(0.0, pause_s - took_s))
    finally:
        await client.close()


async def stream(number: int, port: int, setting: Setting, sentences: Sequence[Sentence], outcome: Outcome) -> None:
    """Speak one sentence after another into a stream until the time is over, and compare what comes back."""
    chance = random.Random(1_000 + number)
    ended_at: list[float] = []
    spoken: list[Sentence] = []
    heard: list[str] = []
    async with connect(f"ws://{HOST}:{port}/stream_recognize", compression=None) as socket:
        await socket.send(json.dumps({"type": "config", "sample_rate": SAMPLE_RATE}))

        async def listen() -> None:
            async for message in socket:
                found = json.loads(message)
                if found["type"] == "final":
                    if len(heard) < len(ended_at):  # there are no more than were spoken, or it is told below
                        outcome.finals_ms.append((time.monotonic() - ended_at[len(heard)]) * 1e3)
                    heard.append(found["text"])
                elif found["type"] != "partial":
                    return

        listening = asyncio.create_task(listen())
        pace = Pace()
        await asyncio.sleep(chance.random() * 2)
        ends_at = time.monotonic() + setting.seconds
        pace.begin()
        while time.monotonic() < ends_at and not listening.done():
            spoken.append(chance.choice(sentences))
            ended_at.append(pace.at + end_of_sound(spoken[-1].sound) / SAMPLE_RATE)
            await pace.play(socket, spoken[-1].pcm)
            await pace.play(socket, bytes(2 * round(chance.uniform(*GAPS_S) * SAMPLE_RATE)))
        await socket.send('{"type": "end"}')
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(listening, PATIENCE_S)
    outcome.sentences += len(spoken)
    wanted = [sentence.text for sentence in spoken]
    if None not in wanted and heard != wanted:
        outcome.wrong.append(f"stream {number}: {heard} instead of {wanted}")


class Pace:
    """Sends sound at the pace of speech."""

    def begin(self) -> None:
        """Count from now on."""
        self.at = time.monotonic()

    async def play(self, socket: Any, pcm: bytes) -> None:
        """Send all of it, a piece at a time."""
        step = 2 * round(PIECE_S * SAMPLE_RATE)
        for start in range(0, len(pcm), step):
            piece = pcm[start : start + step]
            self.at += len(piece) / 2 / SAMPLE_RATE
            await asyncio.sleep(max(0.0, self.at - time.monotonic()))
            await socket.send(piece)


def make_tape(path: Path, sentences: Sequence[Sentence], seconds: float) -> list[str | None]:
    """Write what the microphone hears; return what is said on it."""
    chance, parts, said, length = random.Random(0), [], [], 0
    while length < seconds * SAMPLE_RATE:
        sentence = chance.choice(sentences)
        gap = np.zeros(round(chance.uniform(*GAPS_S) * SAMPLE_RATE), np.float32)
        parts += [gap, sentence.sound]
        length += len(gap) + len(sentence.sound)
        said.append(sentence.text)
    samples = np.concatenate([*parts, np.zeros(SAMPLE_RATE, np.float32)])
    path.write_bytes(Sentence(samples, None).wav)
    return said


def free_port() -> int:
    """Return a port that is free at the moment."""
    with socket.create_server((HOST, 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def daemon(folder: Path, http: int, mqtt: int, setting: Setting, tape: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the daemon; the tape begins when it is ready."""
    options = [
        f"device_id={DEVICE}", f"state_dir={folder / 'state'}", f"mqtt.port={mqtt}", f"http.port={http}",
        "http.enabled=true", "http.limits.requests_per_minute=1000000", "home_assistant.enabled=false",
        *([] if setting.model is None else [f"model={setting.model}", "gates.min_confidence=0"]), *setting.options,
    ]  # fmt: skip
    arguments = [part for option in options for part in ("-o", option)]
    log = (folder / "daemon.log").open("wb")
    command = [sys.executable, "-m", "edge_asr", "run", "--source", str(tape), *arguments]
    with log, subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


async def until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server says that it is ready. Raises RuntimeError where it ends instead."""
    give_up_at = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_at:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(f"GET /readyz HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            if answer.split()[1] == b"200":
                return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"the daemon is not ready: {log.read_text(encoding='utf-8')[-2000:]}")


async def watch(pid: int, found: list[tuple[float, float]]) -> None:
    """Note the memory of the daemon and its children, again and again: seconds, MB."""
    began_at = time.monotonic()
    while True:
        found.append((time.monotonic() - began_at, read_process(pid).rss_bytes / 1e6))
        await asyncio.sleep(RSS_EVERY_S)


@contextlib.asynccontextmanager
async def watching(pid: int) -> AsyncIterator[list[tuple[float, float]]]:
    """Watch the memory until the block ends."""
    found: list[tuple[float, float]] = []
    task = asyncio.create_task(watch(pid, found))
    try:
        yield found
    finally:
        task.cancel()


async def measure(setting: Setting, sentences: Sequence[Sentence], folder: Path) -> dict[str, Any]:
    """Return what was measured."""
    tape, outcome = folder / "microphone.wav", Outcome()
    said = make_tape(tape, sentences, setting.seconds + 5)
    http = free_port()
    async with serving() as broker, subscribed(broker.port, f"edge_asr/{DEVICE}/transcript", folder / "said") as heard:
        with daemon(folder, http, broker.port, setting, tape) as process:
            await until_ready(http, process, folder / "daemon.log")
            async with watching(process.pid) as memory:
                used = read_process(process.pid).cpu_s
                began_at = time.monotonic()
                await asyncio.gather(
                    *(ask(number, http, setting, sentences, outcome) for number in range(setting.clients)),
                    *(stream(number, http, setting, sentences, outcome) for number in range(setting.streams)),
                )
                took_s = time.monotonic() - began_at
                used = read_process(process.pid).cpu_s - used
            messages = await heard.collect()
    return report(setting, outcome, messages, said, memory, took_s, used)


def report(
    setting: Setting,
    outcome: Outcome,
    messages: Sequence[dict[str, Any]],
    said: Sequence[str | None],
    memory: Sequence[tuple[float, float]],
    took_s: float,
    used_s: float,
) -> dict[str, Any]:
    """Return the figures."""
    texts = [message["text"] for message in messages]
    settled = [(at, megabytes) for at, megabytes in memory if at >= WARM_UP * took_s] or list(memory)
    times, sizes = zip(*settled, strict=True)
    slope = float(np.polyfit(times, sizes, 1)[0]) * 60 if len(settled) > 2 else 0.0
    return {
        "clients": setting.clients,
        "streams": setting.streams,
        "seconds": round(took_s, 1),
        "every_s": setting.every_s,
        "requests_per_s": round(len(outcome.latencies_ms) / took_s, 2),
        "request_ms": percentiles(outcome.latencies_ms),
        "refused": dict(outcome.refused),
        "wrong": outcome.wrong,
        "stream_sentences": outcome.sentences,
        "stream_final_ms": percentiles(outcome.finals_ms),
        "microphone": {
            "sentences": len(texts),
            "wrong": sum(text != wanted for text, wanted in zip(texts, said, strict=False) if wanted is not None),
            "late": sum(message["within_budget"] is False for message in messages),
            "lost": sum(bool(message.get("lost")) for message in messages),
            "response_ms": percentiles([message["latency_ms"]["response"] for message in messages]),
            "total_ms": percentiles([message["latency_ms"].get("total", 0.0) for message in messages]),
        },
        "memory_mb": {"first": round(sizes[0], 1), "last": round(sizes[-1], 1), "most": round(max(sizes), 1),
                      "slope_per_minute": round(slope, 2)},
        "cores": round(used_s / took_s, 2),
    }  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--clients", type=int, default=50, help="REST clients")
    parser.add_argument("--streams", type=int, default=20, help="WebSocket streams")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between two requests of a client; 0: at once")
    parser.add_argument("--model", type=Path, help="another model than the bundled one; its texts are not checked")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="KEY=VALUE", help="configuration")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Measure and print one JSON object; 1 where anything was wrong."""
    wanted = arguments(given)
    setting = Setting(
        wanted.clients, wanted.streams, wanted.seconds, wanted.every, wanted.model, tuple(wanted.options)
    )  # fmt: skip
    sentences = bundled_sentences()
    if wanted.model is not None:
        sentences = [Sentence(sentence.sound, None) for sentence in sentences]
    with tempfile.TemporaryDirectory(prefix="edge_asr-load-") as folder:
        found = asyncio.run(measure(setting, sentences, Path(folder)))
    print(json.dumps(found, ensure_ascii=False))
    return 1 if found["wrong"] or found["microphone"]["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
