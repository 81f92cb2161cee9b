"""Engines that are written but not in place, and the proof that they hear what the published graph hears."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edge_asr.engine import trial
from edge_asr.engine.checkpoint import read_checkpoint
from edge_asr.engine.graph import Graph, decoder_graph, encoder_graph
from edge_asr.engine.published import read_graph
from edge_asr.engine.quantize import dequantize, quantize
from edge_asr.engine.weights import Weights, check
from edge_asr.recognizer.bundle import CHECKPOINT, FP32, INT8, Bundle
from edge_asr.recognizer.manifest import Plan, SelfTest, Source, describe_source
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.paraformer import Ids, Paraformer
from edge_asr.recognizer.whole import WholeParaformer

SOURCES = {INT8: (INT8, FP32, CHECKPOINT), FP32: (FP32, CHECKPOINT, INT8)}
"""The files that an engine's weights may come from, best first: what was published in it is taken as it is."""


class Progress(Protocol):
    """Who wants to know how far a build is."""

    def __call__(self, step: str, share: float) -> None:
        """A step begins; `share` of the whole is done."""


class Steps:
    """A part of a build's progress."""

    def __init__(self, progress: Progress, engine: str, start: float = 0.0, end: float = 1.0) -> None:
        """Everything about `engine` happens from `start` to `end` of the whole."""
        self._progress, self._engine, self._start, self._end = progress, engine, start, end

    def __call__(self, step: str, share: float) -> None:
        """A step begins; `share` of this part is done."""
        self._progress(f"{self._engine}: {step}", self._start + share * (self._end - self._start))

    def part(self, start: float, end: float) -> Steps:
        """Return a part of this part."""
        size = self._end - self._start
        return Steps(self._progress, self._engine, self._start + start * size, self._start + end * size)


@dataclass(frozen=True, slots=True)
class Networks:
    """Both networks of an engine before they are written; they hold the weights."""

    engine: str
    source: Path
    described: Source
    """The source as it was before it was read: if it changes meanwhile, the engine does not fit it."""
    encoder: Graph
    decoder: Graph
    metadata: Mapping[str, str]
    """What the recogniser must know of the encoder beyond its inputs and outputs."""

    def write(self, folder: Path, steps: Steps) -> Candidate:
        """Write them as engine of onnxruntime."""
        steps("writing the encoder", 0.0)
        encoder = self.encoder.write(folder, "encoder")
        steps("writing the decoder", 0.5)
        decoder = self.decoder.write(folder, "decoder")
        return Candidate(self.engine, self.source, self.described, encoder, decoder)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that is written but not in place."""

    engine: str
    source: Path
    described: Source
    """See Networks."""
    encoder: tuple[Path, ...]
    """The network itself first, then the files that belong to it."""
    decoder: tuple[Path, ...]
    beside: tuple[Path, ...] = ()
    """Files of both."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    self_test: SelfTest | None = None
    plan: Plan | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return (*self.encoder, *self.decoder, *self.beside)


@dataclass(frozen=True, slots=True)
class Proven:
    """A candidate that hears what the published graph hears."""

    candidate: Candidate
    compared_tokens: int
    ms: float = 0.0
    """What a few seconds of audio take; 0 where nobody asked."""


def write(bundle: Bundle, engine: str, folder: Path, signed: bool, steps: Steps) -> Candidate:
    """Write an engine of onnxruntime. Raises UnknownGraphError, BundleError, OSError."""
    networks = read_networks(bundle, engine, signed, steps.part(0.0, 0.4))
    candidate = networks.write(folder, steps.part(0.4, 0.7))
    del networks
    gc.collect()  # what follows loads the networks: the weights must be gone by then
    return candidate


def read_networks(bundle: Bundle, engine: str, signed: bool, steps: Steps) -> Networks:
    """Make the networks of `onnx-int8` or `onnx-fp32`; `signed`: of 8-bit weights. Raises UnknownGraphError."""
    kind = next(kind for kind in SOURCES[engine] if kind in bundle.files)
    source = bundle.files[kind]
    steps(f"reading {source.name}", 0.0)
    described = describe_source(source)
    weights, metadata = _read(bundle, kind, source)
    if engine == INT8 and not weights.quantized:
        steps("quantising", 0.6)
        weights = quantize(weights)
    elif engine == FP32 and weights.quantized:
        weights = dequantize(weights)
    metadata = {**metadata, **_metadata(weights)}
    encoder, decoder = encoder_graph(weights, metadata, signed), decoder_graph(weights, signed)
    return Networks(engine, source, described, encoder, decoder, metadata)


def _read(bundle: Bundle, kind: str, path: Path) -> tuple[Weights, Mapping[str, str]]:
    """Return the weights in a file, and the CMVN in its metadata (sherpa-onnx layout)."""
    metadata: Mapping[str, str] = {}
    if kind == CHECKPOINT:
        weights = read_checkpoint(path, bundle.config)
    else:
        weights, metadata = read_graph(path, bundle.config)
    check(weights)
    return weights, {key: metadata[key] for key in ("neg_mean", "inv_stddev") if key in metadata}


def _metadata(weights: Weights) -> Mapping[str, str]:
    return {
        "input_scale": repr(weights.input_scale),
        "tail": repr(weights.config.tail),
        "vocabulary": str(weights.vocabulary),
        "batches": str(not weights.quantized).lower(),
    }


def prove(bundle: Bundle, candidate: Candidate, threads: int, steps: Steps, timed: bool) -> Proven:
    """Compare a candidate with what it was made of, and measure it. Raises UnknownGraphError."""
    expected = _published_answers(bundle, candidate, threads, steps)
    with loaded(bundle, candidate, threads) as recognizer:
        compared = 0
        if expected is not None:
            share, slack = _tolerance(bundle, candidate, len(expected))
            compared = trial.compare(trial.answers(recognizer), expected, share, slack)
        if not timed:
            return Proven(candidate, compared)
        steps("measuring", 0.8)
        return Proven(candidate, compared, round(trial.time_ms(recognizer), 1))


@contextlib.contextmanager
def loaded(bundle: Bundle, candidate: Candidate, threads: int) -> Iterator[Paraformer]:
    """Load a candidate for onnxruntime, for as long as it is needed."""
    encoder, decoder = (OnnxNetwork(graph, threads) for graph, *_ in (candidate.encoder, candidate.decoder))
    recognizer = Paraformer(bundle, encoder, decoder, candidate.engine)
    try:
        yield recognizer
    finally:
        recognizer.close()


def _published_answers(bundle: Bundle, candidate: Candidate, threads: int, steps: Steps) -> list[Ids | None] | None:
    """Return what the published graph hears; None for a checkpoint, which cannot be run without FunASR's code.

    It is gone from memory before the networks made of it are loaded.
    """
    if candidate.source == bundle.files.get(CHECKPOINT):
        return None
    steps("comparing with the published graph", 0.7)
    published = WholeParaformer(bundle, OnnxNetwork(candidate.source, threads), candidate.engine)
    try:
        return trial.answers(published)
    finally:
        published.close()


def _tolerance(bundle: Bundle, candidate: Candidate, sounds: int) -> tuple[float, int]:
    """Return which share of the tokens must be the same, and in how many sounds their number may differ by one."""
    if candidate.source != bundle.files.get(candidate.engine):  # it is rounded anew, or no longer
        return trial.AGREE_ROUNDED, sounds
    return (trial.AGREE_EXACT, 0) if candidate.engine == FP32 else (trial.AGREE_ROUNDED, 1)
