"""Building an engine: a bundle's weights become the networks that are fastest on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_asr import __version__
from edge_asr.engine import trial
from edge_asr.engine.checkpoint import read_checkpoint
from edge_asr.engine.graph import decoder_graph, encoder_graph
from edge_asr.engine.published import read_graph
from edge_asr.engine.quantize import dequantize, quantize
from edge_asr.engine.weights import UnknownGraphError, Weights, check
from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import CHECKPOINT, FP32, INT8, Bundle
from edge_asr.recognizer.manifest import (
    AUTO,
    ONNX,
    Manifest,
    Source,
    describe_file,
    describe_source,
    existing,
    this_machine,
    write_manifest,
)
from edge_asr.recognizer.onnx_network import OnnxNetwork, runtime_version
from edge_asr.recognizer.paraformer import Ids, Paraformer
from edge_asr.recognizer.whole import WholeParaformer

log = logging.getLogger(__name__)

SOURCES = {INT8: (INT8, FP32, CHECKPOINT), FP32: (FP32, CHECKPOINT, INT8)}
"""The files that a target's weights may come from, best first: what was published in it is taken as it is."""
OURS = re.compile(r"(encoder|decoder)-[0-9a-f]{12}\.(onnx|data)")
"""Files of an engine. Nothing else in the folder is ours to clear away."""
PREFIX = ".build-"
"""Of the folder that a build works in."""
WORTH_IT = 1.2
"""int8 must be so many times faster than fp32 to be chosen: it rounds, and runs one utterance at a time."""


class Progress(Protocol):
    """Who wants to know how far a build is."""

    def __call__(self, step: str, share: float) -> None:
        """A step begins; `share` of the whole is done."""


