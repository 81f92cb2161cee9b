"""Sentences with pauses inside, whose sound ends where we know: synthesised ones, and recordings that are cut open."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from edge_asr.audio.decode import read
from edge_asr.types import SAMPLE_RATE, Samples

RECIPE = Path(__file__).resolve().parent.parent / "engines" / "recipe"
COMMANDS = ("switch", "air conditioning", "level", "timer", "numbered", "fixed")
"""Kinds of sentences that say by themselves when they are complete; `number` and `digits` do not."""
PAUSE_MS = (200, 450)
AFTER_S = 2.0
"""Noise after the sentence."""
SPEECH_RMS = 0.05
FRAME = 80
"""5 ms."""
BELOW_PEAK_DB = 35.0
"""Where sound ends that nothing else is heard with, as in `end_of_sound`: with most voices digital silence follows."""

RECORDED_BELOW_PEAK_DB = 18.0
"""Where recordings are cut off: above noise and breath, so that what is left ends with speech."""


@dataclass(frozen=True, slots=True)
class Pause:
    """A silence that was put into a sentence, in samples of its tape."""

    start: int
    end: int
    said: str
    """The words before it; empty where they are not known."""


@dataclass(frozen=True, slots=True)
class Tape:
    """A sentence in a room: noise, the sentence with its pauses, 2 s of noise."""

    text: str
    kind: str
    voice: str
    samples: Samples
    """`[n]`, 16 kHz."""
    end: int
    """The sample after the last one of the sentence."""
    pauses: tuple[Pause, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """What is spoken without a pause."""

    said: str
    samples: Samples


def recipe(module: str) -> Any:
    """Import a module of the bundled model's recipe."""
    if str(RECIPE) not in sys.path:
        sys.path.insert(0, str(RECIPE))
    return importlib.import_module(module)


def synthetic(
    folder: Path, count: int, kinds: Sequence[str], held_out: bool, noise_db: float = 30.0, seed: int = 0
) -> Iterator[Tape]:
    """Sentences by espeak-ng with 1 or 2 pauses between words; held-out ones by voices that nothing was chosen on.

    `folder` keeps espeak-ng's data; `noise_db`: how far pink noise lies below the speech.
    """
    phrases, synthesis = recipe("phrases"), recipe("synthesis")
    voices = synthesis.Voices(folder, random_voices=0)
    names = synthesis.EVALUATION_VOICES if held_out else voices.published
    rng, seen = random.Random(seed), 0
    while seen < count:
        kind = rng.choices(kinds, [phrases.KINDS[kind][0] for kind in kinds])[0]
        spoken = phrases.sentence(rng, [kind], held_out and kind != "fixed")
        voice = names[seen % len(names)] if held_out else rng.choice(names)
        speed, pitch = rng.randint(140, 210), rng.randint(35, 65)
        parts = _spoken(voices, spoken.words, spoken.reading(rng), voice, speed, pitch, rng)
        if parts is None:
            continue
        seen += 1
        yield tape(parts, spoken.text, kind, voice, rng, noise_db)


