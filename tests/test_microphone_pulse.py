"""The supervised microphone on a real one: the monitor of a private PulseAudio, through ALSA and PortAudio."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import time
import wave
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from mosquitto import wait_for
from pulse import MICROPHONE, PulseServer

from edge_asr.audio.microphone import MicrophoneSource
from edge_asr.audio.portaudio import input_devices
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Chunk

log = logging.getLogger(__name__)

LIMIT_S = 60.0
Int16 = npt.NDArray[np.int16]


class Ear:
    """Listens to a microphone in the background, and keeps what it hears."""

    def __init__(self, source: MicrophoneSource) -> None:
        self.source = source
        self.chunks: list[Chunk] = []
        self._news = asyncio.Event()

    async def listen(self) -> None:
        async with aclosing(self.source.chunks()) as chunks:
            async for chunk in chunks:
                self.chunks.append(chunk)
                self._news.set()

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Return as soon as the condition holds; it is looked at whenever a chunk has come, and now and then."""

        async def look() -> None:
            while not condition():
                self._news.clear()
                try:
                    await asyncio.wait_for(self._news.wait(), 0.05)
                except asyncio.TimeoutError:
                    continue

        try:
            await asyncio.wait_for(look(), LIMIT_S)
        except asyncio.TimeoutError:
            pytest.fail(f"waited in vain for: {what}; {self.source.health}")

    async def sound(self) -> Chunk:
        """Return the next chunk that comes of a recording."""
        heard = len(self.chunks)
        await self.until(lambda: any(not chunk.lost for chunk in self.chunks[heard:]), "sound")
        return next(chunk for chunk in self.chunks[heard:] if not chunk.lost)


@pytest.fixture
async def ear(pulse_server: PulseServer) -> AsyncIterator[Callable[[MicrophoneSource], Ear]]:
    tasks = []

    def listen(source: MicrophoneSource) -> Ear:
        made = Ear(source)
        tasks.append((made, asyncio.create_task(made.listen())))
        return made

    yield listen
    for made, task in tasks:
        made.source.close()
        await asyncio.wait_for(task, LIMIT_S)


Listen = Callable[[MicrophoneSource], Ear]


def noise(seconds: float, rate: int = SAMPLE_RATE, channels: int = 1, peak: int = 8000) -> Int16:
    return np.random.default_rng(3).integers(-peak, peak, (round(seconds * rate), channels)).astype(np.int16)


