"""Gives the sound of one stream after another its place in time: chunks, and how much is missing between them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_asr.audio.drift import SampleClock
from edge_asr.audio.levels import Levels
from edge_asr.audio.messages import Sound
from edge_asr.audio.resample import ToMono16k
from edge_asr.audio.source import Chunker
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, SAMPLE_RATE, Chunk


class Timeline:
    """The chunks of a device that comes and goes. `index` counts what is missing too, so it keeps to the time."""

    def __init__(self, channel: int | None) -> None:
        self._channel = channel
        self._next_index = 0
        self._next_at: float | None = None
        self._run: Chunker | None = None
        self._missing_from: int | None = None
        self._clock = SampleClock(SAMPLE_RATE)
        self.levels = Levels(SAMPLE_RATE)
        self.gaps = 0
        """How often sound was missing."""
        self.lost_s = 0.0
        """How much of it, in seconds."""
        self.overruns = 0
        """How often the device or its ring lost sound because nobody took it in time."""

    @property
    def drift_ppm(self) -> float | None:
        """How much slow the device is, in millionths; None until it has been followed for minutes."""
        return self._clock.ppm

    def begin(self, rate: int, channels: int) -> None:
        """Say that a stream has been opened: what is pushed from now on is its."""
        self._rate, self._channels, self._frame = rate, channels, 0
        self._clock = SampleClock(rate, self._clock.ppm)
        self.levels = Levels(rate)
        self._run = None

    def push(self, sound: Sound) -> Iterator[Chunk]:
        """Yield the chunks that the next block completes, and before them one that is `lost` if some is missing."""
        frames = np.frombuffer(sound.data, np.int16).reshape(-1, self._channels)
        if missing := self._missing_frames(sound, len(frames)):
            self.overruns += 1
            self._frame += missing
            yield from self.interrupt()
        self._clock.observe(self._frame, sound.captured_at)
        self.levels.add(frames)
        if self._run is None:
            self._run = self._begin_run()
        self._frame += len(frames)
        for chunk in self._run.push(self._convert.push(frames)):
            self._next_index = chunk.index + CHUNK_SAMPLES
            self._next_at = chunk.captured_at + CHUNK_S
            yield chunk

    def interrupt(self, counted: bool = True) -> Iterator[Chunk]:
        """Yield the chunk that says so, unless there was none before it: sound is missing from here on.

        `counted`: the gap is a loss; a mute is not.
        """
        self._run = None
        if self._next_at is None or self._missing_from is not None:
            return
        self._missing_from = self._next_index if counted else -1
        yield lost_chunk(self._next_index, self._next_at)
        self._next_index += CHUNK_SAMPLES
        self._next_at += CHUNK_S

    def _missing_frames(self, sound: Sound, block: int) -> int:
        """Return how many frames are missing before a block: those dropped, or as many as the time says."""
        missing = sound.dropped * block
        if sound.overflowed and self._frame:
            late = sound.captured_at - self._clock.time_of(self._frame + missing)
            missing += max(0, round(late * self._rate))
        return missing

    def _begin_run(self) -> Chunker:
        """Begin to cut chunks at the present frame, as far behind the last chunk as the clock says."""
        self._convert = ToMono16k(self._rate, self._channel)
        frame, at = self._frame, self._clock.time_of(self._frame)
        if self._next_at is not None:
            self._next_index += max(0, round((at - self._next_at) * SAMPLE_RATE))
        if self._missing_from is not None:
            if self._missing_from >= 0:
                self.gaps += 1
                self.lost_s += (self._next_index - self._missing_from) / SAMPLE_RATE
            self._missing_from = None
        first = self._next_index

        def captured_at(index: int) -> float:
            found = self._clock.time_of(frame + (index - first) * self._rate / SAMPLE_RATE)
            return found if self._next_at is None else max(found, self._next_at - CHUNK_S)

        return Chunker(captured_at, first)


def lost_chunk(index: int, captured_at: float) -> Chunk:
    """Return the chunk that says: from here on sound is missing."""
    return Chunk(np.zeros(CHUNK_SAMPLES, np.float32), index, captured_at, lost=True)
