"""From a bundle to a loaded recogniser: its engine, built once where there is none yet, or else the published graph."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from edge_asr.config import EngineConfig
from edge_asr.config_reader import ENV_PREFIX
from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer.bundle import CHECKPOINT, Bundle
from edge_asr.recognizer.manifest import ONNX, REMEDY, TENSORRT, Manifest, check_files, read_manifest, sha256_of, unfit
from edge_asr.recognizer.manifest import existing as existing  # who asks for an engine here finds all about it here
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.whole import WholeParaformer

log = logging.getLogger(__name__)

Recognizer = Paraformer | WholeParaformer

COMPLAINT = "edge-asr: "
"""What a line of build-engine that is meant for the user begins with."""
KILL_AFTER_S = 0.5
"""So long a child that is to end may take."""


class EngineBuild:
    """The child that builds an engine. Whoever waits for it on another thread may end it."""

    def __init__(self, begins: Callable[[], None] = lambda: None) -> None:
        """`begins` is called, on the thread that loads, when there is an engine to build."""
        self.cancelled = False
        self._begins = begins
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def run(self, bundle: Bundle, folder: Path, config: EngineConfig) -> None:
        """Build in a process of its own, so that ours does not keep the memory it takes. Raises EngineError."""
        with self._start(_command(bundle, folder, config)) as child:
            try:
                _, said = child.communicate()
            finally:
                _end(child)  # at Ctrl-C it is still at work
        if child.returncode:
            raise EngineError(_reason(child.returncode, said or ""))

    def cancel(self) -> None:
        """End the child, if there is one, and let none be started from now on."""
        with self._lock:
            self.cancelled = True
        if self._child is not None:
            _end(self._child)

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        # Whoever sits at a terminal sees the progress; otherwise only what went wrong is of interest.
        errors = None if sys.stderr is not None and sys.stderr.isatty() else subprocess.PIPE
        with self._lock:  # after cancel() nothing begins
            if self.cancelled:
                raise EngineError("the building of the engine was cancelled")
            self._begins()
            try:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                    text=True, errors="replace", env=_environment(),
                )  # fmt: skip
            except OSError as error:
                raise EngineError(f"build-engine cannot be started ({error})") from error
            return self._child


def load_recognizer(
    bundle: Bundle, config: EngineConfig, state_dir: Path, build: EngineBuild | None = None
) -> Recognizer:
    """Load the engine of a bundle, building it first where it is missing or does not fit any more.

    What cannot be taken apart, or built here, runs whole, with a warning. `build`: for whoever may want to end it.
    Raises BundleError or EngineError.
    """
    if config.dir is not None:
        return load_engine(bundle, config.dir, config)
    build = build or EngineBuild()
    try:
        return _load_or_build(bundle, engine_folder(bundle, state_dir), config, build)
    except EngineError as error:
        if build.cancelled or bundle.kind == CHECKPOINT:  # nobody waits, or nothing could run whole
            raise
        why = error
    # Only once it runs is there anything to warn of: what is damaged is told in one line.
    recognizer = load_whole(bundle, config.threads)
    log.warning("%s: no engine, its graph runs whole, slower and without times of tokens: %s", bundle.name, why)
    return recognizer


def load_engine(bundle: Bundle, folder: Path, config: EngineConfig) -> Paraformer:
    """Load the engine in `folder`. Raises EngineError where it is missing, damaged, or does not fit."""
    manifest = _fitting(bundle, folder, config.target)
    try:
        return _load(bundle, folder, manifest, config.threads)
    except EngineError:
        # Another build may have put its own files in place meanwhile, and cleared away those of this manifest.
        newer = _fitting(bundle, folder, config.target)
        if newer == manifest:
            raise
    return _load(bundle, folder, newer, config.threads)


def load_whole(bundle: Bundle, threads: int) -> WholeParaformer:
    """Load the published graph as it is. Raises BundleError or EngineError."""
    return WholeParaformer(bundle, OnnxNetwork(bundle.graph, threads), bundle.kind)


def engine_folder(bundle: Bundle, state_dir: Path, target: str = ONNX) -> Path:
    """Return where the engine of a bundle lies unless configured: a folder for each place that bundles lie in.

    TensorRT's has one of its own, for onnxruntime's serves while it is built, and where it cannot run.
    """
    place = hashlib.sha256(str(bundle.folder.resolve()).encode(errors="surrogateescape")).hexdigest()
    suffix = f"-{target}" if target == TENSORRT else ""
    return state_dir / "engines" / f"{bundle.name}-{place[:8]}{suffix}"


class _UnfitError(EngineError):
    """There is no engine, or it does not fit."""

    def __init__(self, text: str, why: str) -> None:
        """`why` it does not fit, without the remedy; empty where there is none."""
        super().__init__(text)
        self.why = why


def _fitting(bundle: Bundle, folder: Path, target: str) -> Manifest:
    """Return the manifest of the engine in `folder`. Raises EngineError where there is none that fits."""
    manifest = read_manifest(folder)
    build = f"edge-asr build-engine --model {bundle.folder} --out"
    if manifest is None:
        raise _UnfitError(f"{folder}: holds no engine; run {build} {folder}", "")
    why = unfit(manifest, bundle, target)
    if why and _is_of_another_model(manifest, bundle):
        why = f"it was built of {manifest.model}, not of {bundle.name}"
        # Built there, it would replace an engine that somebody else uses.
        raise _UnfitError(f"{folder}: does not fit: {why}; name its own engine's folder, or run {build} DIR first", why)
    if why:
        raise _UnfitError(f"{folder}: does not fit: {why}; run {build} {folder}", why)
    return manifest


def _is_of_another_model(manifest: Manifest, bundle: Bundle) -> bool:
    """True where neither the name nor the file that the engine was built of is the bundle's: a copy may be renamed."""
    path = bundle.folder / manifest.source.name
    return manifest.model != bundle.name and not (path.is_file() and sha256_of(path) == manifest.source.sha256)


