"""Sounds in which nobody speaks to the appliance: music, babble, foreign speech, Mandarin; and commands. All seeded."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import tempfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import soxr

from bench.false_music import piece, room
from bench.false_sentences import FOREIGN, MANDARIN
from edge_asr.audio.decode import read
from edge_asr.types import SAMPLE_RATE, Samples

MINUTE = 60 * SAMPLE_RATE
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4", "Annie", "steph", "Andy", "klatt", "klatt2")
FIXED_SHARE = 0.2
"""Of the commands that are fixed phrases, such as 取消."""
HISS = 10 ** (-70 / 20)
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """Something to be listened to."""

    samples: Samples
    """16 kHz mono."""
    expected: str | None = None
    """What is said, where it is a command on its own; None: part of a stream, in which nothing is to be heard."""


def music(seed: int, minutes: int) -> Iterator[Sound]:
    """Yield minutes of music: pieces of 10 to 40 s in several timbres, with pauses."""
    rng = np.random.default_rng([seed, 1])
    rest = np.zeros(0, np.float32)
    for _ in range(minutes):
        while len(rest) < MINUTE:
            played = _at_level(piece(rng), rng.uniform(-38, -14))
            rest = np.concatenate([rest, played, np.zeros(_samples(rng.uniform(0.5, 4)), np.float32)])
        yield Sound(_hissing(rest[:MINUTE], rng))
        rest = rest[MINUTE:]


def babble(seed: int, minutes: int, recordings: Path | None) -> Iterator[Sound]:
    """Yield minutes of three to eight voices at once, at levels of their own; people's among them where there are."""
    rng = np.random.default_rng([seed, 2])
    spoken = [_foreign(rng) for _ in range(min(400, 40 + 40 * minutes))]
    people = _recordings(recordings)
    for _ in range(minutes):
        mixed = np.zeros(MINUTE, np.float32)
        for number in range(int(rng.integers(3, 9))):
            chosen = people if people and number == 0 and rng.random() < 0.5 else spoken
            voice = _in_turn(rng, chosen, (0.1, 0.8))
            mixed += voice * np.float32(10 ** (-rng.uniform(0, 8) / 20))
        # A crowd falls silent now and then, else it would be one segment after another of full length.
        for start in range(0, MINUTE, 12 * SAMPLE_RATE):
            at = start + _samples(rng.uniform(4, 11))
            mixed[at : at + _samples(rng.uniform(0.5, 2))] = 0
        yield Sound(_hissing(_at_level(room(mixed, rng), rng.uniform(-38, -16)), rng))


def foreign(seed: int, minutes: int, recordings: Path | None) -> Iterator[Sound]:
    """Yield minutes of speech that is no Mandarin: one voice at a time, with pauses; English ones by people too."""
    rng = np.random.default_rng([seed, 3])
    people = _recordings(recordings, "english_singles")
    rest = np.zeros(0, np.float32)
    for _ in range(minutes):
        while len(rest) < MINUTE:
            whole = people[int(rng.integers(len(people)))] if people and rng.random() < 0.05 else _foreign(rng)
            said = _at_level(room(whole, rng) if rng.random() < 0.5 else whole, rng.uniform(-38, -14))
            rest = np.concatenate([rest, said, np.zeros(_samples(rng.uniform(0.4, 2.5)), np.float32)])
        yield Sound(_hissing(rest[:MINUTE], rng))
        rest = rest[MINUTE:]


def mandarin(seed: int, minutes: int, recordings: Path | None) -> Iterator[Sound]:
    """Yield minutes of Mandarin that is not meant for the appliance: commands, other sentences, people."""
    rng = np.random.default_rng([seed, 4])
    people = _recordings(recordings, "aishell_sample_zh", "mandarin_singles", "untranscribed")
    rest = np.zeros(0, np.float32)
    with tempfile.TemporaryDirectory(prefix="edge_asr-voices-") as folder:
        command = _Commands(Path(folder), seed + 1, VARIANTS)
        for _ in range(minutes):
            while len(rest) < MINUTE:
                share = rng.random()
                if people and share < 0.15:
                    whole = people[int(rng.integers(len(people)))]
                elif share < 0.6:
                    whole = command()[1]
                else:
                    whole = _speak("cmn", str(rng.choice(MANDARIN)), rng)
                said = _at_level(whole, rng.uniform(-35, -14))
                rest = np.concatenate([rest, said, np.zeros(_samples(rng.uniform(0.5, 2.5)), np.float32)])
            yield Sound(_hissing(rest[:MINUTE], rng))
            rest = rest[MINUTE:]