def _spoken(
    voices: Any, words: Sequence[str], reading: Sequence[str], voice: str, speed: int, pitch: int, rng: random.Random
) -> list[Part] | None:
    """Speak words with 1.5 s of silence at one or two places; return what lies between, None where there is an echo."""
    places = sorted(rng.sample(range(1, len(words)), min(len(words) - 1, rng.choice((1, 2)))))
    paused = [word for n, word in enumerate(reading) for word in ((["_1500"] if n in places else []) + [word])]
    dry = voices.speak(paused, voice, speed, pitch)
    sound = np.asarray(soxr.resample(dry, recipe("synthesis").RATE, SAMPLE_RATE), np.float32)
    pieces = _pieces(sound, SAMPLE_RATE // 2)
    if len(pieces) != len(places) + 1:
        return None
    said = ["".join(words[a:b]) for a, b in zip([0, *places], [*places, len(words)], strict=True)]
    return [Part(text, piece) for text, piece in zip(said, pieces, strict=True)]


def _pieces(sound: Samples, silence: int, below_peak_db: float = BELOW_PEAK_DB) -> list[Samples]:
    """Cut out what lies between silences of at least so many samples."""
    frames = sound[: len(sound) // FRAME * FRAME].reshape(-1, FRAME)
    decibels = 10 * np.log10(np.square(frames).mean(1) + 1e-12)
    loud = np.flatnonzero(decibels > decibels.max() - below_peak_db)
    gaps = np.flatnonzero(np.diff(loud) * FRAME > silence)
    starts, ends = [loud[0], *loud[gaps + 1]], [*loud[gaps], loud[-1]]
    return [np.asarray(sound[a * FRAME : (b + 1) * FRAME], np.float32) for a, b in zip(starts, ends, strict=True)]


def recorded(files: dict[Path, str], noise_db: float = 40.0, seed: int = 0) -> Iterator[Tape]:
    """Recordings with 1 or 2 pauses where they are quietest, 0.3 s from either end: within words as well."""
    rng = random.Random(seed)
    for path, text in files.items():
        heard = read(path)
        heard = np.concatenate(_pieces(heard, len(heard), RECORDED_BELOW_PEAK_DB))
        yield tape(_cut_open(heard, rng), text, "recording", path.stem, rng, noise_db)


def _cut_open(sound: Samples, rng: random.Random) -> list[Part]:
    apart = int(0.3 * SAMPLE_RATE)
    margin = min(apart, len(sound) // 3)
    power = np.convolve(np.square(sound), np.ones(2 * FRAME) / (2 * FRAME), "same")
    power[:margin] = power[len(sound) - margin :] = np.inf
    places: list[int] = []
    for _ in range(rng.choice((1, 2)) if len(sound) > 3 * margin + apart else 1):
        place = int(power.argmin())
        places.append(place)
        power[max(0, place - apart) : place + apart] = np.inf
    bounds = [0, *sorted(places), len(sound)]
    return [Part("", _faded(sound[a:b])) for a, b in itertools.pairwise(bounds)]


def _faded(sound: Samples) -> Samples:
    """Let both edges rise and fall in 5 ms: a click is no part of a pause."""
    edge = np.linspace(0, 1, FRAME, dtype=np.float32)
    faded: Samples = sound.copy()
    faded[:FRAME] *= edge
    faded[-FRAME:] *= edge[::-1]
    return faded


def tape(parts: Sequence[Part], text: str, kind: str, voice: str, rng: random.Random, noise_db: float) -> Tape:
    """Put parts on a tape with pauses between them and noise everywhere. The chunks' phase is random."""
    spoken = np.concatenate([part.samples for part in parts])
    gain = SPEECH_RMS / float(np.sqrt(np.square(spoken).mean()))
    lead = SAMPLE_RATE + rng.randrange(SAMPLE_RATE // 2)
    position, pieces, pauses = lead, [np.zeros(lead, np.float32)], []
    for number, part in enumerate(parts):
        if number:
            length = int(rng.uniform(*PAUSE_MS) * SAMPLE_RATE / 1000)
            before = "" if not part.said else "".join(earlier.said for earlier in parts[:number])
            pauses.append(Pause(position, position + length, before))
            pieces.append(np.zeros(length, np.float32))
            position += length
        pieces.append(part.samples * np.float32(gain))
        position += len(part.samples)
    pieces.append(np.zeros(int(AFTER_S * SAMPLE_RATE), np.float32))
    samples = np.concatenate(pieces)
    noise = np.random.default_rng(zlib.crc32(f"{text} {voice} {lead}".encode()))
    samples += np.float32(SPEECH_RMS * 10 ** (-noise_db / 20)) * _pink(len(samples), noise)
    return Tape(text, kind, voice, (np.round(samples * 32768) / 32768).astype(np.float32), position, tuple(pauses))


def without_pauses(made: Tape) -> Tape:
    """Return the tape without what was put into the sentence."""
    keep = np.ones(len(made.samples), bool)
    for pause in made.pauses:
        keep[pause.start : pause.end] = False
    return dataclasses.replace(made, samples=made.samples[keep], end=int(keep[: made.end].sum()), pauses=())


def _pink(size: int, rng: np.random.Generator) -> Samples:
    """Noise of unit deviation whose power falls with 1 / f."""
    spectrum = np.fft.rfft(rng.standard_normal(size))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 20))
    samples = np.fft.irfft(spectrum, size)
    return np.asarray(samples / np.std(samples), np.float32)
