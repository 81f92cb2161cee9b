"""Building an engine: a bundle's weights become the networks that are fastest on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
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
    Manifest,
    Source,
    describe_file,
    describe_source,
    this_machine,
    write_manifest,
)
from edge_asr.recognizer.onnx_network import OnnxNetwork, runtime_version
from edge_asr.recognizer.paraformer import Ids, Paraformer
from edge_asr.recognizer.whole import WholeParaformer

log = logging.getLogger(__name__)

AUTO = "auto"
TARGETS = (AUTO, FP32, INT8)
SOURCES = {INT8: (INT8, FP32, CHECKPOINT), FP32: (FP32, CHECKPOINT, INT8)}
"""The files that a target's weights may come from, best first: what was published in it is taken as it is."""
OURS = re.compile(r"(encoder|decoder)-[0-9a-f]{12}\.(onnx|data)")
"""Files of an engine. Nothing else in the folder is ours to clear away."""
PREFIX = ".build-"
ABANDONED_S = 3600.0
"""No build takes so long."""
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


def build_engine(bundle: Bundle, target: str, out: Path, threads: int = 0, progress: Progress = silent) -> Manifest:
    """Write the engine of a bundle into `out`, replacing what is there in one step; return its manifest.

    `target`: `onnx-int8`, `onnx-fp32`, or `auto`, which builds both, measures, and keeps one. Raises EngineError where
    the weights cannot be taken apart, BundleError where a file is damaged.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(out)
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=out) as folder:
            return _build(bundle, target, out, Path(folder), threads, progress)
    except UnknownGraphError as error:
        raise EngineError(
            f"{bundle.graph}: not a Paraformer that can be taken apart ({error}); it runs whole, without an engine"
        ) from error
    except OSError as error:
        raise EngineError(f"{out}: cannot write the engine there ({error}); name another folder with --out") from error


def _clear_abandoned(out: Path) -> None:
    """Remove what builds that were killed have left behind."""
    for folder in out.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another build may have ended, or cleared it, just now
            if time.time() - folder.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(folder)


def _build(bundle: Bundle, target: str, out: Path, folder: Path, threads: int, progress: Progress) -> Manifest:
    signed = trial.multiplies_signed_exactly()
    engines = (INT8, FP32) if target == AUTO else (target,)
    times: dict[str, float] = {}
    candidates: dict[str, _Candidate] = {}
    for number, engine in enumerate(engines):
        steps = _Steps(progress, engine, number / len(engines), (number + 1) / len(engines))
        candidate = candidates[engine] = _write(bundle, engine, folder, signed, steps)
        expected = _published_answers(bundle, candidate, threads, steps)
        with _loaded(bundle, candidate, threads) as recognizer:
            if expected is not None:
                trial.compare(trial.answers(recognizer), expected, exact=_is_exact(bundle, candidate))
            if target == AUTO:
                steps("measuring", 0.8)
                times[engine] = round(trial.time_ms(recognizer), 1)
    chosen, why = _choose(target, times)
    progress("done", 1.0)
    with _alone(out):
        return _install(bundle, target, candidates[chosen], out, why, times)


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


def _is_exact(bundle: Bundle, candidate: _Candidate) -> bool:
    return candidate.engine == FP32 and candidate.source == bundle.files.get(FP32)


def _choose(target: str, times: Mapping[str, float]) -> tuple[str, str]:
    """Return the engine to keep, and why."""
    if target != AUTO:
        return target, f"{target} was asked for"
    gain = times[FP32] / times[INT8]
    chosen = INT8 if gain >= WORTH_IT else FP32
    measured = f"{trial.TIMED_S:g} s of audio take {times[INT8]:g} ms in int8 and {times[FP32]:g} ms in fp32"
    return chosen, f"{measured}; int8 is taken from {WORTH_IT:g} times faster on, here it is {gain:.1f} times"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other build moves files into the folder, or clears them away: it would take ours with its old."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system can
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _install(
    bundle: Bundle, target: str, candidate: _Candidate, out: Path, why: str, times: Mapping[str, float]
) -> Manifest:
    """Move the files into place, then the manifest that names them, and clear the rest."""
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
        versions={"edge_asr": __version__, "onnxruntime": runtime_version()},
        measured_ms=times,
    )
    write_manifest(out, manifest)
    for path in out.iterdir():
        if OURS.fullmatch(path.name) and path.name not in manifest.files:
            path.unlink()
    return manifest
