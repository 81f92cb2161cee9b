"""Training data: sentences spoken, bent and put into rooms, stored as float16 filterbanks in shards."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soxr
from features import filterbank
from phrases import TOKENS, Sentence, sentence
from synthesis import RATE, Samples, Voices

SHARD = 1000
"""Utterances in a shard."""


@dataclass(frozen=True)
class Shard:
    """Utterances end to end: frames `[sum, 80]` float16 with `bounds`, tokens with `token_bounds`."""

    frames: npt.NDArray[np.float16]
    bounds: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int16]
    token_bounds: npt.NDArray[np.int64]


def write_shard(path: Path, index: int, voices: Voices, narrow: bool) -> None:
    """Synthesise shard `index` (seeded by it) of sentences."""
    rng = random.Random(f"shard {index}")
    noise = np.random.default_rng(index)
    ids = {token: number for number, token in enumerate(TOKENS)}
    frames, tokens = [], []
    for _ in range(SHARD // 2):
        spoken = sentence(rng)
        for samples in _utterances(spoken, rng, noise, voices, narrow):
            frames.append(filterbank(samples).astype(np.float16))
            tokens.append(np.array([ids[c] for c in spoken.text], np.int16))
    write_arrays(path, frames, tokens)


def write_arrays(path: Path, frames: list[npt.NDArray[np.float16]], tokens: list[npt.NDArray[np.int16]]) -> None:
    """Write a shard whole or not at all."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        frames=np.concatenate(frames),
        bounds=np.cumsum([0, *map(len, frames)]),
        tokens=np.concatenate(tokens),
        token_bounds=np.cumsum([0, *map(len, tokens)]),
    )
    temporary.rename(path)


def read_shard(path: Path) -> Shard:
    """Load a shard into memory."""
    with np.load(path) as arrays:
        return Shard(arrays["frames"], arrays["bounds"], arrays["tokens"], arrays["token_bounds"])


def _utterances(
    spoken: Sentence, rng: random.Random, noise: np.random.Generator, voices: Voices, narrow: bool
) -> list[Samples]:
    """Two recordings of one sentence: another voice, another tract and another room each."""
    recordings = []
    for _ in range(2):
        voice = rng.choice(voices.published if narrow or rng.random() < 0.45 else voices.random)
        tract = 1.0 if narrow else float(np.exp(rng.uniform(np.log(0.78), np.log(1.3))))
        tempo = rng.uniform(0.75, 1.5)
        reading = with_pauses(spoken.reading(rng), rng)
        speed = int(np.clip(175 * tempo / tract, 90, 340))
        dry = voices.speak(reading, voice, speed, rng.randint(20, 80))
        recordings.append(room(dry, tract, rng, noise, narrow))
    return recordings


def with_pauses(reading: list[str], rng: random.Random) -> list[str]:
    """Now and then a pause between words, as people group digits or think."""
    if rng.random() < 0.6:
        return reading
    chance = rng.choice((0.1, 0.3))
    paused: list[str] = []
    for word in reading:
        if paused and rng.random() < chance:
            paused.append(f"_{rng.randint(20, 250)}")
        paused.append(word)
    return paused


def room(dry: Samples, tract: float, rng: random.Random, noise: np.random.Generator, narrow: bool) -> Samples:
    """Turn dry 22,050 Hz speech into a 16 kHz recording: tract length and pitch, tempo drift, colour, room, level."""
    samples = np.asarray(soxr.resample(dry, RATE * tract, 16_000, quality="MQ"), np.float32)
    samples = np.trim_zeros(samples)
    if not narrow and rng.random() < 0.6 and len(samples) > 800:
        samples = _drift(samples, noise)
    lead, tail = (int(16_000 * rng.uniform(0.02, 0.6)) for _ in range(2))
    samples = np.pad(samples, (lead, tail))
    size = 1 << (len(samples) + 8000).bit_length()
    spectrum = np.fft.rfft(samples, size)
    spectrum *= _colour(len(spectrum), noise, 3.0 if narrow else rng.uniform(2, 10), rng)
    if rng.random() < (0.3 if narrow else 0.6):
        spectrum *= np.fft.rfft(_impulse_response(rng, noise), size)
    samples = np.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32)
    loudness = np.sqrt(np.mean(samples**2)) + 1e-9
    samples *= 10 ** (rng.uniform(-42, -14) / 20) / loudness
    if rng.random() < 0.9:
        samples += noise.standard_normal(len(samples), np.float32) * 10 ** (rng.uniform(-95, -60) / 20)
    return np.round(np.clip(samples, -1, 1) * 32767).astype(np.float32) / 32768


def _drift(samples: Samples, noise: np.random.Generator) -> Samples:
    """Bend time slowly, and pitch with it, by up to about 15 %."""
    knots = max(3, len(samples) // 3200)
    rate = np.exp(0.09 * noise.standard_normal(knots))
    steps = np.interp(np.linspace(0, knots - 1, len(samples)), np.arange(knots), rate)
    position = np.cumsum(steps)
    position = position[position < len(samples) - 1]
    return np.interp(position, np.arange(len(samples)), samples).astype(np.float32)


def _colour(bins: int, noise: np.random.Generator, decibels: float, rng: random.Random) -> npt.NDArray[np.float64]:
    """A random smooth equaliser; one in six is the low pass of a poor microphone."""
    knots = noise.standard_normal(8) * decibels / 2
    curve = np.interp(np.sqrt(np.linspace(0, 1, bins)) * 7, np.arange(8), knots)
    if rng.random() < 0.16:
        cut = rng.uniform(3000, 7000) / 8000
        curve -= np.clip((np.linspace(0, 1, bins) - cut) * 200, 0, 40)
    return 10 ** (curve / 20)


def _impulse_response(rng: random.Random, noise: np.random.Generator) -> npt.NDArray[np.float64]:
    """Direct sound, then exponentially decaying noise (RT60 of 0.1 to 0.7 s)."""
    rt60 = rng.uniform(0.1, 0.7)
    length = int(16_000 * min(rt60, 0.45))
    tail = noise.standard_normal(length) * np.exp(-6.9 * np.arange(length) / (16_000 * rt60))
    tail *= 10 ** (-rng.uniform(0, 14) / 20) / np.sqrt(np.sum(tail**2))
    tail[: int(16 * rng.uniform(1, 6))] = 0
    tail[0] = 1
    return tail


NARROW_SHARDS = 8
"""The first shards hold only published voices in easy rooms, so that learning starts."""


def make_shard(folder: Path, index: int) -> Path:
    """Return shard `index` under `folder`, synthesised if it is not there; each has 100 random voices of its own."""
    path = folder / "shards" / f"{index:04d}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        voices = Voices(folder / "voices" / f"{index:04d}", seed=index)
        write_shard(path, index, voices, narrow=index < NARROW_SHARDS)
        shutil.rmtree(folder / "voices" / f"{index:04d}")
    return path
