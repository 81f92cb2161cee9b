"""Pieces of music out of numpy: chords, bass, a lead with vibrato, drums, in several timbres."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_asr.types import SAMPLE_RATE, Samples

Sound = npt.NDArray[np.float64]

SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9), (0, 3, 5, 7, 10))
PROGRESSIONS = ((0, 5, 3, 4), (0, 3, 4, 0), (5, 3, 0, 4), (0, 4, 5, 3), (0, 0, 3, 4))
HARMONICS = {
    "organ": (1.0, 0.6, 0.4, 0.3, 0.0, 0.2, 0.0, 0.15),
    "saw": tuple(1 / k for k in range(1, 13)),
    "pluck": (1.0, 0.7, 0.5, 0.35, 0.25, 0.15),
    "flute": (1.0, 0.25, 0.08),
    "reed": (1.0, 0.1, 0.6, 0.1, 0.4, 0.1, 0.25),
}
VOWELS = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))
"""Formants in Hz of a, e, i, o, u: a lead that sings without words."""


def piece(rng: np.random.Generator) -> Samples:
    """Return 10 to 40 s of music, peaks at 1."""
    beat = 60 / rng.uniform(65, 150)
    bars = max(2, round(rng.uniform(10, 40) / (4 * beat)))
    scale = SCALES[rng.integers(len(SCALES))]
    key = int(rng.integers(45, 57))
    sound = np.zeros(round((bars * 4 * beat + 2) * SAMPLE_RATE))
    progression = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]
    parts = rng.random(4) < (0.7, 0.7, 0.85, 0.5)
    parts[2] |= not parts.any()
    for bar in range(bars):
        start, root = bar * 4 * beat, progression[bar % len(progression)]
        if parts[0]:
            _chord(sound, rng, start, 4 * beat, [_pitch(key, scale, root + k) for k in (0, 2, 4)])
        if parts[1]:
            _bass(sound, rng, start, beat, _pitch(key - 12, scale, root))
        if parts[2]:
            _lead(sound, rng, start, beat, key + 12, scale)
        if parts[3]:
            _drums(sound, rng, start, beat)
    played = sound / max(1e-9, float(np.abs(sound).max()))
    return room(played.astype(np.float32), rng)


def room(samples: Samples, rng: np.random.Generator) -> Samples:
    """Return a sound in a room: with an exponentially decaying tail of 0.1 to 0.6 s."""
    length = round(rng.uniform(0.1, 0.6) * SAMPLE_RATE)
    tail = rng.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length) * rng.uniform(0.02, 0.1)
    tail[0] = 1
    size = 1 << (len(samples) + length).bit_length()
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(tail, size), size)[: len(samples)]
    return wet.astype(np.float32)


def _pitch(key: int, scale: tuple[int, ...], step: int) -> float:
    """Return the frequency in Hz of a step of a scale."""
    octave, degree = divmod(step, len(scale))
    return float(440 * 2 ** ((key + 12 * octave + scale[degree] - 69) / 12))


def _chord(sound: Sound, rng: np.random.Generator, start: float, seconds: float, pitches: list[float]) -> None:
    timbre = str(rng.choice(("organ", "saw", "flute", "pluck")))
    for hertz in pitches:
        _add(sound, start, 0.25 * note(rng, hertz, seconds, timbre, 0.0))


def _bass(sound: Sound, rng: np.random.Generator, start: float, beat: float, hertz: float) -> None:
    for k in range(4):
        _add(sound, start + k * beat, 0.5 * note(rng, hertz, beat * 0.9, "pluck", 0.0))


def _lead(sound: Sound, rng: np.random.Generator, start: float, beat: float, key: int, scale: tuple[int, ...]) -> None:
    timbre = str(rng.choice(("flute", "reed", "saw", "bell", "voice", "voice")))
    at, step = 0.0, int(rng.integers(0, 6))
    while at < 4:
        length = float(rng.choice((0.5, 0.5, 1, 1, 2)))
        step = min(9, max(-2, step + int(rng.integers(-2, 3))))
        if rng.random() < 0.85:
            pitch = _pitch(key, scale, step) / (2 if timbre == "voice" and rng.random() < 0.5 else 1)
            seconds = beat * min(length, 4 - at) * rng.uniform(0.7, 1.05)
            _add(sound, start + at * beat, 0.6 * note(rng, pitch, seconds, timbre, rng.uniform(0, 0.02)))
        at += length


def _drums(sound: Sound, rng: np.random.Generator, start: float, beat: float) -> None:
    t = np.arange(round(0.25 * SAMPLE_RATE)) / SAMPLE_RATE
    kick = np.sin(2 * np.pi * (50 * t + 6 * (1 - np.exp(-t * 30)))) * np.exp(-t * 14)
    for k in range(8):
        hat = rng.standard_normal(len(t)) * np.exp(-t * 90)
        _add(sound, start + k * beat / 2, 0.15 * np.diff(hat, prepend=0))
    for k in range(4):
        snare = rng.standard_normal(len(t)) * np.exp(-t * 22)
        _add(sound, start + k * beat, 0.8 * kick if k % 2 == 0 else 0.4 * snare)


def note(rng: np.random.Generator, hertz: float, seconds: float, timbre: str, vibrato: float) -> Sound:
    """Return a note; `vibrato`: by which share of its frequency it goes up and down."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    rate = rng.uniform(4, 7)
    phase = 2 * np.pi * hertz * (t - vibrato / (2 * np.pi * rate) * np.cos(2 * np.pi * rate * t))
    if timbre == "bell":
        tone = np.sin(phase + 3 * np.exp(-2 * t) * np.sin(1.4 * phase)) * np.exp(-2.5 * t)
    elif timbre == "voice":
        tone = _sung(rng, phase, hertz)
    else:
        tone = sum(
            (share * np.sin(k * phase) * (np.exp(-t * (1 + k)) if timbre == "pluck" else 1.0)
            for k, share in enumerate(HARMONICS[timbre], 1)
            if share and k * hertz < SAMPLE_RATE / 2.2),
            start=np.zeros(len(t)),
        )  # fmt: skip
    if timbre == "flute":
        tone = tone + 0.03 * rng.standard_normal(len(t))
    ends = np.minimum(1, np.minimum(t, t[::-1]) / 0.02) if len(t) else t
    faded: Sound = tone * ends / (np.abs(tone).max(initial=0) + 1e-9)
    return faded


def _sung(rng: np.random.Generator, phase: Sound, hertz: float) -> Sound:
    """Return a vowel: harmonics as loud as three formants let them be."""
    formants = np.array(VOWELS[rng.integers(len(VOWELS))]) * rng.uniform(0.9, 1.2)
    tone = np.zeros(len(phase))
    for k in range(1, int(4000 / hertz) + 1):
        share = sum(1 / (1 + ((k * hertz - formant) / 90) ** 2) for formant in formants) + 0.02
        tone += share / k**0.5 * np.sin(k * phase)
    return tone


def _add(sound: Sound, start: float, part: Sound) -> None:
    at = round(start * SAMPLE_RATE)
    end = min(len(sound), at + len(part))
    sound[at:end] += part[: end - at]
