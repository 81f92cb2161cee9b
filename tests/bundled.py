"""The bundled model and its recordings, and what several tests do with them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

import edge_asr
from edge_asr.audio.decode import read
from edge_asr.audio.source import Chunker
from edge_asr.config import EngineConfig
from edge_asr.engine.build import build_engine
from edge_asr.loader import existing, load_engine
from edge_asr.loader import load_whole as load_whole_graph
from edge_asr.recognizer.bundle import FP32, INT8, Bundle, read_bundle
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.whole import WholeParaformer
from edge_asr.types import SAMPLE_RATE, Chunk, Samples

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(edge_asr.__file__).parent
"""The package under test: in the checkout, or where scripts/test-wheel has installed it."""
BUNDLE = REPOSITORY / "engines" / "paraformer-tiny"
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
"""Recordings and published side files that are no part of the project; tests skip where they are absent."""
ENGINES = (FP32, INT8)


def transcripts() -> dict[str, str]:
    """Return the texts of the bundled recordings by file name."""
    lines = (BUNDLE / "samples" / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def recording(name: str) -> Path:
    return BUNDLE / "samples" / name


def sound_of(name: str) -> Samples:
    return read(recording(name))


def bundle_of(engine: str) -> Bundle:
    """Return the bundled model with one of its graphs only."""
    bundle = read_bundle(BUNDLE)
    return dataclasses.replace(bundle, files={engine: bundle.files[engine]})


@functools.cache
def engine_of(engine: str) -> Path:
    """Return the folder of the bundled model's engine, built once in a run of the tests."""
    folder = Path(os.environ["XDG_DATA_HOME"]) / "engines of the tests" / engine
    if existing(bundle_of(engine), folder, engine) is None:
        build_engine(bundle_of(engine), engine, folder, threads=1)
    return folder


def load(engine: str) -> Paraformer:
    """Load the bundled model's engine."""
    return load_engine(bundle_of(engine), engine_of(engine), EngineConfig(threads=1))


def load_whole(engine: str) -> WholeParaformer:
    """Load one of the bundled model's published graphs as it is."""
    return load_whole_graph(bundle_of(engine), threads=1)


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
