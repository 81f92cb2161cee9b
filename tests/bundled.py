"""The bundled model and its recordings, and what several tests do with them."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from edge_asr.audio.decode import read
from edge_asr.audio.source import Chunker
from edge_asr.recognizer.bundle import GRAPHS, Bundle, read_bundle
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.types import SAMPLE_RATE, Chunk, Samples

REPOSITORY = Path(__file__).parent.parent
BUNDLE = REPOSITORY / "engines" / "paraformer-tiny"
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
"""Recordings and published side files that are no part of the project; tests skip where they are absent."""
ENGINES = tuple(GRAPHS)


def transcripts() -> dict[str, str]:
    """Return the texts of the bundled recordings by file name."""
    lines = (BUNDLE / "samples" / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def recording(name: str) -> Path:
    return BUNDLE / "samples" / name


def sound_of(name: str) -> Samples:
    return read(recording(name))


def bundle_of(engine: str) -> Bundle:
    return dataclasses.replace(read_bundle(BUNDLE), graph=BUNDLE / GRAPHS[engine][0], engine=engine)


def load(engine: str) -> Paraformer:
    bundle = bundle_of(engine)
    return Paraformer(bundle, OnnxNetwork(bundle.graph, threads=1))


def chunks_of(samples: Samples) -> Iterator[Chunk]:
    """Yield the chunks of a sound, the last padded with zeros."""
    chunker = Chunker(lambda index: index / SAMPLE_RATE)
    yield from chunker.push(samples)
    yield from chunker.flush()


def write_wav(path: Path, samples: Samples) -> Path:
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SAMPLE_RATE)
        out.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
    return path


def recipe(module: str) -> ModuleType:
    """Import a module of the training recipe: its folder is no package, its modules import each other by name."""
    folder = str(REPOSITORY / "engines" / "recipe")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)