def silent(step: str, share: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An engine that is written but not in place."""

    engine: str
    source: Path
    described: Source
    """The source as it was before it was read: if it changes meanwhile, the engine does not fit it."""
    encoder: tuple[Path, Path]
    """The graph, and the file of its constants."""
    decoder: tuple[Path, Path]


@dataclass(frozen=True, slots=True)
class _Proven:
    """A candidate that hears what the published graph hears."""

    candidate: _Candidate
    compared_tokens: int
    ms: float = 0.0
    """What a few seconds of audio take; 0 where nobody asked."""


def build_engine(
    bundle: Bundle, target: str, out: Path, threads: int = 0, progress: Progress = silent, if_needed: bool = False
) -> Manifest:
    """Write the engine of a bundle into `out`, replacing what is there in one step; return its manifest.

    `target`: `onnx-int8`, `onnx-fp32`, or `onnx`, which builds both, measures, and keeps one. `if_needed`: keep what is
    there if it fits. Raises EngineError where the weights cannot be taken apart, BundleError where a file is damaged.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            if if_needed and (fitting := existing(bundle, out, target)) is not None:
                return fitting
            for abandoned in out.glob(f"{PREFIX}*"):  # nobody else builds here: it was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=PREFIX, dir=out) as folder:
                return _build(bundle, target, out, Path(folder), threads, progress)
    except UnknownGraphError as error:
        raise EngineError(
            f"{bundle.graph}: not a Paraformer that can be taken apart ({error}); it runs whole, without an engine"
        ) from error
    except OSError as error:
        raise EngineError(f"{out}: cannot write the engine there ({error}); name another folder with --out") from error


def _build(bundle: Bundle, target: str, out: Path, folder: Path, threads: int, progress: Progress) -> Manifest:
    signed = trial.multiplies_signed_exactly()
    either = target in (AUTO, ONNX)
    engines = (INT8, FP32) if either else (target,)
    proven: list[_Proven] = []
    refused: dict[str, UnknownGraphError] = {}
    for number, engine in enumerate(engines):
        steps = _Steps(progress, engine, number / len(engines), (number + 1) / len(engines))
        try:
            candidate = _write(bundle, engine, folder, signed, steps)
            proven.append(_prove(bundle, candidate, threads, steps, timed=either))
        except UnknownGraphError as error:
            refused[engine] = error
    if not proven:
        raise next(iter(refused.values()))
    chosen, why = _choose(target, proven, refused)
    progress("done", 1.0)
    times = {one.candidate.engine: one.ms for one in proven if one.ms}
    return _install(bundle, target, chosen, out, why, threads, times)


def _prove(bundle: Bundle, candidate: _Candidate, threads: int, steps: _Steps, timed: bool) -> _Proven:
    """Compare a candidate with what it was made of, and measure it. Raises UnknownGraphError."""
    expected = _published_answers(bundle, candidate, threads, steps)
    with _loaded(bundle, candidate, threads) as recognizer:
        compared = 0
        if expected is not None:
            share, slack = _tolerance(bundle, candidate, len(expected))
            compared = trial.compare(trial.answers(recognizer), expected, share, slack)
        if not timed:
            return _Proven(candidate, compared)
        steps("measuring", 0.8)
        return _Proven(candidate, compared, round(trial.time_ms(recognizer), 1))


class _Steps:
    """A part of a build's progress."""

    def __init__(self, progress: Progress, engine: str, start: float, end: float) -> None:
        self._progress, self._engine, self._start, self._end = progress, engine, start, end

    def __call__(self, step: str, share: float) -> None:
        self._progress(f"{self._engine}: {step}", self._start + share * (self._end - self._start))


def _write(bundle: Bundle, engine: str, folder: Path, signed: bool, steps: _Steps) -> _Candidate:
    """Write both networks of an engine."""
    kind = next(kind for kind in SOURCES[engine] if kind in bundle.files)
    source = bundle.files[kind]
    steps(f"reading {source.name}", 0.0)
    described = describe_source(source)
    weights, metadata = _read(bundle, kind, source)
    if engine == INT8 and not weights.quantized:
        steps("quantising", 0.25)
        weights = quantize(weights)
    elif engine == FP32 and weights.quantized:
        weights = dequantize(weights)
    metadata = {**metadata, **_metadata(weights)}
    steps("writing the encoder", 0.4)
    encoder = encoder_graph(weights, metadata, signed).write(folder, "encoder")
    steps("writing the decoder", 0.55)
    decoder = decoder_graph(weights, signed).write(folder, "decoder")
    del weights
    gc.collect()  # what follows loads the networks: the weights must be gone by then
    return _Candidate(engine, source, described, encoder, decoder)


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
    """Return what the recogniser must know of an encoder beyond its inputs and outputs."""
    return {
        "input_scale": repr(weights.input_scale),
        "tail": repr(weights.config.tail),
        "vocabulary": str(weights.vocabulary),
        "batches": str(not weights.quantized).lower(),
    }


@contextlib.contextmanager
def _loaded(bundle: Bundle, candidate: _Candidate, threads: int) -> Iterator[Paraformer]:
    encoder, decoder = (OnnxNetwork(graph, threads) for graph, _ in (candidate.encoder, candidate.decoder))
    recognizer = Paraformer(bundle, encoder, decoder, candidate.engine)
    try:
        yield recognizer
    finally:
        recognizer.close()


def _published_answers(bundle: Bundle, candidate: _Candidate, threads: int, steps: _Steps) -> list[Ids | None] | None:
    """Return what the published graph hears; None for a checkpoint, which cannot be run without FunASR's code.

    It is gone from memory before the networks made of it are loaded.
    """
    if candidate.source == bundle.files.get(CHECKPOINT):
        return None
    steps("comparing with the published graph", 0.6)
    published = WholeParaformer(bundle, OnnxNetwork(candidate.source, threads), candidate.engine)
    try:
        return trial.answers(published)
    finally:
        published.close()


def _tolerance(bundle: Bundle, candidate: _Candidate, sounds: int) -> tuple[float, int]:
    """Return which share of the tokens must be the same, and in how many sounds their number may differ by one."""
    if candidate.source != bundle.files.get(candidate.engine):  # it is rounded anew, or no longer
        return trial.AGREE_ROUNDED, sounds
    return (trial.AGREE_EXACT, 0) if candidate.engine == FP32 else (trial.AGREE_ROUNDED, 1)


def _choose(target: str, proven: Sequence[_Proven], refused: Mapping[str, UnknownGraphError]) -> tuple[_Proven, str]:
    """Return the engine to keep, and why."""
    if target not in (AUTO, ONNX):
        return proven[0], f"{target} was asked for"
    if refused:
        reasons = "; ".join(f"{engine} was refused: {error}" for engine, error in refused.items())
        return proven[0], f"{proven[0].candidate.engine} is left, {reasons}"
    int8, fp32 = proven
    gain = fp32.ms / int8.ms
    measured = f"{trial.TIMED_S:g} s of audio take {int8.ms:g} ms in int8 and {fp32.ms:g} ms in fp32"
    why = f"{measured}; int8 is taken from {WORTH_IT:g} times faster on, here it is {gain:.1f} times"
    return (int8 if gain >= WORTH_IT else fp32), why


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other build works in the folder: it would take memory twice, and our files with its old ones."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system can
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _install(
    bundle: Bundle, target: str, proven: _Proven, out: Path, why: str, threads: int, times: Mapping[str, float]
) -> Manifest:
    """Move the files into place, then the manifest that names them, and clear the rest."""
    candidate = proven.candidate
    files = [path.replace(out / path.name) for path in (*candidate.encoder, *candidate.decoder)]
    manifest = Manifest(
        engine=candidate.engine,
        asked=target,
        why=why,
        model=bundle.name,
        source=candidate.described,
        encoder=candidate.encoder[0].name,
        decoder=candidate.decoder[0].name,
        files={path.name: describe_file(path) for path in files},
        machine=this_machine(),
        config=dataclasses.asdict(bundle.config),
        threads=threads,
        compared_tokens=proven.compared_tokens,
        versions={"edge_asr": __version__, "onnxruntime": runtime_version()},
        measured_ms=times,
    )
    write_manifest(out, manifest)
    for path in out.iterdir():
        if OURS.fullmatch(path.name) and path.name not in manifest.files:
            path.unlink()
    return manifest
