"""What a watched source says of itself: its health, whether it is missed, and its metrics."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from edge_asr.audio.microphone import MicrophoneSource
from edge_asr.config import FileSourceConfig, MicrophoneSourceConfig, StdinSourceConfig
from edge_asr.errors import AudioError
from edge_asr.sources import WatchedSource
from edge_asr.types import Chunk

LIMIT_S = 60.0
USB = {"name": "USB Mic: Audio (hw:1,0)", "max_input_channels": 1, "default_samplerate": 44_100.0}
ABSENT = "microphone usb: there is no input device at all; plug one in"

Plug = Callable[..., None]


def metric(name: str, source: str) -> float | None:
    return REGISTRY.get_sample_value(f"edge_asr_microphone_{name}", {"source": source})


async def next_chunk(chunks: AsyncIterator[Chunk], lost: bool) -> Chunk:
    async def look() -> Chunk:
        async for chunk in chunks:
            if chunk.lost == lost:
                return chunk
        raise AssertionError("it ended")

    return await asyncio.wait_for(look(), LIMIT_S)


def test_a_file_is_listened_to_until_it_ends_or_fails() -> None:
    config = FileSourceConfig(path=Path("a.wav"), realtime=False)
    source = WatchedSource(config, lambda: None)
    assert (source.live, source.trouble) == (False, "")
    assert source.describe() == {"name": "file:a.wav", "health": "listening", "why": ""}
    source.end()
    assert (source.describe()["health"], source.trouble) == ("ended", "")
    source.end(AudioError("a.wav: broken"))
    assert source.describe() == {"name": "file:a.wav", "health": "failed", "why": "a.wav: broken"}
    assert source.trouble == "file:a.wav failed: a.wav: broken"
    assert WatchedSource(StdinSourceConfig(), lambda: None).live


async def test_a_microphone_tells_of_every_change_and_is_missed_while_it_is_away(plug: Plug) -> None:
    plug(USB, end_after=20)
    told: list[tuple[str, str, str]] = []
    absent = asyncio.Event()

    def tell() -> None:
        described = source.describe()
        told.append((described["health"], described["why"], source.trouble))
        if described["why"] == ABSENT:
            absent.set()

    source = WatchedSource(MicrophoneSourceConfig(device="usb", name="hall"), tell)
    assert source.live
    assert source.describe() == {"name": "hall", "health": "waiting", "why": "it is being opened"}
    assert source.trouble == "", "it has not been looked for yet"
    assert metric("up", "hall") == metric("gaps_total", "hall") == 0
    assert isinstance(source.audio, MicrophoneSource)
    async with aclosing(source.audio.chunks()) as chunks:
        await next_chunk(chunks, lost=False)
        assert metric("up", "hall") == 1
        assert math.isnan(metric("drift_ppm", "hall") or 0.0)
        plug()
        await next_chunk(chunks, lost=True)
        await asyncio.wait_for(absent.wait(), LIMIT_S)
        assert metric("up", "hall") == 0
        plug(USB)
        await next_chunk(chunks, lost=False)
    away = "microphone usb: the device went away"
    assert told == [
        ("listening", "", ""),
        ("waiting", away, f"hall waiting: {away}"),
        ("waiting", ABSENT, f"hall waiting: {ABSENT}"),
        ("listening", "", ""),
    ]
    source.count()
    source.count()
    assert (metric("up", "hall"), metric("gaps_total", "hall"), metric("dropped_chunks_total", "hall")) == (1, 1, 0)
    assert 0 < (metric("lost_seconds_total", "hall") or 0.0) < LIMIT_S


async def test_a_microphone_that_is_muted_is_not_missed() -> None:
    source = WatchedSource(MicrophoneSourceConfig(device="usb", name="muted one"), lambda: None)
    assert isinstance(source.audio, MicrophoneSource)
    source.audio.mute()
    assert (source.describe()["health"], source.trouble) == ("muted", "")
    source.audio.close()


async def test_a_microphone_whose_library_is_missing_has_failed(plug: Plug, tmp_path: Path) -> None:
    (tmp_path / "fake/sounddevice.py").unlink()
    (tmp_path / "fake/sounddevice.py").write_text("raise ModuleNotFoundError('sounddevice')")
    source = WatchedSource(MicrophoneSourceConfig(name="no library"), lambda: None)
    chunks = source.audio.chunks()
    with pytest.raises(AudioError, match="no library: sounddevice is not installed; pip install"):
        await chunks.__anext__()
    assert source.describe()["health"] == "failed"
    assert source.trouble.startswith("no library failed: sounddevice is not installed")
    assert metric("up", "no library") == 0
