"""The supervised microphone on made-up devices: a real recording process whose sounddevice is a stand-in."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from edge_asr.audio import microphone, portaudio
from edge_asr.audio.messages import MessageReader, Report
from edge_asr.audio.microphone import MicrophoneSource
from edge_asr.errors import AudioError
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, SAMPLE_RATE, Chunk

LIMIT_S = 60.0

USB = {"name": "USB Mic: Audio (hw:1,0)", "max_input_channels": 1, "default_samplerate": 44_100.0}
STEREO = {"name": "Line In (hw:0,0)", "max_input_channels": 2, "default_samplerate": 48_000.0}

Plug = Callable[..., None]


@pytest.fixture(autouse=True)
def one_device(plug: Plug) -> None:
    plug(USB)


def recorders() -> int:
    """Return how many recording processes of ours there are."""
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    return sum(b"portaudio" in Path("/proc", child, "cmdline").read_bytes() for child in children)


@pytest.fixture(autouse=True)
def no_recorder_left() -> Iterator[None]:
    yield
    assert recorders() == 0


def _is_child(stat: Path) -> bool:
    try:
        return int(stat.read_text().rpartition(") ")[2].split()[1]) == os.getpid()
    except OSError:  # ended meanwhile
        return False


async def heard(chunks: AsyncIterator[Chunk], until: Callable[[Chunk], bool]) -> list[Chunk]:
    """Return the chunks up to the first of which `until` holds."""
    got: list[Chunk] = []

    async def listen() -> None:
        async for chunk in chunks:
            got.append(chunk)
            if until(chunk):
                break

    await asyncio.wait_for(listen(), LIMIT_S)
    return got


async def happens(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds."""

    async def look() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(look(), LIMIT_S)


def numbers(chunk: Chunk) -> list[int]:
    return [round(value) for value in (chunk.samples * 32768).tolist()]


def is_sound(chunk: Chunk) -> bool:
    return not chunk.lost


def is_lost(chunk: Chunk) -> bool:
    return chunk.lost


async def test_sound_comes_as_chunks_in_order_and_unchanged(plug: Plug) -> None:
    async with aclosing(MicrophoneSource("usb mic").chunks()) as chunks:
        got = await heard(chunks, lambda chunk: chunk.index == 20 * CHUNK_SAMPLES)
    assert [chunk.index for chunk in got] == list(range(0, 21 * CHUNK_SAMPLES, CHUNK_SAMPLES))
    assert [value for chunk in got for value in numbers(chunk)] == list(range(21 * CHUNK_SAMPLES))
    steps = np.diff([chunk.captured_at for chunk in got])
    assert (steps >= 0).all()


@pytest.mark.parametrize("age_s", [0.0, 7e9, -5 * 3600.0, 0.4])
async def test_a_capture_time_is_portaudios_where_that_can_be_true(plug: Plug, age_s: float) -> None:
    plug(USB, adc_age_s=age_s)
    async with aclosing(MicrophoneSource("usb mic").chunks()) as chunks:
        captured_at = (await heard(chunks, is_sound))[-1].captured_at
    assert 0.4 * (age_s == 0.4) <= time.monotonic() - captured_at < LIMIT_S


async def test_a_device_that_refuses_our_rate_is_recorded_at_its_own(plug: Plug) -> None:
    plug({**STEREO, "max_input_channels": 1}, refused_rates=[16_000], value=16_384)
    source = MicrophoneSource("line in")
    async with aclosing(source.chunks()) as chunks:
        got = await heard(chunks, lambda chunk: chunk.index >= 5 * CHUNK_SAMPLES)
        assert (source.health.state, source.health.rate) == ("capturing", 48_000)
    np.testing.assert_allclose(got[-1].samples, 0.5, atol=1e-3)


async def test_a_rate_that_is_asked_for_is_used(plug: Plug) -> None:
    source = MicrophoneSource("usb", rate=32_000)
    async with aclosing(source.chunks()) as chunks:
        await heard(chunks, is_sound)
        assert source.health.rate == 32_000


@pytest.mark.parametrize(("channel", "expected"), [(None, 0), (0, 1000), (1, -1000)])
async def test_channels_are_averaged_or_one_is_chosen(plug: Plug, channel: int | None, expected: int) -> None:
    plug(STEREO, value=1000)
    async with aclosing(MicrophoneSource("line", channel).chunks()) as chunks:
        assert set(numbers((await heard(chunks, is_sound))[-1])) == {expected}


