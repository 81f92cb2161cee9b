#!/usr/bin/env python3
"""Make sentences for `edge-asr bench latency`: WAV files, their texts, and where speech ends in each.

`python -m bench.latency_sentences --out DIR --recordings DIR` from the repository's root; the same options make the
same files. Sentences are those of the bundled model's vocabulary that no training saw, by voices that none heard; they
need espeak-ng.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import sys
import tempfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import soxr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds its own folder only

from edge_asr.audio.decode import read
from edge_asr.errors import AudioError
from edge_asr.speech.energy import end_of_sound
from edge_asr.types import SAMPLE_RATE, Samples

ROOT = Path(__file__).resolve().parents[1]
COUNT = 200
SEED = 5
SILENCE_S = 0.3
"""Before and after speech."""
SPEECH, NOISE = 0.3, 1e-4
"""Share of full scale that speech takes, and the deviation of the noise under it."""
TABLE = "transcripts.tsv"
"""File and text, a line each: in the folder that is made, and in each folder of recordings."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """A recording of one sentence."""

    file: str
    """Its path below the folder."""
    text: str
    origin: str
    """Who speaks: `espeak-ng m7`, or the name of a folder of recordings."""
    kind: str
    """Of a made one, what it is about (phrases.KINDS); empty for others."""
    seconds: float
    speech_ends_s: float
    """The last 10 ms above the file's own noise floor."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the folder."""
    options = _arguments(arguments)
    try:
        sentences = [*_spoken(options.out, options.count, options.seed), *_recorded(options.out, options.recordings)]
    except (AudioError, OSError) as error:
        sys.exit(f"bench.latency_sentences: {error}")
    table = "".join(f"{sentence.file}\t{sentence.text}\n" for sentence in sentences)
    (options.out / TABLE).write_text(table, encoding="utf-8")
    manifest = {"seed": options.seed, "sentences": [asdict(sentence) for sentence in sentences]}
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"{options.out}: {len(sentences)} sentences, {sum(sentence.seconds for sentence in sentences):.0f} s")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.latency_sentences", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--count", type=int, default=COUNT, help="sentences to synthesise")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--recordings", type=Path, action="append", default=[], help=f"a folder with recordings and {TABLE}; repeatable"
    )
    return parser.parse_args(arguments)


def _spoken(out: Path, count: int, seed: int) -> Iterator[Sentence]:
    """Write and yield sentences by espeak-ng."""
    phrases, synthesis = _recipe("phrases"), _recipe("synthesis")
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    kinds = [kind for kind in phrases.KINDS if kind not in ("random", "fixed")]  # nonsense, and what training saw
    (out / "espeak").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edge_asr-voices-") as folder:
        voices = synthesis.Voices(Path(folder), random_voices=0)
        for index in range(count):
            said = phrases.sentence(rng, kinds, held_out=True)
            voice = synthesis.EVALUATION_VOICES[index % len(synthesis.EVALUATION_VOICES)]
            dry = voices.speak(said.reading(rng), voice, rng.randint(140, 210), rng.randint(35, 65))
            samples = np.pad(SPEECH * soxr.resample(dry, synthesis.RATE, SAMPLE_RATE), int(SILENCE_S * SAMPLE_RATE))
            samples += NOISE * noise.standard_normal(len(samples))
            file = f"espeak/{index:04d}.wav"
            _write(out / file, samples)
            yield _sentence(out, file, said.text, f"espeak-ng {voice}", said.kind)


def _recorded(out: Path, folders: Sequence[Path]) -> Iterator[Sentence]:
    """Copy and yield what people have recorded."""
    for folder in folders:
        lines = (folder / TABLE).read_text(encoding="utf-8").splitlines()
        for name, text in sorted(line.split("\t") for line in lines):
            file = f"{folder.name}/{name}"
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / file)
            yield _sentence(out, file, text, folder.name)


def _sentence(out: Path, file: str, text: str, origin: str, kind: str = "") -> Sentence:
    samples = read(out / file)
    seconds, end_s = (round(count / SAMPLE_RATE, 3) for count in (len(samples), end_of_sound(samples)))
    return Sentence(file, text, origin, kind, seconds, end_s)


def _write(path: Path, samples: Samples) -> None:
    with wave.open(str(path), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())


def _recipe(name: str) -> ModuleType:
    """Import a module of the training recipe: its folder is no package, its modules import each other by name."""
    folder = str(ROOT / "engines" / "recipe")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


if __name__ == "__main__":
    main()
