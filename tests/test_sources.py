"""Sources: one contract for all of them, then what is special to files and to standard input."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import threading
import wave
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pytest

from edge_asr.audio.file import FileSource
from edge_asr.audio.source import AudioSource, Chunker
from edge_asr.audio.stdin import StdinSource
from edge_asr.config import StdinSourceConfig
from edge_asr.errors import AudioError
from edge_asr.sources import WatchedSource
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, SAMPLE_RATE, Chunk

Int16 = npt.NDArray[np.int16]
MakeSource = Callable[[Int16], AudioSource]


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now = 1000.0
        self._oversleep_s = oversleep_s

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds + (self._oversleep_s if seconds else 0.0)
        await asyncio.sleep(0)


def noise(samples: int) -> Int16:
    return np.random.default_rng(samples).integers(-32768, 32768, samples).astype(np.int16)


def write_wav(path: Path, samples: Int16) -> Path:
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SAMPLE_RATE)
        out.writeframes(samples.astype("<i2").tobytes())
    return path


@pytest.fixture
def pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A pipe's reading and writing ends, unbuffered."""
    receiver, sender = os.pipe()
    with os.fdopen(receiver, "rb", buffering=0) as reading, os.fdopen(sender, "wb", buffering=0) as writing:
        yield reading, writing


@pytest.fixture(params=["file as fast as it goes", "file at real-time pace", "stdin from a pipe", "stdin from a file"])
def make_source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeSource]:
    """Make a source that plays the given samples once; it is closed afterwards."""
    stack = ExitStack()

    def make(samples: Int16) -> AudioSource:
        path = write_wav(tmp_path / "sound.wav", samples)
        raw = tmp_path / "sound.raw"
        raw.write_bytes(samples.astype("<i2").tobytes())
        source: AudioSource
        if request.param == "file as fast as it goes":
            source = FileSource(path, realtime=False)
        elif request.param == "file at real-time pace":
            time = FakeTime()
            source = FileSource(path, clock=time.clock, sleep=time.sleep)
        elif request.param == "stdin from a file":
            source = StdinSource(stack.enter_context(raw.open("rb")))
        else:
            process = stack.enter_context(subprocess.Popen(["cat", str(raw)], stdout=subprocess.PIPE))
            source = StdinSource(process.stdout)
        stack.callback(source.close)
        return source

    with stack:
        yield make


async def collect(source: AudioSource) -> list[Chunk]:
    return [chunk async for chunk in source.chunks()]


# The contract


