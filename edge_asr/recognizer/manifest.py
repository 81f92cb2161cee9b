"""The manifest of an engine: what it was made of, for which machine, and the hashes of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_asr.config import TensorRtConfig
from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import FP32, INT8, Bundle
from edge_asr.recognizer.onnx_network import runtime_version

AUTO = "auto"
"""The target that takes the best engine of a machine."""
ONNX = "onnx"
"""The target that takes the faster one of onnxruntime's two engines."""
TENSORRT = "tensorrt-fp16"
FILE = "manifest.json"
SCHEMA = "edge_asr.engine/3"
"""Its number grows whenever the networks are written differently: an engine of another number is built again."""
SEAL = "seal"
"""Key of a plan's manifest: the hash of all others, for a plan runs with numbers that stand nowhere else."""
REMEDY = "run edge-asr build-engine again"
HASH_BLOCK = 1 << 20
TENSORRT_AS_USUAL = TensorRtConfig()


@dataclass(frozen=True, slots=True)
class Source:
    """The file that an engine's weights came from."""

    name: str
    """Its name in the bundle."""
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of an engine is."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SelfTest:
    """A recording and what fp32 hears in it: an engine that hears something else is not to be trusted."""

    sound: str
    """Name of the WAV file beside the networks."""
    ids: Sequence[int]
    alpha_sum: float
    """Of all frames: about the number of tokens."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a plan of TensorRT was built with; it runs with nothing else."""

    tensorrt: str
    """Its version."""
    cuda: str
    gpu: str
    """Its name."""
    sm: str
    """Compute capability, such as `8.7`."""
    multiprocessors: int
    """Kernels are chosen for so many: every Orin is called so, whether it has 4 or 16 of them switched on."""
    memory_gb: int
    """All that the GPU has, rounded."""
    l4t: str | None
    """First line of /etc/nv_tegra_release; None where the machine is no Jetson."""
    typing: str
    """`strong` or `weak`."""
    softmax_fp16: bool
    accumulation: str
    """What products are added up in: `fp16` where that is left to TensorRT, `fp32` where it is told to."""
    scale: int
    """The power of two that the encoder's stream was divided by."""
    profiles: Mapping[str, Any]
    """The shapes of each network that the plan takes."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `build-engine` writes beside the networks."""

    engine: str
    """`onnx-int8`, `onnx-fp32` or `tensorrt-fp16`."""
    asked: str
    """The target that it was asked for, `auto` among them."""
    why: str
    """How the engine was chosen, for people."""
    model: str
    source: Source
    encoder: str
    """File name of the encoder network."""
    decoder: str
    files: Mapping[str, FileRecord]
    """All files by name: the networks, and the constants that lie beside them."""
    machine: str
    versions: Mapping[str, str]
    """Of edge_asr and onnxruntime."""
    config: Mapping[str, Any]
    """What the bundle's configuration said, for it is part of the networks."""
    threads: int
    """Of one inference, while it was measured."""
    compared_tokens: int
    """Tokens that were the same as the published graph's when the engine was built; 0 for a checkpoint."""
    measured_ms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What each candidate took for the same few seconds of audio; empty where a target was named."""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What the networks would say of themselves: a plan of TensorRT has no room for it."""
    self_test: SelfTest | None = None
    plan: Plan | None = None
    """None for onnxruntime's engines."""
    schema: str = SCHEMA


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest in `folder`, None where there is none; raises EngineError where it is damaged or foreign."""
    path = folder / FILE
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        if loaded["schema"] != SCHEMA:
            raise EngineError(f"{path}: of another version of edge_asr ({loaded['schema']}); {REMEDY}")
        seal = loaded.pop(SEAL, None)
        if loaded["plan"] is not None and seal != _seal(loaded):
            raise EngineError(f"{path}: damaged; {REMEDY}")
        source = Source(**loaded["source"])
        files = {name: FileRecord(**record) for name, record in loaded["files"].items()}
        self_test = None if loaded["self_test"] is None else SelfTest(**loaded["self_test"])
        plan = None if loaded["plan"] is None else Plan(**loaded["plan"])
        manifest = Manifest(**{**loaded, "source": source, "files": files, "self_test": self_test, "plan": plan})
        _check_names(manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(f"{path}: not a manifest ({error}); {REMEDY}") from error
    return manifest


def _check_names(manifest: Manifest) -> None:
    """Raise ValueError unless all names are of files in the folder itself, and the networks among those with a hash."""
    for name in (manifest.source.name, *manifest.files):
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not the name of a file")
    sounds = [] if manifest.self_test is None else [manifest.self_test.sound]
    for name in (manifest.encoder, manifest.decoder, *sounds):
        if name not in manifest.files:
            raise ValueError(f"{name!r} is not among its files")
    if (manifest.engine == TENSORRT) != (manifest.plan is not None):
        raise ValueError(f"it is {manifest.engine} with{'out' if manifest.plan is None else ''} a plan")


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Put the manifest in place in one step: readers see the old engine or the new one, nothing between."""
    path, draft = folder / FILE, folder / f".{FILE}.{os.getpid()}"
    content = dataclasses.asdict(manifest)
    if manifest.plan is not None:
        content[SEAL] = _seal(content)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with draft.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return path


