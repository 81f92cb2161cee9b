"""What a stream of the bench plays: recordings with silence between, and where on the tape each ends, to 10 ms.

A recording is cut at its own acoustic end, so that this is known on the tape, whatever the daemon takes for it.
"""

from __future__ import annotations

import random
import wave
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_asr.audio.decode import read
from edge_asr.speech.energy import end_of_sound
from edge_asr.types import SAMPLE_RATE, Samples

GAP_S = 1.5
"""Silence after each recording: half a second more than the longest pause that a segment waits for."""
NOISE = 1e-4
"""Deviation of what stands for silence, -80 dBFS: recordings never hold true zeros."""


@dataclass(frozen=True, slots=True)
class Played:
    """A recording on a tape."""

    path: str
    start: int
    """Its first sample."""
    end: int
    """The sample after its acoustic end."""


@dataclass(frozen=True, slots=True)
class Tape:
    """A WAV file and what is on it, in order."""

    path: Path
    played: tuple[Played, ...]
    length: int
    """Samples."""

    def at(self, position: float) -> Played:
        """Return the recording that a sample belongs to: the silence around it is its own, up to the middle."""
        middles = [(before.end + after.start) / 2 for before, after in zip(self.played, self.played[1:], strict=False)]
        return self.played[bisect_right(middles, position)]

    def sound_ended(self, start: int, length: int) -> int:
        """Return where the daemon finds the acoustic end of a segment of so many samples from `start` on."""
        with wave.open(str(self.path), "rb") as reader:
            reader.setpos(start)
            pcm = np.frombuffer(reader.readframes(length), "<i2")
        samples: Samples = pcm.astype(np.float32)
        samples /= 32768
        return start + end_of_sound(samples)


def until_its_end(path: str) -> Samples:
    """Return a recording, `[n]`, up to its acoustic end. Raises AudioError."""
    samples = read(path)
    return samples[: end_of_sound(samples)]


def record(path: Path, sounds: Mapping[str, Samples], stream: int, streams: int) -> Tape:
    """Write the tape of a stream: each has its own order and begins after another silence, so none is in step.

    Stream 0 keeps the order given.
    """
    order = list(sounds)
    noise = np.random.default_rng(stream)
    if stream:
        random.Random(stream).shuffle(order)
    played: list[Played] = []
    with wave.open(str(path), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes(_silence(GAP_S * (1 + stream / streams), noise))
        for name in order:
            start = writer.tell()
            writer.writeframes(_pcm(sounds[name]))
            played.append(Played(name, start, writer.tell()))
            writer.writeframes(_silence(GAP_S, noise))
        return Tape(path, tuple(played), writer.tell())


def record_all(folder: Path, paths: Sequence[str], streams: int) -> dict[str, Tape]:
    """Write a tape for each stream, by its name. Raises AudioError."""
    sounds = {path: until_its_end(path) for path in paths}
    return {f"stream-{k}": record(folder / f"stream-{k}.wav", sounds, k, streams) for k in range(streams)}


def _silence(seconds: float, noise: np.random.Generator) -> bytes:
    return _pcm((NOISE * noise.standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32))


def _pcm(samples: Samples) -> bytes:
    return np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2").tobytes()
