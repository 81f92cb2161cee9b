"""Speech that is no command: made-up words by the rules of other languages, alone and in babble; its text is empty."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dataset import SHARD, room, write_arrays
from features import filterbank
from synthesis import Samples, Voices


@dataclass(frozen=True)
class Script:
    """Letters that syllables are made of, and the languages of espeak-ng that read them."""

    languages: tuple[str, ...]
    onsets: tuple[str, ...]
    vowels: tuple[str, ...]
    codas: tuple[str, ...]


LATIN = (
    "af", "ca", "cs", "cy", "da", "eo", "et", "eu", "fi", "ga", "hr", "hu", "id", "is", "la", "lt",
    "lv", "ms", "mt", "nb", "ro", "sk", "sl", "sq", "sv", "sw",
)  # fmt: skip
SCRIPTS = (
    Script(
        LATIN,
        (*"bcdfghjklmnprstvz", "st", "pr", "kr", "tr", "sk", "fl", "gr", "sh", "ch"),
        (*"aeiou", "ai", "ei", "ou", "au", "ia", "uo"),
        ("", "", "", *"nrslmtk", "ng", "st"),
    ),
    Script(("bg", "uk", "sr", "mk", "be"), tuple("бвгджзйклмнпрстфхцчш"), tuple("аеиоу"), ("", "", *"нрслтк", "ст")),
    Script(("el",), tuple("βγδζθκλμνπρστφχ"), (*"αεηιοω", "ου", "αι"), ("", "", "ς", "ν")),
    Script(("ka",), tuple("ბგდვზთკლმნპრსტფქღყშჩცძწჭხჯ"), tuple("აეიოუ"), ("", "", *"ნრსლმ")),
    Script(("mr", "ne"), tuple("कखगचजटडतदनपबमयरलवशसह"), ("", "ा", "ि", "ी", "ु", "े", "ो"), ("", "", "न", "र")),
)
"""None of the languages in which the appliance is tested for false text is among them."""
BABBLE_SHARE = 0.15
CUT_SHARE = 0.25
"""Of the utterances that begin or end in the middle, as they do where a segment is split."""


def make_foreign_shard(folder: Path, index: int) -> Path:
    """Return foreign shard `index` under `folder`, synthesised if it is not there, by random voices of its own."""
    path = folder / "foreign" / f"{index:04d}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = folder / "voices" / f"foreign-{index:04d}"
        voices = Voices(own, seed=100_000 + index)
        spoken = foreign_speech(random.Random(f"foreign {index}"), np.random.default_rng([index, 1]), voices, SHARD)
        frames = [filterbank(samples).astype(np.float16) for samples in spoken]
        write_arrays(path, frames, [np.zeros(0, np.int16)] * SHARD)
        shutil.rmtree(own)
    return path


def foreign_speech(rng: random.Random, noise: np.random.Generator, voices: Voices, count: int) -> Iterator[Samples]:
    """Yield 16 kHz recordings in which nothing of the vocabulary is said."""
    heard: list[Samples] = []
    for _ in range(count):
        if len(heard) > 8 and rng.random() < BABBLE_SHARE:
            yield _babble(rng, heard[-60:])
            continue
        script = rng.choices(SCRIPTS, [len(script.languages) for script in SCRIPTS])[0]
        voice = rng.choice(voices.published if rng.random() < 0.45 else voices.random)
        tract = float(np.exp(rng.uniform(np.log(0.78), np.log(1.3))))
        speed = int(np.clip(175 * rng.uniform(0.75, 1.5) / tract, 90, 340))
        dry = voices.speak(_words(rng, script), voice, speed, rng.randint(20, 80), rng.choice(script.languages))
        heard.append(_cut(rng, room(dry, tract, rng, noise, narrow=False)))
        yield heard[-1]


def _words(rng: random.Random, script: Script) -> list[str]:
    """One word to eight, short utterances more often: they are what is taken for a command."""
    return [_word(rng, script) for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 5, 6, 8)))]


def _word(rng: random.Random, script: Script) -> str:
    if rng.random() < 0.1:
        return str(rng.randint(0, 999))
    word = "".join(
        rng.choice(script.onsets) + rng.choice(script.vowels) + rng.choice(script.codas)
        for _ in range(rng.choice((1, 1, 2, 2, 2, 3, 4)))
    )
    return word + rng.choice(("", "", "", "", ",", "?"))


def _cut(rng: random.Random, samples: Samples) -> Samples:
    if rng.random() > CUT_SHARE or len(samples) < 16_000:
        return samples
    start = rng.randint(0, len(samples) // 3)
    return samples[start : start + rng.randint(8_000, len(samples) - start)]


def _babble(rng: random.Random, heard: list[Samples]) -> Samples:
    """Three to six of the last recordings at once."""
    chosen = rng.sample(heard, rng.randint(3, 6))
    size = sorted(map(len, chosen))[len(chosen) // 2]
    mixed = np.zeros(size, np.float32)
    for samples in chosen:
        level = float(np.std(samples)) + 1e-6
        mixed += np.resize(samples, size) / level * np.float32(10 ** (-rng.uniform(0, 8) / 20))
    mixed *= np.float32(10 ** (rng.uniform(-42, -16) / 20) / (np.std(mixed) + 1e-6))
    return np.clip(mixed, -1, 1)
