"""From a bundle to a loaded recogniser: its engine, built once where there is none yet, or else the published graph."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from pathlib import Path

from edge_asr.config import EngineConfig
from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import CHECKPOINT, Bundle
from edge_asr.recognizer.manifest import Manifest, check_files, read_manifest, unfit
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.whole import WholeParaformer

log = logging.getLogger(__name__)

Recognizer = Paraformer | WholeParaformer


def load_recognizer(bundle: Bundle, config: EngineConfig, state_dir: Path) -> Recognizer:
    """Load the engine of a bundle, building it first where it is missing or does not fit any more.

    What cannot be taken apart, or built here, runs whole, with a warning. Raises BundleError or EngineError.
    """
    if config.dir is not None:
        return load_engine(bundle, config.dir, config)
    try:
        return _load_or_build(bundle, engine_folder(bundle, state_dir), config)
    except EngineError as error:
        if bundle.kind == CHECKPOINT:  # nothing that could run whole
            raise
        why = error
    # Only once it runs is there anything to warn of: what is damaged is told in one line.
    recognizer = load_whole(bundle, config.threads)
    log.warning("%s: no engine, its graph runs whole, slower and without times of tokens: %s", bundle.name, why)
    return recognizer


def load_engine(bundle: Bundle, folder: Path, config: EngineConfig) -> Paraformer:
    """Load the engine in `folder`. Raises EngineError where it is missing, damaged, or does not fit."""
    manifest = read_manifest(folder)
    if manifest is None or (why := unfit(manifest, bundle, config.target)):
        reason = "holds no engine" if manifest is None else f"does not fit: {why}"
        raise EngineError(f"{folder}: {reason}; run edge-asr build-engine --model {bundle.folder} --out {folder}")
    check_files(folder, manifest)
    encoder, decoder = (OnnxNetwork(folder / name, config.threads) for name in (manifest.encoder, manifest.decoder))
    return Paraformer(bundle, encoder, decoder, manifest.engine)


def load_whole(bundle: Bundle, threads: int) -> WholeParaformer:
    """Load the published graph as it is. Raises BundleError or EngineError."""
    return WholeParaformer(bundle, OnnxNetwork(bundle.graph, threads), bundle.kind)


def engine_folder(bundle: Bundle, state_dir: Path) -> Path:
    """Return where the engine of a bundle lies unless configured: a folder for each place that bundles lie in."""
    place = hashlib.sha256(str(bundle.folder.resolve()).encode(errors="surrogateescape")).hexdigest()
    return state_dir / "engines" / f"{bundle.name}-{place[:8]}"


def existing(bundle: Bundle, folder: Path, target: str) -> Manifest | None:
    """Return the manifest of an engine in `folder` that fits; None where there is none, or it is damaged or stale."""
    try:
        manifest = read_manifest(folder)
        if manifest is None or unfit(manifest, bundle, target):
            return None
        check_files(folder, manifest)
    except EngineError:
        return None
    return manifest


def _load_or_build(bundle: Bundle, folder: Path, config: EngineConfig) -> Paraformer:
    """Load the engine in `folder`; build it first where there is none that fits and is undamaged."""
    try:
        return load_engine(bundle, folder, config)
    except EngineError as error:
        log.debug("%s", error)
        _build(bundle, folder, config)
    return load_engine(bundle, folder, config)


def _build(bundle: Bundle, folder: Path, config: EngineConfig) -> None:
    """Build in a process of its own, so that ours does not keep the memory it takes. Raises EngineError."""
    log.info("building the engine of %s, once for this machine, in %s", bundle.name, folder)
    # A folder that is called like a model of the catalogue must not be taken for that model.
    places = ["--model", str(bundle.folder.absolute()), "--out", str(folder.absolute())]
    command = [sys.executable, "-m", "edge_asr", "build-engine", *places]
    command += ["--target", config.target, "-o", f"engine.threads={config.threads}"]
    # Whoever sits at a terminal sees the progress; otherwise only what went wrong is of interest.
    watched = sys.stderr is not None and sys.stderr.isatty()
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=None if watched else subprocess.PIPE,
            text=True, errors="replace", check=False,
        )  # fmt: skip
    except OSError as error:
        raise EngineError(f"build-engine cannot be started ({error})") from error
    if done.returncode:
        said = (done.stderr or "").strip().splitlines()
        raise EngineError(said[-1].removeprefix("edge-asr: ") if said else f"build-engine ended with {done.returncode}")
