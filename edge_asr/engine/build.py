"""Building an engine: a bundle's weights become the networks that are fastest on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from edge_asr import __version__
from edge_asr.config import TensorRtConfig
from edge_asr.engine import trial
from edge_asr.engine.candidate import Progress, Proven, Steps, prove, write
from edge_asr.engine.plans import build_plans
from edge_asr.engine.tensorrt_build import CACHE
from edge_asr.engine.weights import UnknownGraphError
from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import FP32, INT8, Bundle
from edge_asr.recognizer.manifest import (
    AUTO,
    ONNX,
    TENSORRT,
    TENSORRT_AS_USUAL,
    Manifest,
    describe_file,
    existing,
    resolved,
    this_machine,
    write_manifest,
)
from edge_asr.recognizer.onnx_network import runtime_version

OURS = re.compile(r"(encoder|decoder)-[0-9a-f]{12}\.(onnx|data|plan)|self-test-[0-9a-f]{12}\.wav")
"""Files of an engine. Nothing else in the folder is ours to clear away."""
PREFIX = ".build-"
"""Of the folder that a build works in."""
WORTH_IT = 1.2
"""int8 must be so many times faster than fp32 to be chosen: it rounds, and runs one utterance at a time."""


def silent(step: str, share: float) -> None:
    """Tell nobody."""


def build_engine(
    bundle: Bundle,
    target: str,
    out: Path,
    threads: int = 0,
    progress: Progress = silent,
    if_needed: bool = False,
    gpu: int = 0,
    tensorrt: TensorRtConfig = TENSORRT_AS_USUAL,
) -> Manifest:
    """Write the engine of a bundle into `out`, replacing what is there in one step; return its manifest.

    `target`: an engine by name; `onnx`, which builds both of onnxruntime's, measures, and keeps one; or `auto`, see
    resolved(). `if_needed`: keep what is there if it fits. Raises EngineError where the weights cannot be taken apart,
    or the machine is not fit for it, BundleError where a file is damaged.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            wanted = resolved(target, gpu)
            if if_needed and (fitting := existing(bundle, out, wanted, gpu, tensorrt)) is not None:
                return fitting
            for abandoned in out.glob(f"{PREFIX}*"):  # nobody else builds here: it was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=PREFIX, dir=out) as folder:
                if wanted == TENSORRT:
                    chosen = build_plans(bundle, Path(folder), out / CACHE, threads, gpu, tensorrt, progress)
                    why = "TensorRT and a GPU are here" if target == AUTO else f"{target} was asked for"
                    times: Mapping[str, float] = {}
                else:
                    chosen, why, times = _build(bundle, wanted, Path(folder), threads, progress)
                progress("done", 1.0)
                return _install(bundle, target, chosen, out, why, threads, times)
    except UnknownGraphError as error:
        raise EngineError(
            f"{bundle.graph}: not a Paraformer that can be taken apart ({error}); it runs whole, without an engine"
        ) from error
    except OSError as error:
        raise EngineError(f"{out}: cannot write the engine there ({error}); name another folder with --out") from error


def _build(
    bundle: Bundle, target: str, folder: Path, threads: int, progress: Progress
) -> tuple[Proven, str, Mapping[str, float]]:
    """Write onnxruntime's engines; return the one to keep, why, and what each takes in milliseconds."""
    signed = trial.multiplies_signed_exactly()
    engines = (INT8, FP32) if target == ONNX else (target,)
    proven: list[Proven] = []
    refused: dict[str, UnknownGraphError] = {}
    for number, engine in enumerate(engines):
        steps = Steps(progress, engine, number / len(engines), (number + 1) / len(engines))
        try:
            candidate = write(bundle, engine, folder, signed, steps)
            proven.append(prove(bundle, candidate, threads, steps, timed=target == ONNX))
        except UnknownGraphError as error:
            refused[engine] = error
    if not proven:
        raise next(iter(refused.values()))
    chosen, why = _choose(target, proven, refused)
    return chosen, why, {one.candidate.engine: one.ms for one in proven if one.ms}


def _choose(target: str, proven: Sequence[Proven], refused: Mapping[str, UnknownGraphError]) -> tuple[Proven, str]:
    """Return the engine to keep, and why."""
    if target != ONNX:
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
    bundle: Bundle, target: str, proven: Proven, out: Path, why: str, threads: int, times: Mapping[str, float]
) -> Manifest:
    """Move the files into place, then the manifest that names them, and clear the rest."""
    candidate = proven.candidate
    files = [path.replace(out / path.name) for path in candidate.files]
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
        metadata=candidate.metadata,
        self_test=candidate.self_test,
        plan=candidate.plan,
    )
    write_manifest(out, manifest)
    for path in out.iterdir():
        if OURS.fullmatch(path.name) and path.name not in manifest.files:
            path.unlink()
    return manifest