def write_wav(path: Path, frames: Int16, rate: int = SAMPLE_RATE) -> Path:
    with wave.open(str(path), "wb") as out:
        out.setnchannels(frames.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(frames.astype("<i2").tobytes())
    return path


def padded(frames: Int16, rate: int = SAMPLE_RATE) -> Int16:
    """Return frames with silence around them: PulseAudio may swallow the first milliseconds of a stream."""
    silence = np.zeros((rate // 2, frames.shape[1]), np.int16)
    return np.concatenate([silence, frames, silence])


def joined(chunks: list[Chunk]) -> npt.NDArray[np.float64]:
    return np.concatenate([chunk.samples for chunk in chunks]).astype(np.float64)


def place_of(sound: npt.NDArray[np.float64], within: npt.NDArray[np.float64]) -> int:
    """Return where `within` the sound is, by cross-correlation."""
    size = len(within) + len(sound)
    product = np.fft.rfft(within, size) * np.conj(np.fft.rfft(sound, size))
    return int(np.argmax(np.fft.irfft(product, size)[: len(within)]))


async def played(ear: Ear, server: PulseServer, path: Path, sink: str = MICROPHONE) -> None:
    """Play a file that ends in silence, and return when all of it has been heard."""
    await ear.sound()
    heard = len(ear.chunks)
    with server.play(path, sink) as player:
        assert await asyncio.to_thread(player.wait, LIMIT_S) == 0
    await ear.until(lambda: any(chunk.samples.any() for chunk in ear.chunks[heard:]), "the beginning of what is played")
    await ear.until(lambda: not any(chunk.samples.any() for chunk in ear.chunks[-8:]), "its end")


async def recovered(ear: Ear, back: Callable[[], object]) -> tuple[Chunk, Chunk]:
    """Bring the device back; return the chunk that marks the loss and the first of sound after it."""
    lost = next(chunk for chunk in reversed(ear.chunks) if chunk.lost)
    await asyncio.to_thread(back)
    returned_at = time.monotonic()
    sound = await ear.sound()
    log.warning("sound again %.2f s after the device's return", time.monotonic() - returned_at)
    gap_s = (sound.index - lost.index) / SAMPLE_RATE
    assert gap_s == pytest.approx(sound.captured_at - lost.captured_at, abs=0.05)
    assert ear.source.health.state == "capturing"
    return lost, sound


async def test_what_is_played_is_heard_without_a_sample_lost_or_doubled(
    pulse_server: PulseServer, ear: Listen, tmp_path: Path
) -> None:
    assert MICROPHONE in [device.name for device in input_devices()]
    frames = noise(3.0)
    listening = ear(MicrophoneSource(MICROPHONE))
    await played(listening, pulse_server, write_wav(tmp_path / "noise.wav", padded(frames)))
    sound, heard = frames[:, 0] / 32768, joined(listening.chunks)
    at = place_of(sound, heard)
    np.testing.assert_array_equal(heard[at : at + len(sound)], sound)
    assert [chunk.index for chunk in listening.chunks] == list(range(0, len(heard), CHUNK_SAMPLES))


@pytest.mark.slow
@pytest.mark.parametrize("rate", [None, 44_100])
async def test_a_stereo_device_of_44100_hz_is_heard_as_it_sounds(
    pulse_server: PulseServer, ear: Listen, tmp_path: Path, rate: int | None
) -> None:
    pulse_server.add_sink("wide", 44_100, 2)
    pulse_server.name_microphone("wide", "wide")
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.normal(size=3 * 44_100))
    spectrum[3 * 1000 :] = 0  # so slow that half a sample more or less of delay changes little
    mono = np.fft.irfft(spectrum)
    mono *= 8000 / np.abs(mono).max()
    frames = np.stack([mono, mono], axis=1).round().astype(np.int16)
    listening = ear(MicrophoneSource("wide", channel=1, rate=rate))
    await played(listening, pulse_server, write_wav(tmp_path / "wide.wav", padded(frames, 44_100), 44_100), "wide")
    assert listening.source.health.rate == (rate or SAMPLE_RATE)
    low = np.fft.rfft(mono / 32768)[: 3 * 8000 + 1]
    expected, heard = np.fft.irfft(low) * (SAMPLE_RATE / 44_100), joined(listening.chunks)
    at = place_of(expected, heard)
    assert np.corrcoef(heard[at : at + len(expected)], expected)[0, 1] > 0.98
    for start in range(0, len(expected), 8000):  # neither late nor early anywhere: nothing lost or doubled
        part, near = expected[start : start + 8000], heard[at + start - 200 : at + start + 8200]
        assert abs(place_of(part, near) - 200) <= 2


@pytest.mark.slow
async def test_a_microphone_that_is_unplugged_and_plugged_in_again_is_back(
    pulse_server: PulseServer, ear: Listen
) -> None:
    listening = ear(MicrophoneSource(MICROPHONE))
    await listening.sound()
    pulse_server.remove_sink()
    await listening.until(lambda: listening.source.health.state == "waiting", "the loss")
    assert listening.chunks[-1].lost
    await recovered(listening, pulse_server.add_sink)
    assert listening.source.health.gaps == 1


@pytest.mark.slow
async def test_a_sound_server_that_dies_and_comes_back_is_found_again(pulse_server: PulseServer, ear: Listen) -> None:
    listening = ear(MicrophoneSource(MICROPHONE))
    await listening.sound()
    pulse_server.kill()
    await listening.until(lambda: listening.source.health.state == "waiting", "the loss")
    await recovered(listening, lambda: pulse_server.start(**{MICROPHONE: (SAMPLE_RATE, 1)}))


@pytest.mark.slow
async def test_ten_seconds_without_data_are_a_gap_of_ten_seconds(pulse_server: PulseServer, ear: Listen) -> None:
    listening = ear(MicrophoneSource(MICROPHONE))
    await listening.sound()
    pulse_server.suspend()
    try:
        await listening.until(lambda: listening.source.health.state == "stalled", "the stall")
        ticked_at, stalled = listening.source.health.ticked_at, listening.chunks[-1]
        assert stalled.lost
        await listening.until(lambda: listening.source.health.ticked_at > ticked_at + 9, "ten seconds")
    finally:
        pulse_server.resume()
    lost, sound = await recovered(listening, lambda: None)
    assert lost is stalled
    assert listening.source.health.lost_s == pytest.approx((sound.index - lost.index) / SAMPLE_RATE, abs=0.01)
    assert listening.source.health.lost_s > 9


@pytest.mark.slow
async def test_a_device_that_is_renamed_is_found_by_what_stays_of_its_name(
    pulse_server: PulseServer, ear: Listen
) -> None:
    pulse_server.name_microphone("hall_microphone_1")
    listening = ear(MicrophoneSource("Hall_Microphone"))
    await listening.sound()
    assert listening.source.health.device == "hall_microphone_1"
    pulse_server.remove_sink()
    await listening.until(lambda: listening.source.health.state == "waiting", "the loss")
    pulse_server.add_sink("other")
    pulse_server.name_microphone("hall_microphone_2", "other")
    await recovered(listening, lambda: None)
    assert listening.source.health.device == "hall_microphone_2"


@pytest.mark.slow
async def test_clipping_is_told_while_it_lasts(pulse_server: PulseServer, ear: Listen, tmp_path: Path) -> None:
    listening = ear(MicrophoneSource(MICROPHONE))
    frames = np.clip(3 * noise(11.0, peak=20_000).astype(np.int32), -32768, 32767).astype(np.int16)
    await played(listening, pulse_server, write_wav(tmp_path / "loud.wav", padded(frames)))
    await listening.until(lambda: listening.source.health.clipped_share, "a whole window")
    assert listening.source.health.state == "capturing"
    assert listening.source.health.clipped_share > 0.1


@pytest.mark.slow
async def test_digital_silence_is_told_and_ends_with_the_first_sound(
    pulse_server: PulseServer, ear: Listen, tmp_path: Path
) -> None:
    listening = ear(MicrophoneSource(MICROPHONE))
    await listening.until(lambda: "digital silence" in listening.source.health.why, "the complaint")
    assert listening.source.health.state == "capturing"
    player = pulse_server.play(write_wav(tmp_path / "noise.wav", noise(2.0)))
    await listening.until(lambda: listening.source.health.why == "", "the end of the complaint")
    assert await asyncio.to_thread(player.wait, LIMIT_S) == 0


@pytest.mark.slow
async def test_mute_closes_the_device_and_unmute_opens_it(pulse_server: PulseServer, ear: Listen) -> None:
    listening = ear(MicrophoneSource(MICROPHONE))
    await listening.sound()
    assert pulse_server.recordings() == 1
    listening.source.mute()
    await listening.until(lambda: pulse_server.recordings() == 0, "the device is closed")
    assert listening.source.health.state == "muted"
    listening.source.unmute()
    await listening.sound()
    assert pulse_server.recordings() == 1
    assert listening.source.health.gaps == 0


@pytest.mark.slow
async def test_two_microphones_do_not_disturb_each_other(pulse_server: PulseServer, ear: Listen) -> None:
    first, second = ear(MicrophoneSource(MICROPHONE)), ear(MicrophoneSource("default"))
    await first.sound()
    await second.sound()
    first.source.mute()
    first.source.unmute()
    await first.sound()
    await second.sound()
    assert not any(chunk.lost for chunk in second.chunks)


@pytest.mark.slow
def test_a_recorder_ends_with_its_listener(pulse_server: PulseServer) -> None:
    code = f"""
import asyncio
import logging
from edge_asr.audio.microphone import MicrophoneSource
async def listen():
    async for _ in MicrophoneSource({MICROPHONE!r}).chunks():
        print("sound", flush=True)
asyncio.run(listen())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == b"sound\n"
        assert pulse_server.recordings() == 1
        listener.send_signal(signal.SIGKILL)
    wait_for(lambda: pulse_server.recordings() == 0, "the recorder ends")