async def test_a_device_that_is_absent_at_first_is_waited_for(plug: Plug, caplog: pytest.LogCaptureFixture) -> None:
    plug(STEREO)
    waited = asyncio.Event()
    source = MicrophoneSource("usb mic", on_change=lambda: waited.set() if source.health.state == "waiting" else None)
    async with aclosing(source.chunks()) as chunks:
        first = asyncio.ensure_future(anext(chunks))
        await asyncio.wait_for(waited.wait(), LIMIT_S)
        why = "microphone usb mic: not found; there is 'Line In'; plug it in, or name one of these"
        assert source.health.why == why
        plug(STEREO, USB)
        assert (await asyncio.wait_for(first, LIMIT_S)).index == 0
        assert (source.health.state, source.health.why, source.health.gaps) == ("capturing", "", 0)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"microphone:usb mic: no sound: {why}"
    ]


async def test_a_device_that_goes_away_is_marked_and_taken_again_under_its_new_number(plug: Plug) -> None:
    plug(USB, end_after=10)
    source = MicrophoneSource("usb mic")
    async with aclosing(source.chunks()) as chunks:
        before = await heard(chunks, is_lost)
        assert (len(before), before[-1].index) == (11, 10 * CHUNK_SAMPLES)
        assert not before[-1].samples.any()
        plug(STEREO, {**USB, "name": "USB Mic: Audio (hw:2,0)"})
        after = (await heard(chunks, is_sound))[-1]
    assert numbers(after) == list(range(CHUNK_SAMPLES))
    gap_s = (after.index - before[-1].index) / SAMPLE_RATE
    assert gap_s == pytest.approx(after.captured_at - before[-1].captured_at, abs=1e-3)
    assert source.health.gaps == 1
    assert source.health.lost_s == pytest.approx(gap_s, abs=1e-6)


async def test_a_stream_that_gives_nothing_any_more_is_opened_again(plug: Plug) -> None:
    plug(USB, hang_after=5)
    states: list[tuple[str, str]] = []
    source = MicrophoneSource("usb", on_change=lambda: states.append((source.health.state, source.health.why)))
    async with aclosing(source.chunks()) as chunks:
        await heard(chunks, is_lost)
        plug(USB)
        await heard(chunks, is_sound)
    assert [state for state, _ in states] == ["capturing", "stalled", "capturing"]
    assert states[1][1].startswith("no sound for 1.")


async def test_a_stream_that_gives_too_little_is_opened_again(plug: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microphone, "PACE_S", 0.5)
    plug(USB, slow=1.5)
    whys: list[str] = []
    source = MicrophoneSource("usb", on_change=lambda: whys.append(source.health.why))
    async with aclosing(source.chunks()) as chunks:
        await heard(chunks, is_lost)
    assert any(why.startswith("only 6") and why.endswith("of its 16000 samples per second") for why in whys)


async def test_an_overrun_of_the_device_is_counted_and_marked(plug: Plug) -> None:
    plug(USB, overflow_at=5, slow=1.2)
    source = MicrophoneSource("usb")
    async with aclosing(source.chunks()) as chunks:
        got = await heard(chunks, is_lost)
        (after,) = await heard(chunks, is_sound)
    assert after.index > got[-1].index
    assert (source.health.overruns, source.health.gaps) == (1, 1)


async def test_what_is_not_taken_in_time_is_dropped_from_its_beginning(plug: Plug) -> None:
    source = MicrophoneSource("usb", backlog_s=10 * CHUNK_S)
    async with aclosing(source.chunks()) as chunks:
        first = await anext(chunks)
        await happens(lambda: source.health.dropped_chunks >= 5)
        rest = await heard(chunks, lambda chunk: chunk.index >= 25 * CHUNK_SAMPLES)
    assert rest[0].lost
    assert rest[0].index == first.index + CHUNK_SAMPLES
    assert rest[1].index >= 6 * CHUNK_SAMPLES
    for chunk in rest[1:]:
        assert numbers(chunk)[0] == chunk.index
    assert source.health.gaps == 0


async def test_others_have_their_turn_while_a_listener_catches_up(plug: Plug) -> None:
    turns, source = 0, MicrophoneSource("usb", backlog_s=20 * CHUNK_S)

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with aclosing(source.chunks()) as chunks:
        await anext(chunks)
        await happens(lambda: source.health.dropped_chunks > 0)
        counter = asyncio.create_task(count_turns())
        turns_at_chunk = [turns for _ in range(15) if (await anext(chunks)).lost is False]
        counter.cancel()
    assert turns_at_chunk == sorted(set(turns_at_chunk)), "one more at each chunk"


