"""Uploads of unknown origin: decoded in children that may not take much, and that nobody misses."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import wave
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import av
import numpy as np
import pytest
from bundled import recording, sound_of, transcripts
from mosquitto import PATIENCE_S, wait_for

from edge_asr.audio.decode import read
from edge_asr.audio.decoders import Decoders
from edge_asr.errors import AudioError, DecoderDiedError, TooLongAudioError
from edge_asr.types import SAMPLE_RATE, Samples

NAME = min(transcripts())
KINDS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "mp3", "ogg": "libopus", "webm": "libopus", "mp4": "aac"}

Make = Callable[..., Decoders]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Return what makes a pool; at the end no child is left."""
    made: list[Decoders] = []

    def pool(**keys: float) -> Decoders:
        made.append(Decoders(**{"max_audio_s": 60.0, **keys}))  # type: ignore[arg-type]
        return made[-1]

    yield pool
    for one in made:
        await one.close()


def encoded(samples: Samples, kind: str, rate: int = 48_000) -> bytes:
    """Return a file of a kind with such a sound."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(KINDS[kind], rate=rate)
        frame = av.AudioFrame.from_ndarray((samples[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        resampler = av.AudioResampler(stream.format.name, stream.layout.name, rate, stream.codec_context.frame_size)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


def pids(decoders: Decoders) -> list[int]:
    return [child._process.pid for child in decoders._free]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_upload_sounds_as_the_file_does(make: Make, kind: str) -> None:
    data = encoded(sound_of(NAME), kind)
    np.testing.assert_array_equal(await make().decode(data), read(io.BytesIO(data)))


async def test_a_recording_comes_out_bit_for_bit_from_any_kind_of_bytes(make: Make) -> None:
    data, decoders = recording(NAME).read_bytes(), make()
    for kind in (bytes, bytearray, memoryview):
        np.testing.assert_array_equal(await decoders.decode(kind(data)), sound_of(NAME))


async def test_many_at_once_share_a_few_children(make: Make) -> None:
    decoders = make(processes=2)
    names = sorted(transcripts()) * 4
    found = await asyncio.gather(*(decoders.decode(recording(name).read_bytes()) for name in names))
    for name, samples in zip(names, found, strict=True):
        np.testing.assert_array_equal(samples, sound_of(name))
    assert 1 <= len(set(pids(decoders))) <= 2


@pytest.mark.parametrize("data", [b"", b"nothing of the kind", b"RIFF\0\0\0\0WAVE", b"\xff" * 5000, b"\0" * 5000])
async def test_what_is_no_audio_is_said_so_and_the_child_lives_on(make: Make, data: bytes) -> None:
    decoders = make()
    with pytest.raises(AudioError, match=r"^the upload: "):
        await decoders.decode(data)
    before = pids(decoders)
    assert len(await decoders.decode(recording(NAME).read_bytes()))
    assert pids(decoders) == before


@pytest.mark.parametrize(
    "trick",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{path}'\n",
        "[playlist]\nFile1={path}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\n",
    ],
)
async def test_an_upload_that_names_other_files_opens_none_of_them(make: Make, trick: str) -> None:
    with pytest.raises(AudioError):
        await make().decode(trick.format(path=recording(NAME)).encode())


async def test_a_small_file_of_hours_is_stopped_at_the_limit(make: Make) -> None:
    bomb = encoded(np.zeros(SAMPLE_RATE * 600, np.float32), "flac", 16_000)
    assert len(bomb) < 200_000  # of 19 MB
    with pytest.raises(TooLongAudioError, match="longer than 60 s"):
        await (decoders := make()).decode(bomb)
    assert len(await decoders.decode(recording(NAME).read_bytes()))


async def test_what_is_exactly_as_long_as_allowed_is_taken(make: Make) -> None:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        out.writeframes(bytes(2 * 60 * SAMPLE_RATE))
    assert len(await make().decode(file.getvalue())) == 60 * SAMPLE_RATE


async def test_a_child_that_dies_takes_no_other_job_with_it(make: Make) -> None:
    decoders = make(processes=1)
    await decoders.decode(recording(NAME).read_bytes())
    [pid] = pids(decoders)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DecoderDiedError, match="convert it"):
        await decoders.decode(recording(NAME).read_bytes())
    np.testing.assert_array_equal(await decoders.decode(recording(NAME).read_bytes()), sound_of(NAME))
    assert pids(decoders) != [pid]


async def test_a_child_that_hangs_is_ended(make: Make) -> None:
    decoders = make(processes=1, timeout_s=0.5)
    await decoders.decode(recording(NAME).read_bytes())
    [pid] = pids(decoders)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DecoderDiedError):
        await asyncio.wait_for(decoders.decode(recording(NAME).read_bytes()), PATIENCE_S)
    assert not Path(f"/proc/{pid}").exists()


async def test_who_gives_up_leaves_the_place_to_the_next(make: Make) -> None:
    decoders = make(processes=1)
    await decoders.decode(recording(NAME).read_bytes())
    [pid] = pids(decoders)
    os.kill(pid, signal.SIGSTOP)
    waiting = [asyncio.create_task(decoders.decode(recording(NAME).read_bytes())) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[1].cancel()
    found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), PATIENCE_S)
    assert [type(one) for one in found[:2]] == [asyncio.CancelledError] * 2
    np.testing.assert_array_equal(found[2], sound_of(NAME))


async def test_a_child_may_take_so_much_memory_and_no_more(make: Make) -> None:
    decoders = make(memory_mb=1)
    with pytest.raises(AudioError, match=r"memory|known format"):
        await decoders.decode(bytes(50_000_000))
    bigger = make(memory_mb=512)
    assert len(await bigger.decode(recording(NAME).read_bytes()))


async def test_a_child_may_take_so_much_of_the_processor_and_no_more(make: Make) -> None:
    """A second at most, for the limit counts whole ones."""
    noise = np.random.default_rng(0).standard_normal(SAMPLE_RATE * 60, np.float32)
    minute = encoded(noise / np.float32(8), "mp3")
    with pytest.raises(DecoderDiedError):
        await make(cpu_s=0, max_audio_s=36_000).decode(minute * 100)


async def test_the_children_end_with_whoever_started_them(tmp_path: Path) -> None:
    code = f"""
import asyncio, time
from edge_asr.audio.decoders import Decoders
async def main():
    decoders = Decoders(max_audio_s=60)
    await decoders.decode(open({str(recording(NAME))!r}, 'rb').read())
    print(decoders._free[0]._process.pid, flush=True)
    time.sleep(600)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the end of the child")


async def test_damaged_uploads_never_break_the_pool(make: Make) -> None:
    decoders, chance = make(processes=1), np.random.default_rng(1)
    whole = [encoded(sound_of(NAME), kind) for kind in ("flac", "ogg", "mp4", "webm")]
    for number in range(60):
        data = bytearray(whole[number % len(whole)])
        for place in chance.integers(0, len(data), 20):
            data[place] = int(chance.integers(0, 256))
        del data[int(chance.integers(1, len(data))) :]
        [outcome] = await asyncio.gather(decoders.decode(data), return_exceptions=True)
        assert isinstance(outcome, np.ndarray) or (type(outcome) is AudioError and "the upload: " in str(outcome))
    np.testing.assert_array_equal(await decoders.decode(recording(NAME).read_bytes()), sound_of(NAME))