def _seal(content: Mapping[str, Any]) -> str:
    """Return the hash of a manifest's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resolved(target: str, gpu: int) -> str:
    """Return what `auto` means here: `tensorrt-fp16` where there are TensorRT and a GPU, else `onnx`; or the target."""
    if target != AUTO:
        return target
    from edge_asr.recognizer.tensorrt_network import unavailable  # which needs us

    return TENSORRT if unavailable(gpu) is None else ONNX


def existing(
    bundle: Bundle, folder: Path, target: str, gpu: int = 0, tensorrt: TensorRtConfig = TENSORRT_AS_USUAL
) -> Manifest | None:
    """Return the manifest of an engine in `folder` that fits; None where there is none, or it is damaged or stale."""
    try:
        manifest = read_manifest(folder)
        if manifest is None or unfit(manifest, bundle, target, gpu, tensorrt):
            return None
        check_files(folder, manifest)
    except EngineError:
        return None
    return manifest


def unfit(
    manifest: Manifest,
    bundle: Bundle,
    target: str = AUTO,
    gpu: int = 0,
    tensorrt: TensorRtConfig = TENSORRT_AS_USUAL,
) -> str | None:
    """Return why an engine does not fit bundle, target and machine; None where it does.

    `gpu`, `tensorrt`: what a plan would run on, and with; engines of onnxruntime do not depend on it.
    """
    if target != AUTO and manifest.engine not in ((INT8, FP32) if target == ONNX else (target,)):
        return f"it is {manifest.engine}, {target} is wanted"
    why = _unfit_for_processor(manifest) if manifest.plan is None else _unfit_for_gpu(manifest.plan, gpu, tensorrt)
    if why:
        return why
    if dict(manifest.config) != dataclasses.asdict(bundle.config):
        return f"the configuration in {bundle.folder} has changed since"
    path = bundle.folder / manifest.source.name
    try:
        status = path.stat()
    except OSError:
        return f"{path}, of which it was built, is gone"
    if status.st_size != manifest.source.size:
        return f"{path} has changed since"
    # A copied bundle has new times; the hash tells whether it is the same.
    if status.st_mtime_ns != manifest.source.mtime_ns and sha256_of(path) != manifest.source.sha256:
        return f"{path} has changed since"
    return None


def _unfit_for_processor(manifest: Manifest) -> str | None:
    if manifest.machine != this_machine():
        return f"it was built for {manifest.machine}, this is {this_machine()}"
    if manifest.versions.get("onnxruntime") != runtime_version():
        return f"it was measured with onnxruntime {manifest.versions.get('onnxruntime')}, this is {runtime_version()}"
    return None


def _unfit_for_gpu(plan: Plan, gpu: int, tensorrt: TensorRtConfig) -> str | None:
    """Return why a plan does not fit the GPU, its software, or what is configured."""
    from edge_asr.recognizer.tensorrt_network import machine  # which needs us

    if plan.softmax_fp16 != tensorrt.softmax_fp16:
        return f"it was built with engine.tensorrt.softmax_fp16 {'on' if plan.softmax_fp16 else 'off'}"
    try:
        here = machine(gpu)
    except EngineError as error:
        return str(error)
    compared = {
        "TensorRT": (plan.tensorrt, here.tensorrt),
        "GPU": (plan.gpu, here.gpu),
        "compute capability": (plan.sm, here.sm),
        "multiprocessors": (plan.multiprocessors, here.multiprocessors),
        "memory in GB": (plan.memory_gb, here.memory_gb),
        "CUDA": (plan.cuda.partition(".")[0], here.cuda.partition(".")[0]),
        "L4T": (plan.l4t or "none", here.l4t or "none"),
    }
    for what, (then, now) in compared.items():
        if then != now:
            return f"it was built for {what} {then}, here is {now}"
    return None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise EngineError unless all files are what was written: a flipped bit would change words."""
    for name, record in manifest.files.items():
        path = folder / name
        try:
            same = describe_file(path) == record
        except OSError as error:
            raise EngineError(f"{path}: cannot be read ({error}); {REMEDY}") from error
        if not same:
            raise EngineError(f"{path}: damaged; {REMEDY}")


def describe_file(path: Path) -> FileRecord:
    """Return size and hash of a file."""
    return FileRecord(path.stat().st_size, sha256_of(path))


def describe_source(path: Path) -> Source:
    """Return name, size, time and hash of a bundle's file."""
    status = path.stat()
    return Source(path.name, status.st_size, status.st_mtime_ns, sha256_of(path))


def this_machine() -> str:
    """Return the processor's name: what is fast, and what 8-bit products are exact, depends on it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    known: Mapping[str, Any] = {"avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "asimddp": "dot product"}
    found = [label for flag, label in known.items() if flag in flags.split()]
    return ", ".join([platform.machine(), *names[:1], *found])


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