async def test_the_recorder_holds_sound_back_while_the_loop_is_held_up(plug: Plug) -> None:
    async with aclosing(MicrophoneSource("usb").chunks()) as chunks:
        await heard(chunks, is_sound)
        threading.Event().wait(1.5)
        got = await heard(chunks, lambda chunk: chunk.index >= 60 * CHUNK_SAMPLES)
    assert [chunk.index for chunk in got] == list(range(CHUNK_SAMPLES, 61 * CHUNK_SAMPLES, CHUNK_SAMPLES))


async def test_mute_ends_the_recording_and_unmute_begins_a_new_one(plug: Plug) -> None:
    states: list[str] = []
    source = MicrophoneSource("usb", on_change=lambda: states.append(source.health.state))
    async with aclosing(source.chunks()) as chunks:
        await heard(chunks, is_sound)
        source.mute()
        assert recorders() == 0
        lost = (await heard(chunks, is_lost))[-1]
        ticked_at = source.health.ticked_at
        await happens(lambda: source.health.ticked_at > ticked_at)  # the watchdog is fed all the same
        source.unmute()
        after = (await heard(chunks, is_sound))[-1]  # where sound had not been taken when it was muted, more is lost
    assert numbers(after) == list(range(CHUNK_SAMPLES))
    assert after.index > lost.index
    assert states == ["capturing", "muted", "waiting", "capturing"]
    assert (source.health.gaps, source.health.lost_s) == (0, 0.0)


async def test_a_source_that_is_muted_from_the_start_opens_nothing(plug: Plug) -> None:
    source = MicrophoneSource("usb")
    source.mute()
    async with aclosing(source.chunks()) as chunks:
        first = asyncio.ensure_future(anext(chunks))
        ticked_at = source.health.ticked_at
        await happens(lambda: source.health.ticked_at > ticked_at)
        assert recorders() == 0
        source.unmute()
        assert (await asyncio.wait_for(first, LIMIT_S)).index == 0


async def test_two_microphones_are_recorded_side_by_side(plug: Plug) -> None:
    plug(USB, STEREO)
    first, second = MicrophoneSource("usb"), MicrophoneSource("line", 0)
    async with aclosing(first.chunks()) as one, aclosing(second.chunks()) as other:
        for chunks in (one, other):
            assert numbers((await heard(chunks, is_sound))[-1]) == list(range(CHUNK_SAMPLES))


def test_a_recorder_that_looks_in_vain_ends_before_what_portaudio_keeps_of_each_look_adds_up(plug: Plug) -> None:
    command = portaudio.command("record", device="none", channel=None, rate=None, looks=2)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as recorder:
        assert recorder.stdout is not None
        told = list(MessageReader().feed(recorder.stdout.read()))
    assert [report.state for report in told if isinstance(report, Report)] == ["waiting", "waiting"]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_recorder_that_dies_or_hangs_is_replaced(plug: Plug, fault: signal.Signals) -> None:
    source = MicrophoneSource("usb")
    async with aclosing(source.chunks()) as chunks:
        await heard(chunks, is_sound)
        assert source._recorder is not None
        source._recorder._child.send_signal(fault)
        await heard(chunks, is_lost)
        await heard(chunks, is_sound)
        assert recorders() == 1


async def test_a_recorder_that_ends_before_it_has_said_a_word_is_told(plug: Plug) -> None:
    whys: list[str] = []
    source = MicrophoneSource("usb", on_change=lambda: whys.append(source.health.why))
    works, source._command = source._command, [sys.executable, "-c", ""]
    async with aclosing(source.chunks()) as chunks:
        first = asyncio.ensure_future(anext(chunks))
        await happens(lambda: microphone.ENDED in whys)
        source._command = works
        await asyncio.wait_for(first, LIMIT_S)


async def test_what_goes_wrong_while_portaudio_is_loaded_is_told_and_tried_again(tmp_path: Path, plug: Plug) -> None:
    module = tmp_path / "fake/sounddevice.py"
    works = module.readlink()
    module.unlink()
    module.write_text("raise RuntimeError('Error initializing PortAudio')")
    told = asyncio.Event()
    source = MicrophoneSource("usb", on_change=told.set)
    async with aclosing(source.chunks()) as chunks:
        first = asyncio.ensure_future(anext(chunks))
        await asyncio.wait_for(told.wait(), LIMIT_S)
        assert source.health.why == "microphone usb: RuntimeError: Error initializing PortAudio"
        module.unlink()
        module.symlink_to(works)
        await asyncio.wait_for(first, LIMIT_S)