def _load(bundle: Bundle, folder: Path, manifest: Manifest, threads: int) -> Paraformer:
    check_files(folder, manifest)
    encoder, decoder = (_network(folder / name, threads) for name in (manifest.encoder, manifest.decoder))
    return Paraformer(bundle, encoder, decoder, manifest.engine)


def _network(path: Path, threads: int) -> OnnxNetwork:
    """Load a network of an engine. Raises EngineError: the bundle is not to blame for what we wrote."""
    try:
        return OnnxNetwork(path, threads)
    except BundleError as error:
        raise EngineError(f"{str(error).replace('; copy the bundle again', '')}; {REMEDY}") from error


def _load_or_build(bundle: Bundle, folder: Path, config: EngineConfig, build: EngineBuild) -> Paraformer:
    """Load the engine in `folder`; build it first where there is none that fits and is undamaged."""
    try:
        return load_engine(bundle, folder, config)
    except EngineError as error:
        why = error.why if isinstance(error, _UnfitError) else str(error).removesuffix(f"; {REMEDY}")
    reason = f": {why}" if why else ""
    log.info("building the engine of %s, once for this machine, in %s%s", bundle.name, folder, reason)
    build.run(bundle, folder, config)
    return load_engine(bundle, folder, config)


def _command(bundle: Bundle, folder: Path, config: EngineConfig) -> list[str]:
    # `-m edge_asr` would import from the working directory first, -P exists from Python 3.11 on only, and -I forgets
    # PYTHONPATH. With our own sys.path the child imports what we would, and relative paths keep their meaning.
    code = f"import sys; sys.path[:] = {sys.path!a}; from edge_asr.cli import main; main()"
    # A folder that is called like a model of the catalogue must not be taken for that model.
    places = ["--model", str(bundle.folder.absolute()), "--out", str(folder.absolute())]
    # Another process may be building the same engine: then this one waits, and takes that.
    options = ["--target", config.target, "--if-needed", "-o", f"engine.threads={config.threads}"]
    return [sys.executable, "-c", code, "build-engine", *places, *options]


def _environment() -> dict[str, str]:
    """Return ours without the configuration in it, which may make no sense without the file that it refines."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}


def _end(child: subprocess.Popen[str]) -> None:
    """End a child that may have ended by itself."""
    child.terminate()
    try:
        child.wait(KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _reason(code: int, said: str) -> str:
    """Return why the child failed: its last line for the user, or how it ended."""
    complaints = [line for line in said.splitlines() if line.startswith(COMPLAINT)]
    if complaints:
        return complaints[-1].removeprefix(COMPLAINT)
    if code > 0:
        return f"build-engine ended with {code}"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    return f"build-engine was killed by {name}{': out of memory?' if name == 'SIGKILL' else ''}"
