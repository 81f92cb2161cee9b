"""Character error rates of a bundle, by the appliance's own recogniser, on voices and sentences not trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soxr
from phrases import KINDS, sentence
from synthesis import EVALUATION_VOICES, RATE, Samples, Voices

from edge_asr.audio.decode import read
from edge_asr.loader import load_whole
from edge_asr.recognizer.bundle import read_bundle
from edge_asr.types import Recognition

SEED = 20_260
HUMAN_LINES = (1, 3, 5, *range(83, 110, 2))
"""The recordings of AISHELL's sample pack that the vocabulary covers: temperatures and phone numbers."""


@dataclass(frozen=True)
class Utterance:
    """A recording and what is said in it."""

    text: str
    samples: Samples


def synthetic(folder: Path, count: int, kinds: Sequence[str], noise_db: float | None, seed: int) -> Iterator[Utterance]:
    """Held-out sentences by the four voices that training never heard; noise is pink, at `noise_db` below speech."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    voices = Voices(folder)
    for index in range(count):
        spoken = sentence(rng, kinds, held_out=True)
        voice = EVALUATION_VOICES[index % len(EVALUATION_VOICES)]
        dry = voices.speak(spoken.reading(rng), voice, rng.randint(140, 210), rng.randint(35, 65))
        samples = np.asarray(soxr.resample(dry, RATE, 16_000), np.float32) * 0.3
        samples = np.pad(samples, 4000)
        if noise_db is not None:
            samples = samples + pink(len(samples), noise) * np.std(samples) * np.float32(10 ** (-noise_db / 20))
        yield Utterance(spoken.text, (np.round(samples * 32767) / 32768).astype(np.float32))


def human(folder: Path) -> Iterator[Utterance]:
    """AISHELL's temperature commands and phone numbers, by a person."""
    lines = (folder / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    texts = dict(line.split("\t") for line in lines)
    for number in HUMAN_LINES:
        name = f"commands/BAC009S0150W{number:04d}.wav"
        yield Utterance(texts[name], read(folder / name))


def pink(size: int, rng: np.random.Generator) -> Samples:
    """Noise of unit deviation whose power falls with 1 / f."""
    spectrum = np.fft.rfft(rng.standard_normal(size))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(size, 1 / 16_000), 20))
    samples = np.fft.irfft(spectrum, size)
    return (samples / np.std(samples)).astype(np.float32)


def character_error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Edits between reference and hypothesis over characters of the reference, in per cent."""
    edits = length = 0
    for reference, hypothesis in pairs:
        edits += distance(reference, hypothesis)
        length += len(reference)
    return round(100 * edits / max(1, length), 2)


def distance(reference: str, hypothesis: str) -> int:
    """Levenshtein's."""
    row = list(range(len(hypothesis) + 1))
    for i, left in enumerate(reference, 1):
        last, row[0] = row[0], i
        for j, right in enumerate(hypothesis, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (left != right))
    return row[-1]


def evaluate(bundle: Path, work: Path, recordings: Path | None, count: int = 600) -> dict[str, dict[str, float]]:
    """Return the error rates in per cent of each published graph on each set."""
    sets = utterance_sets(work, recordings, count)
    loaded, rates = read_bundle(bundle), {}
    for kind, path in loaded.files.items():
        recognizer = load_whole(replace(loaded, files={kind: path}), threads=1)
        rates[kind] = error_rates(recognizer.recognize, sets)
    return rates


def error_rates(
    recognize: Callable[[Samples], Recognition], sets: Mapping[str, Sequence[Utterance]]
) -> dict[str, float]:
    """Return the error rate in per cent on each set."""
    return {
        name: character_error_rate((u.text, recognize(u.samples).text) for u in utterances)
        for name, utterances in sets.items()
    }


def utterance_sets(work: Path, recordings: Path | None, count: int) -> dict[str, list[Utterance]]:
    """Return what is recognised, by name: sentences of voices that no training heard, and recordings of people."""
    ordinary = [kind for kind in KINDS if kind not in ("random", "fixed")]
    sets = {
        "clean": list(synthetic(work / "voices" / "evaluation", count, ordinary, None, SEED)),
        "pink noise at 10 dB": list(synthetic(work / "voices" / "evaluation", count, ordinary, 10, SEED + 1)),
        "random words": list(synthetic(work / "voices" / "evaluation", count, ["random"], None, SEED + 2)),
    }
    if recordings is not None and recordings.is_dir():
        sets["human commands"] = list(human(recordings))
    return sets