def test_a_device_that_is_back_is_heard_within_five_seconds() -> None:
    """Whoever looks has just looked in vain, a recorder has to be started, and the first sound takes its time."""
    start_s, first_sound_s = 1.0, 2.0
    longest_wait_s = max(portaudio.LAST_LOOK_S, microphone.LAST_RETRY_S)
    assert longest_wait_s + start_s + first_sound_s <= 5.0
    assert first_sound_s < microphone.FIRST_SOUND_S


@pytest.mark.slow
async def test_opening_and_closing_two_hundred_times_leaves_nothing_behind(plug: Plug) -> None:
    source = MicrophoneSource("usb")
    open_files: list[int] = []
    async with aclosing(source.chunks()) as chunks:
        for _ in range(200):
            await heard(chunks, is_sound)
            source.mute()
            open_files.append(len(list(Path("/proc/self/fd").iterdir())))
            assert recorders() == 0
            source.unmute()
        await heard(chunks, is_sound)
    assert max(open_files) == open_files[0]
    states = [path.read_text().rpartition(") ")[2][0] for path in Path("/proc").glob("[0-9]*/stat") if _is_child(path)]
    assert "Z" not in states


async def test_close_ends_the_iteration_and_the_recording(plug: Plug) -> None:
    source = MicrophoneSource("usb")
    chunks = source.chunks()
    await heard(chunks, is_sound)
    waiting = asyncio.ensure_future(heard(chunks, lambda _: False))
    await asyncio.sleep(0)
    source.close()
    await waiting
    source.close()
    assert [chunk async for chunk in source.chunks()] == []


async def test_a_loss_is_a_warning_once_then_only_for_debugging(plug: Plug, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    plug(USB, end_after=3)
    async with aclosing(MicrophoneSource("usb").chunks()) as chunks:
        for _ in range(2):
            await heard(chunks, is_lost)
            await heard(chunks, is_sound)
    told = [record.levelname for record in caplog.records if "no sound" in record.message]
    assert told[0] == "WARNING"
    assert set(told[1:]) <= {"DEBUG"}
    assert len(told) > 1


async def test_what_cannot_be_opened_says_so_in_one_line(plug: Plug) -> None:
    plug(USB, refused="Device unavailable")
    whys: list[str] = []
    told = asyncio.Event()

    def take_note() -> None:
        whys.append(source.health.why)
        told.set()

    source = MicrophoneSource("usb", on_change=take_note)
    async with aclosing(source.chunks()) as chunks:
        first = asyncio.ensure_future(anext(chunks))
        await asyncio.wait_for(told.wait(), LIMIT_S)
        plug(USB)
        await asyncio.wait_for(first, LIMIT_S)
    assert whys[0].startswith("microphone usb: it cannot be opened (")
    assert "Device unavailable" in whys[0]
    assert "\n" not in whys[0]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("raise ModuleNotFoundError('sounddevice')", portaudio.NO_SOUNDDEVICE),
        ("raise OSError('PortAudio library not found')", portaudio.NO_PORTAUDIO),
    ],
)
async def test_without_the_libraries_the_remedy_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    (tmp_path / "sounddevice.py").write_text(module)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    source = MicrophoneSource("usb")
    with pytest.raises(AudioError) as caught:
        async for _ in source.chunks():
            pass
    assert str(caught.value).startswith(f"microphone:usb: {message}")
    assert "\n" not in str(caught.value)
    assert source.health.state == "failed"
    with pytest.raises(AudioError, match=message[:20]):
        portaudio.input_devices()


def test_devices_are_listed_by_a_process_of_its_own(plug: Plug) -> None:
    plug(USB, {**STEREO, "max_input_channels": 0}, STEREO)
    usb, line = portaudio.input_devices()
    assert (usb.name, usb.channels, usb.rate, usb.is_default) == ("USB Mic: Audio", 1, 44_100, True)
    assert (line.name, line.index, line.is_default) == ("Line In", 2, False)


def test_an_array_of_microphones_is_averaged_and_a_sound_server_left_to_mix() -> None:
    assert [portaudio.channels_to_open(available, None) for available in (1, 2, 6, 32)] == [1, 2, 6, 1]
    assert portaudio.channels_to_open(6, 3) == 4
    with pytest.raises(AudioError, match="channel 2 of a device with 2; the first is 0"):
        portaudio.channels_to_open(2, 2)
