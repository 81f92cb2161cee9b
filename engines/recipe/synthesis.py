"""Speech from espeak-ng: its variants, and random ones made of the same attributes, speaking tone-numbered pinyin."""

from __future__ import annotations

import io
import random
import re
import subprocess
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]
RATE = 22_050
EVALUATION_VOICES = ("m7", "f5", "klatt4", "croak")
"""Variants that no training sentence is spoken by."""


class Voices:
    """espeak-ng with a data folder of our own: the installed variants plus seeded random ones (it takes 349 in all)."""

    def __init__(self, folder: Path, random_voices: int = 100, seed: int = 0) -> None:
        installed = _installed_data()
        self._folder = folder
        data = folder / "espeak-ng-data"
        variants = data / "voices" / "!v"
        if not (folder / "ready").exists():
            variants.mkdir(parents=True, exist_ok=True)
            for entry in installed.iterdir():
                if entry.name != "voices" and not (data / entry.name).exists():
                    (data / entry.name).symlink_to(entry)
            for entry in (installed / "voices" / "!v").iterdir():
                if not (variants / entry.name).exists():
                    (variants / entry.name).symlink_to(entry)
            rng = random.Random(seed)
            for index in range(random_voices):
                (variants / f"random{index}").write_text(_random_variant(rng), encoding="utf-8")
            (folder / "ready").touch()
        names = sorted(entry.name for entry in variants.iterdir())
        self.published = [name for name in names if not name.startswith("random") and name not in EVALUATION_VOICES]
        self.random = [name for name in names if name.startswith("random")]

    def speak(
        self,
        reading: Sequence[str],
        voice: str,
        words_per_minute: int = 175,
        pitch: int = 50,
        language: str = "cmn-latn-pinyin",
    ) -> Samples:
        """Return 22,050 Hz mono float32 for words of tone-numbered pinyin; a word `_200` is a pause of 200 ms."""
        parts = [f'<break time="{word[1:]}ms"/>' if word.startswith("_") else word for word in reading]
        command = [
            "espeak-ng", f"--path={self._folder}", "-v", f"{language}+{voice}", "-s", str(words_per_minute),
            "-p", str(pitch), "-m", "--stdout", f"<speak>{' '.join(parts)}</speak>",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, check=True)
        return _read_wav(done.stdout)


def _installed_data() -> Path:
    version = subprocess.run(["espeak-ng", "--version"], capture_output=True, check=True, text=True).stdout
    match = re.search(r"Data at: (.+)", version)
    if match is None:
        raise RuntimeError(f"espeak-ng does not say where its data is: {version!r}")
    return Path(match.group(1).strip())


def _read_wav(data: bytes) -> Samples:
    # espeak-ng writes a length of 2 GiB when it writes to a pipe, so the header's own count means nothing.
    with wave.open(io.BytesIO(data)) as reader:
        if reader.getframerate() != RATE:
            raise RuntimeError(f"espeak-ng speaks at {reader.getframerate()} Hz, expected {RATE}")
        pcm = reader.readframes(len(data) // 2)
    samples: Samples = np.frombuffer(pcm[: len(pcm) // 2 * 2], np.int16).astype(np.float32) / 32768
    return samples


def _random_variant(rng: random.Random) -> str:
    """A voice file whose formants, pitch and source are drawn at random around what speakers have."""
    female = rng.random() < 0.5
    low = rng.uniform(140, 230) if female else rng.uniform(70, 140)
    tract = rng.uniform(1.02, 1.25) if female else rng.uniform(0.85, 1.08)
    lines = ["language variant", "name random", f"pitch {low:.0f} {low * rng.uniform(1.2, 1.9):.0f}"]
    for formant in range(1, 9):
        frequency = 100 * tract * rng.uniform(0.93, 1.07)
        strength = rng.uniform(60, 140)
        width = rng.uniform(70, 170)
        lines.append(f"formant {formant} {frequency:.0f} {strength:.0f} {width:.0f}")
    if rng.random() < 0.5:
        lines.append(f"roughness {rng.randint(0, 5)}")
    if rng.random() < 0.5:
        lines.append(f"flutter {rng.randint(0, 12)}")
    if rng.random() < 0.4:
        lines.append("breath " + " ".join(str(rng.randint(0, 6)) for _ in range(8)))
    if rng.random() < 0.5:
        lines.append(f"voicing {rng.randint(60, 150)}")
    if rng.random() < 0.5:
        lines.append(f"consonants {rng.randint(60, 150)} {rng.randint(60, 150)}")
    if rng.random() < 0.25:
        lines.append(f"klatt {rng.choice((1, 2, 3, 5, 6))}")
    return "\n".join(lines) + "\n"