def commands(seed: int, count: int, recordings: Path | None) -> Iterator[Sound]:
    """Yield commands by voices and with sentences that no training has heard, half of them in noise; people's too."""
    rng = np.random.default_rng([seed, 5])
    evaluate = _recipe("evaluate")
    with tempfile.TemporaryDirectory(prefix="edge_asr-voices-") as folder:
        command = _Commands(Path(folder), seed, _recipe("synthesis").EVALUATION_VOICES)
        for number in range(count):
            text, dry = command()
            samples = np.pad(dry * 0.3, _samples(0.8)).astype(np.float32)
            if number % 2:
                samples += evaluate.pink(len(samples), rng) * np.std(dry) * np.float32(0.3 * 10 ** (-10 / 20))
            yield Sound(_hissing(samples, rng), text)
    if recordings is not None and (recordings / "aishell_sample_zh").is_dir():
        for utterance in evaluate.human(recordings / "aishell_sample_zh"):
            yield Sound(np.pad(utterance.samples, _samples(0.8)), utterance.text)


class _Commands:
    """Draws sentences that the bundled model can write and speaks them; of those trained on only the fixed phrases."""

    def __init__(self, folder: Path, seed: int, voices: Sequence[str]) -> None:
        self._rng = Random(seed)
        self._voices = voices
        self._phrases = _recipe("phrases")
        self._kinds = [kind for kind in self._phrases.KINDS if kind not in ("random", "fixed")]
        self._speaker = _recipe("synthesis").Voices(folder, random_voices=0)

    def __call__(self) -> tuple[str, Samples]:
        """Return text and sound."""
        rng = self._rng
        # Fixed phrases have all been trained on, but they are the short ones.
        fixed = rng.random() < FIXED_SHARE
        spoken = self._phrases.sentence(rng, ["fixed"] if fixed else self._kinds, held_out=not fixed)
        dry = self._speaker.speak(
            spoken.reading(rng), rng.choice(self._voices), rng.randint(140, 210), rng.randint(35, 65)
        )
        return spoken.text, _resampled(dry, _recipe("synthesis").RATE)


def _recipe(module: str) -> ModuleType:
    """Import a module of the training recipe: its folder is no package, its modules import each other by name."""
    import importlib

    folder = str(ROOT / "engines" / "recipe")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)


def _foreign(rng: np.random.Generator) -> Samples:
    language = str(rng.choice(list(FOREIGN)))
    return _speak(language, str(rng.choice(FOREIGN[language])), rng)


def _speak(language: str, text: str, rng: np.random.Generator) -> Samples:
    """Return a sentence by a voice of espeak-ng."""
    speed, pitch = (str(rng.integers(*bounds)) for bounds in ((130, 200), (30, 70)))
    voice = f"{language}+{rng.choice(VARIANTS)}"
    command = ["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "--stdout", text]
    done = subprocess.run(command, capture_output=True, check=True)
    with wave.open(io.BytesIO(done.stdout)) as reader:  # the header's length means nothing in a pipe
        pcm, rate = reader.readframes(len(done.stdout) // 2), reader.getframerate()
    samples: Samples = np.frombuffer(pcm[: len(pcm) // 2 * 2], np.int16).astype(np.float32) / np.float32(32768)
    return _resampled(samples, rate)


def _resampled(samples: Samples, rate: int) -> Samples:
    return np.asarray(soxr.resample(samples, rate, SAMPLE_RATE), np.float32)


@functools.cache
def _read(path: Path) -> Samples:
    return read(path)


def _recordings(folder: Path | None, *sets: str) -> list[Samples]:
    """Return the recordings of people in the sets, in all of them where none is named; none without a folder."""
    if folder is None:
        return []
    folders = [folder / name for name in sets] or [folder]
    return [_read(path) for below in folders for path in sorted(below.rglob("*.wav"))]


def _in_turn(rng: np.random.Generator, spoken: Sequence[Samples], pauses: tuple[float, float]) -> Samples:
    """Return a minute of one sentence after another, at one level."""
    parts: list[Samples] = []
    while sum(map(len, parts)) < MINUTE:
        parts += [
            _at_level(spoken[int(rng.integers(len(spoken)))], -20),
            np.zeros(_samples(rng.uniform(*pauses)), np.float32),
        ]
    return np.concatenate(parts)[:MINUTE]


def _at_level(samples: Samples, decibels: float) -> Samples:
    """Return the sound with a level (RMS, dB below full scale), clipped where it has peaks above."""
    level = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) or 1.0
    scaled: Samples = np.clip(samples * np.float32(10 ** (decibels / 20) / level), -1, 1)
    return scaled


def _hissing(samples: Samples, rng: np.random.Generator) -> Samples:
    return (samples + HISS * rng.standard_normal(len(samples))).astype(np.float32)


def _samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)