@pytest.mark.parametrize("samples", [1, CHUNK_SAMPLES - 1, CHUNK_SAMPLES, 3 * CHUNK_SAMPLES + 100, 100_000])
async def test_all_samples_come_out_in_order_as_chunks(make_source: MakeSource, samples: int) -> None:
    sound = noise(samples)
    chunks = await collect(make_source(sound))
    assert {(chunk.samples.shape, chunk.samples.dtype) for chunk in chunks} == {((CHUNK_SAMPLES,), np.dtype("float32"))}
    assert [chunk.index for chunk in chunks] == [CHUNK_SAMPLES * i for i in range(-(-samples // CHUNK_SAMPLES))]
    played = np.concatenate([chunk.samples for chunk in chunks])
    np.testing.assert_array_equal(played[:samples], sound / 32768)
    assert not played[samples:].any()


async def test_capture_times_never_go_back(make_source: MakeSource) -> None:
    times = [chunk.captured_at for chunk in await collect(make_source(noise(50_000)))]
    assert times == sorted(times)


async def test_close_ends_the_iteration(make_source: MakeSource) -> None:
    source = make_source(noise(200_000))
    chunks = source.chunks()
    await anext(chunks)
    source.close()
    assert [chunk async for chunk in chunks] == []
    source.close()


async def test_a_source_closed_before_it_played_has_no_chunks(make_source: MakeSource) -> None:
    source = make_source(noise(10_000))
    source.close()
    assert await collect(source) == []


async def test_leaving_early_leaves_no_thread(make_source: MakeSource) -> None:
    before = set(threading.enumerate())
    chunks = make_source(noise(200_000)).chunks()
    await anext(chunks)
    assert set(threading.enumerate()) > before
    assert isinstance(chunks, AsyncGenerator)
    await chunks.aclose()
    assert set(threading.enumerate()) == before


async def test_playing_to_the_end_leaves_no_thread(make_source: MakeSource) -> None:
    before = set(threading.enumerate())
    await collect(make_source(noise(2_000)))
    assert set(threading.enumerate()) == before


# The chunker


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 5_000])
def test_chunks_do_not_depend_on_how_the_samples_arrive(size: int) -> None:
    sound = np.arange(5_000, dtype=np.float32)
    chunker = Chunker(lambda index: index / SAMPLE_RATE)
    chunks = [chunk for start in range(0, 5_000, size) for chunk in chunker.push(sound[start : start + size])]
    chunks += chunker.flush()
    np.testing.assert_array_equal(np.concatenate([chunk.samples for chunk in chunks])[:5_000], sound)
    assert [(chunk.index, chunk.captured_at) for chunk in chunks] == [
        (i * 512, i * 512 / SAMPLE_RATE) for i in range(10)
    ]
    assert list(chunker.flush()) == []


# Files


async def test_a_file_plays_at_the_pace_of_a_microphone(tmp_path: Path) -> None:
    time = FakeTime(oversleep_s=0.005)
    source = FileSource(write_wav(tmp_path / "a.wav", noise(200 * CHUNK_SAMPLES)), clock=time.clock, sleep=time.sleep)
    chunks = source.chunks()
    started_at = time.now
    async for chunk in chunks:
        available_at = started_at + chunk.index / SAMPLE_RATE + CHUNK_S
        assert chunk.captured_at == pytest.approx(available_at - CHUNK_S, abs=1e-6)
        assert available_at - 1e-6 <= time.now <= available_at + 0.005 + 1e-6  # late by one wake-up, never by their sum


async def test_a_slow_listener_catches_up(tmp_path: Path) -> None:
    time = FakeTime()
    source = FileSource(write_wav(tmp_path / "a.wav", noise(20 * CHUNK_SAMPLES)), clock=time.clock, sleep=time.sleep)
    started_at = time.now
    async for chunk in source.chunks():
        if chunk.index == 0:
            time.now += 0.2
    assert time.now == pytest.approx(started_at + 20 * CHUNK_S)


async def test_a_file_as_fast_as_it_goes_is_captured_when_it_is_delivered(tmp_path: Path) -> None:
    time = FakeTime()
    path = write_wav(tmp_path / "a.wav", noise(5 * CHUNK_SAMPLES))
    async for chunk in FileSource(path, realtime=False, clock=time.clock, sleep=time.sleep).chunks():
        assert chunk.captured_at == time.now - CHUNK_S
        time.now += 1


async def test_a_file_is_named_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = FileSource("./none.wav")
    assert source.name == "file:./none.wav"
    assert FileSource("a.wav", name="door").name == "door"
    with pytest.raises(AudioError, match=r"^\./none\.wav: no such file"):
        await collect(source)


async def test_other_tasks_get_a_turn_between_any_two_chunks(tmp_path: Path) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    source = FileSource(write_wav(tmp_path / "a.wav", noise(50_000)), realtime=False)
    turns_at_chunk = [turns async for _ in source.chunks()]
    counter.cancel()
    assert turns_at_chunk == sorted(set(turns_at_chunk))


# Standard input


async def test_a_chunk_comes_as_soon_as_its_last_byte(pipe: tuple[BinaryIO, BinaryIO]) -> None:
    reading, writing = pipe
    sound = noise(CHUNK_SAMPLES)
    source = StdinSource(reading, clock=lambda: 50.0)
    chunks = source.chunks()
    for piece in (sound.tobytes()[:333], sound.tobytes()[333:]):
        writing.write(piece)
    chunk = await anext(chunks)
    np.testing.assert_array_equal(chunk.samples, sound / 32768)
    assert chunk.captured_at == 50.0 - CHUNK_S
    source.close()


async def test_what_came_in_while_it_was_muted_is_not_heard_after_that_however_late_it_is_taken(
    pipe: tuple[BinaryIO, BinaryIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = pipe
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=reading))
    watched = WatchedSource(StdinSourceConfig(), lambda: None)
    sound = noise(8 * CHUNK_SAMPLES)
    pieces = [piece.tobytes() for piece in sound.reshape(8, -1)]
    chunks = aiter(watched.audio.chunks())
    writing.write(b"".join(pieces[:3]))
    heard = [await anext(chunks)]  # it has taken all three
    watched.mute(True)
    writing.write(b"".join(pieces[3:5]) + pieces[5][:10])
    watched.mute(False)
    writing.write(pieces[5][10:] + b"".join(pieces[6:]))
    heard += [await anext(chunks) for _ in range(7)]
    assert [chunk.lost for chunk in heard] == [False, *[True] * 5, False, False]
    assert [chunk.index for chunk in heard] == [k * CHUNK_SAMPLES for k in range(8)]
    np.testing.assert_array_equal(heard[6].samples, sound[6 * CHUNK_SAMPLES : 7 * CHUNK_SAMPLES] / 32768)
    watched.audio.close()
    watched.mute(False)


async def test_a_file_on_standard_input_waits_while_it_is_muted(tmp_path: Path) -> None:
    (tmp_path / "sound.raw").write_bytes(noise(SAMPLE_RATE + 4 * CHUNK_SAMPLES).tobytes())
    with (tmp_path / "sound.raw").open("rb") as file:
        source = StdinSource(file)
        chunks = source.chunks()
        heard = [await anext(chunks)]
        source.forget()
        heard += [chunk async for chunk in chunks]
    assert not heard[0].lost
    assert [chunk.lost for chunk in heard[1:]] == [True] * 31 + [False] * 4, "what was taken already is lost, no more"


async def test_half_a_sample_at_the_end_is_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    chunks = await collect(StdinSource(io.BytesIO(b"\x00\x40\x00\xc0\x01")))
    assert len(chunks) == 1
    assert chunks[0].samples[:3].tolist() == [0.5, -0.5, 0.0]
    assert "half a sample" in caplog.text


class Trickle(io.BytesIO):
    """Gives an odd number of bytes at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(333)


async def test_samples_survive_being_torn_apart() -> None:
    sound = noise(4 * CHUNK_SAMPLES)
    chunks = await collect(StdinSource(Trickle(sound.tobytes())))
    np.testing.assert_array_equal(np.concatenate([chunk.samples for chunk in chunks]), sound / 32768)


async def test_no_bytes_are_no_chunks() -> None:
    assert await collect(StdinSource(io.BytesIO(b""))) == []


async def waiting_for_input(source: StdinSource) -> asyncio.Task[list[Chunk]]:
    """Start to read, and return once the thread does."""
    task = asyncio.create_task(collect(source))
    while not any(thread.name.startswith(source.name) for thread in threading.enumerate()):
        await asyncio.sleep(0)
    return task


async def test_close_ends_a_wait_for_input(pipe: tuple[BinaryIO, BinaryIO]) -> None:
    source = StdinSource(pipe[0], name="silent")
    task = await waiting_for_input(source)
    source.close()
    assert await task == []


async def test_cancelling_ends_a_wait_for_input(pipe: tuple[BinaryIO, BinaryIO]) -> None:
    before = set(threading.enumerate())
    task = await waiting_for_input(StdinSource(pipe[0], name="silent"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert set(threading.enumerate()) == before


async def test_a_terminal_is_refused_with_the_remedy() -> None:
    leader, follower = os.openpty()
    with os.fdopen(follower, "rb") as terminal, pytest.raises(AudioError, match="stdin is a terminal; pipe"):
        await collect(StdinSource(terminal))
    os.close(leader)


FORGETFUL = """
import asyncio
from edge_asr.audio.stdin import StdinSource

async def listen():
    async for chunk in StdinSource().chunks():
        print(chunk.index, flush=True)
        asyncio.current_task().cancel()

try:
    asyncio.run(listen())
except asyncio.CancelledError:
    print("cancelled")
"""


def test_a_process_ends_though_its_input_does_not() -> None:
    with subprocess.Popen([sys.executable, "-c", FORGETFUL], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(bytes(2 * CHUNK_SAMPLES))
        process.stdin.flush()
        assert process.stdout.read() == b"0\ncancelled\n"
        assert process.wait() == 0


async def test_a_named_pipe_is_refused_for_it_could_block_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(AudioError, match=r"pipe\.wav: is no regular file; pipe sound into"):
        await anext(FileSource(tmp_path / "pipe.wav").chunks())


def test_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(AudioError, match="standard input is closed"):
        StdinSource()


async def test_a_name_that_is_no_path_is_refused() -> None:
    with pytest.raises(AudioError, match="is no path"):
        await anext(FileSource("a\0b").chunks())
