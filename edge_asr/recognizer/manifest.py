"""The manifest of an engine: what it was made of, for which machine, and the hashes of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import Bundle
from edge_asr.recognizer.onnx_network import runtime_version

FILE = "manifest.json"
SCHEMA = "edge_asr.engine/2"
"""Its number grows whenever the networks are written differently: an engine of another number is built again."""
REMEDY = "run edge-asr build-engine again"
HASH_BLOCK = 1 << 20


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
class Manifest:
    """What `build-engine` writes beside the networks."""

    engine: str
    """`onnx-int8` or `onnx-fp32`."""
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
    schema: str = SCHEMA


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest in `folder`, None where there is none; raises EngineError where it is damaged or foreign."""
    path = folder / FILE
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        if loaded["schema"] != SCHEMA:
            raise EngineError(f"{path}: of another version of edge_asr ({loaded['schema']}); {REMEDY}")
        source = Source(**loaded["source"])
        files = {name: FileRecord(**record) for name, record in loaded["files"].items()}
        manifest = Manifest(**{**loaded, "source": source, "files": files})
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
    for name in (manifest.encoder, manifest.decoder):
        if name not in manifest.files:
            raise ValueError(f"{name!r} is not among its files")


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Put the manifest in place in one step: readers see the old engine or the new one, nothing between."""
    path, draft = folder / FILE, folder / f".{FILE}.{os.getpid()}"
    text = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False)
    with draft.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return path


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


def unfit(manifest: Manifest, bundle: Bundle, target: str = "auto") -> str | None:
    """Return why an engine does not fit bundle, target and machine; None where it does."""
    if target not in ("auto", manifest.engine):
        return f"it is {manifest.engine}, {target} is wanted"
    if manifest.machine != this_machine():
        return f"it was built for {manifest.machine}, this is {this_machine()}"
    if manifest.versions.get("onnxruntime") != runtime_version():
        return f"it was measured with onnxruntime {manifest.versions.get('onnxruntime')}, this is {runtime_version()}"
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
