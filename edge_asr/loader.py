"""From a bundle to a loaded recogniser: an engine, built once where there is none yet, or else the published graph."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path

from edge_asr.child import EngineBuild
from edge_asr.config import EngineConfig
from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer import self_test
from edge_asr.recognizer.bundle import CHECKPOINT, FP32, Bundle
from edge_asr.recognizer.manifest import (
    AUTO,
    ONNX,
    REMEDY,
    TENSORRT,
    Manifest,
    check_files,
    read_manifest,
    sha256_of,
    unfit,
)
from edge_asr.recognizer.manifest import existing as existing  # who asks for an engine here finds all about it here
from edge_asr.recognizer.network import Network
from edge_asr.recognizer.onnx_network import ONNX_CUDA, CudaOptions, OnnxNetwork
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.tensorrt_network import TensorRtOptions, load_networks, unavailable
from edge_asr.recognizer.whole import WholeParaformer

log = logging.getLogger(__name__)

Recognizer = Paraformer | WholeParaformer


def load_recognizer(
    bundle: Bundle, config: EngineConfig, state_dir: Path, build: EngineBuild | None = None
) -> Recognizer:
    """Load the engine of a bundle for the processor, building it first where it is missing or does not fit any more.

    What cannot be taken apart, or built here, runs whole, with a warning, unless `config.strict`. `build`: for whoever
    may want to end it. Raises BundleError or EngineError.
    """
    if config.dir is not None:
        return load_engine(bundle, config.dir, config)
    build = build or EngineBuild()
    config = config.model_copy(update={"target": processor_target(config)})
    try:
        return _load_or_build(bundle, engine_folder(bundle, state_dir), config, build)
    except EngineError as error:
        if build.cancelled or bundle.kind == CHECKPOINT or config.strict:  # nobody waits, or nothing could run whole
            raise
        why = error
    # Only once it runs is there anything to warn of: what is damaged is told in one line.
    recognizer = load_whole(bundle, config.threads)
    log.warning("%s: no engine, its graph runs whole, slower and without times of tokens: %s", bundle.name, why)
    return recognizer


def load_on_cuda(bundle: Bundle, config: EngineConfig, state_dir: Path, build: EngineBuild | None = None) -> Paraformer:
    """Load the fp32 engine of a bundle on onnxruntime's CUDA provider, building it first where there is none that fits.

    Raises BundleError or EngineError.
    """
    config = config.model_copy(update={"target": FP32})
    cuda = CudaOptions(
        gpu=config.gpu,
        memory_limit_mb=config.cuda.memory_limit_mb,
        arena=config.cuda.arena,
        search=config.cuda.search,
        graphs=config.cuda.cuda_graphs,
    )
    if config.dir is not None:
        return load_engine(bundle, config.dir, config, cuda)
    folder = engine_folder(bundle, state_dir)
    if existing(bundle, folder, FP32) is None:  # int8, as a rule: it has no kernels for GPUs
        folder = engine_folder(bundle, state_dir, ONNX_CUDA)
        if existing(bundle, folder, FP32) is None:
            _build(bundle, folder, config, build or EngineBuild(), "the processor's is of no use to a GPU")
    return load_engine(bundle, folder, config, cuda)


def load_engine(bundle: Bundle, folder: Path, config: EngineConfig, cuda: CudaOptions | None = None) -> Paraformer:
    """Load the engine in `folder`, with `cuda` on that provider; one of TensorRT must pass its self-test.

    Raises EngineError where it is missing, damaged, or does not fit; BundleError where the bundle is to blame.
    """
    manifest = _fitting(bundle, folder, config)
    try:
        return _load(bundle, folder, manifest, config, cuda)
    except EngineError:
        # Another build may have put its own files in place meanwhile, and cleared away those of this manifest.
        newer = _fitting(bundle, folder, config)
        if newer == manifest:
            raise
    return _load(bundle, folder, newer, config, cuda)


def load_whole(bundle: Bundle, threads: int) -> WholeParaformer:
    """Load the published graph as it is. Raises BundleError or EngineError."""
    return WholeParaformer(bundle, OnnxNetwork(bundle.graph, threads), bundle.kind)


def engine_folder(bundle: Bundle, state_dir: Path, target: str = ONNX) -> Path:
    """Return where the engine of a bundle lies unless configured: a folder for each place that bundles lie in.

    Those for a GPU have one of their own, for the processor's serves while they are built, and where they cannot run.
    """
    place = hashlib.sha256(str(bundle.folder.resolve()).encode(errors="surrogateescape")).hexdigest()
    suffix = f"-{target}" if target in (TENSORRT, ONNX_CUDA) else ""
    return state_dir / "engines" / f"{bundle.name}-{place[:8]}{suffix}"


def processor_target(config: EngineConfig) -> str:
    """Return what is built for the processor: what is wanted, unless that needs a GPU."""
    return ONNX if config.target in (AUTO, TENSORRT) else config.target


class UnfitError(EngineError):
    """There is no engine, or it does not fit."""

    def __init__(self, text: str, why: str) -> None:
        """`why` it does not fit, without the remedy; empty where there is none."""
        super().__init__(text)
        self.why = why


def _fitting(bundle: Bundle, folder: Path, config: EngineConfig) -> Manifest:
    """Return the manifest of the engine in `folder`. Raises EngineError where there is none that fits."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest.engine == TENSORRT and (lack := unavailable(config.gpu)):
        raise EngineError(f"{folder}: {lack}")
    build = f"edge-asr build-engine --model {bundle.folder} --out"
    if manifest is None:
        raise UnfitError(f"{folder}: holds no engine; run {build} {folder}", "")
    why = unfit(manifest, bundle, config.target, config.gpu, config.tensorrt)
    if why and _is_of_another_model(manifest, bundle):
        why = f"it was built of {manifest.model}, not of {bundle.name}"
        # Built there, it would replace an engine that somebody else uses.
        raise UnfitError(f"{folder}: does not fit: {why}; name its own engine's folder, or run {build} DIR first", why)
    if why:
        raise UnfitError(f"{folder}: does not fit: {why}; run {build} {folder}", why)
    return manifest


def _is_of_another_model(manifest: Manifest, bundle: Bundle) -> bool:
    """True where neither the name nor the file that the engine was built of is the bundle's: a copy may be renamed."""
    path = bundle.folder / manifest.source.name
    return manifest.model != bundle.name and not (path.is_file() and sha256_of(path) == manifest.source.sha256)


def _load(
    bundle: Bundle, folder: Path, manifest: Manifest, config: EngineConfig, cuda: CudaOptions | None
) -> Paraformer:
    check_files(folder, manifest)
    engine = manifest.engine if cuda is None else ONNX_CUDA
    with contextlib.ExitStack() as undo:
        networks = _networks(folder, manifest, config, cuda)
        for network in networks:
            undo.callback(network.close)
        recognizer = Paraformer(bundle, *networks, engine=engine)
        if engine == TENSORRT and manifest.self_test is not None:
            self_test.check(recognizer, folder, manifest.self_test)
        undo.pop_all()
    return recognizer


def _networks(
    folder: Path, manifest: Manifest, config: EngineConfig, cuda: CudaOptions | None
) -> tuple[Network, Network]:
    encoder, decoder = folder / manifest.encoder, folder / manifest.decoder
    if manifest.engine == TENSORRT:
        settings = config.tensorrt
        options = TensorRtOptions(config.gpu, settings.cuda_graphs, settings.mapped_memory)
        return load_networks(encoder, decoder, manifest.metadata, options)
    return _network(encoder, config.threads, cuda), _network(decoder, config.threads, cuda)


def _network(path: Path, threads: int, cuda: CudaOptions | None) -> OnnxNetwork:
    """Load a network of an engine. Raises EngineError: the bundle is not to blame for what we wrote."""
    try:
        return OnnxNetwork(path, threads, cuda)
    except BundleError as error:
        raise EngineError(f"{str(error).replace('; copy the bundle again', '')}; {REMEDY}") from error


def _load_or_build(bundle: Bundle, folder: Path, config: EngineConfig, build: EngineBuild) -> Paraformer:
    """Load the engine in `folder`; build it first where there is none that fits and is undamaged."""
    try:
        return load_engine(bundle, folder, config)
    except EngineError as error:
        why = error.why if isinstance(error, UnfitError) else str(error).removesuffix(f"; {REMEDY}")
    _build(bundle, folder, config, build, why)
    return load_engine(bundle, folder, config)


def _build(bundle: Bundle, folder: Path, config: EngineConfig, build: EngineBuild, why: str) -> None:
    reason = f": {why}" if why else ""
    log.info("building the engine of %s, once for this machine, in %s%s", bundle.name, folder, reason)
    build.run(bundle, folder, config)
