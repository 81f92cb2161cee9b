"""What the `models` commands do: the catalogue and the store, with words around them."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edge_asr.audio.decode import read
from edge_asr.catalogue import BUNDLED, CATALOGUE, HUGGING_FACE, Entry, Source
from edge_asr.config import Config, EngineConfig, models_dir, pulled_last
from edge_asr.errors import BundleError, ConfigError, EdgeAsrError, EngineError
from edge_asr.loader import Recognizer, engine_folder, existing, load_engine, load_whole, processor_target
from edge_asr.models.download import fetch
from edge_asr.models.progress import Progress, megabytes, shown
from edge_asr.models.store import Fetch, Store, copy, difference, find_in, recordings
from edge_asr.recognizer.bundle import FP32, Bundle, read_bundle
from edge_asr.recognizer.manifest import ONNX, TENSORRT
from edge_asr.recognizer.model_config import ModelConfig
from edge_asr.recognizer.onnx_network import ONNX_CUDA


def show_list(config: Config, json_lines: bool) -> None:
    """Print the catalogue; the model that `model: null` means is marked."""
    store, default = _store(config), pulled_last(models_dir(config.state_dir)) or BUNDLED.name
    for entry in CATALOGUE.values():
        described = _describe(entry, store, default)
        print(json.dumps(described, ensure_ascii=False) if json_lines else _row(entry, described))
    if not json_lines:
        print(f"\n*: what `model: null` means. Pulled models lie in {models_dir(config.state_dir)}")


def pull(config: Config, name: str, hub: str | None, folder: Path | None, *, accepted: bool, default: bool) -> None:
    """Pull a model from a folder, the mirror or the hubs, after its licence was accepted. Raises EdgeAsrError."""
    entry, store = _entry(name), _store(config)
    if entry is BUNDLED:
        raise ConfigError(f"{name} comes with the repository and cannot be pulled; name another: {_pullable()}")
    sources = _sources(entry, config.models.mirror, hub)
    root = None if folder is None else find_in(folder, entry)
    if not store.is_here(entry) and not store.is_begun(entry):
        _ask_licence(entry, accepted)
    with shown() as progress:
        take = _fetch_from(sources, progress) if root is None else _copy_from(root, progress)
        store.pull(entry, take, progress, default)
    print(f"{name}: verified, in {store.folder_of(entry)}{'; the model from now on' if default else ''}")


def verify(config: Config, names: Sequence[str], json_lines: bool) -> EdgeAsrError | None:
    """Verify the named models, or all that are here, and their engines; print how each is, return the first error."""
    store, failed = _store(config), None
    entries = [_entry(name) for name in names] or [entry for entry in CATALOGUE.values() if store.is_here(entry)]
    for entry in entries:
        error: EdgeAsrError | None = None
        try:
            store.verify(entry)
            _verify_engines(config, entry, store.folder_of(entry))
        except EdgeAsrError as caught:
            error = caught
        failed = failed or error
        _print_verdict(entry, store.folder_of(entry), error, json_lines)
    return failed


def remove(config: Config, name: str) -> None:
    """Delete a pulled model, and the engines that were built of it. Raises EdgeAsrError."""
    entry, store = _entry(name), _store(config)
    store.remove(entry, _engines_of(entry, store, config.state_dir))
    print(f"{name}: removed")


def _store(config: Config) -> Store:
    return Store(models_dir(config.state_dir), partial(transcribe_recordings, config.engine.threads))


def transcribe_recordings(threads: int, folder: Path, sounds: Sequence[Path]) -> list[str]:
    """Return the texts of recordings by the bundle in `folder`. Raises BundleError, EngineError, AudioError."""
    return _texts(load_whole(read_bundle(folder), threads), sounds)


def _texts(recognizer: Recognizer, sounds: Sequence[Path]) -> list[str]:
    """Return the texts of recordings, and release the recogniser."""
    try:
        return [recognizer.recognize(read(sound)).text for sound in sounds]
    finally:
        recognizer.close()


def _verify_engines(config: Config, entry: Entry, folder: Path) -> None:
    """Raise EngineError where an engine of the model in `folder` does not give its published texts.

    They are what `run` and `transcribe` use. Where there is none that fits, they would build one; this does not.
    """
    bundle, engine = read_bundle(folder), config.engine
    targets = {ONNX: processor_target(engine), TENSORRT: TENSORRT, ONNX_CUDA: FP32}
    places = {engine_folder(bundle, config.state_dir, key): target for key, target in targets.items()}
    for place, target in places.items() if engine.dir is None else [(engine.dir, engine.target)]:
        if existing(bundle, place, target, engine.gpu, engine.tensorrt) is not None:
            _verify_engine(entry, bundle, place, engine.model_copy(update={"target": target}))


def _verify_engine(entry: Entry, bundle: Bundle, place: Path, config: EngineConfig) -> None:
    try:
        wrong = difference(entry, _texts(load_engine(bundle, place, config), recordings(entry, bundle.folder)))
    except (BundleError, EngineError) as error:
        wrong = str(error)
    if wrong:
        raise EngineError(f"{place}: the engine: {wrong}; run: edge-asr build-engine --model {entry.name}")


def _engines_of(entry: Entry, store: Store, state_dir: Path) -> list[Path]:
    """Return where the engines of a model lie, whatever is left of the model: what is damaged is removed, too."""
    bundle = Bundle(entry.name, store.folder_of(entry), {}, ModelConfig(), (), None, {})
    return [engine_folder(bundle, state_dir, target) for target in (ONNX, TENSORRT, ONNX_CUDA)]


def _entry(name: str) -> Entry:
    if name in CATALOGUE:
        return CATALOGUE[name]
    nearest = difflib.get_close_matches(name, CATALOGUE, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(CATALOGUE)}"
    raise ConfigError(f"{name}: no such model in the catalogue; {remedy}")


def _pullable() -> str:
    return ", ".join(entry.name for entry in CATALOGUE.values() if entry.sources)


def _sources(entry: Entry, mirror: str | None, hub: str | None) -> tuple[Source, ...]:
    """Return where to pull from: one hub, the mirror where there is one, or all hubs."""
    if hub is None:
        return _hubs(entry) if mirror is None else (Source("mirror", f"{mirror}/{entry.name}"),)
    if found := tuple(source for source in _hubs(entry) if source.name == hub):
        return found
    raise ConfigError(
        f"--source {hub}: does not have {entry.name}; known: {', '.join(source.name for source in entry.sources)}"
    )


def _hubs(entry: Entry) -> tuple[Source, ...]:
    """Return the catalogue's sources, Hugging Face's by the address that its own tools go by."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUGGING_FACE
    return tuple(Source(source.name, source.base.replace(HUGGING_FACE, endpoint)) for source in entry.sources)


def _fetch_from(sources: Sequence[Source], progress: Progress) -> Fetch:
    return lambda file, folder: fetch(file, folder, sources, progress)


def _copy_from(root: Path, progress: Progress) -> Fetch:
    return lambda file, folder: copy(file, root, folder, progress)


def _ask_licence(entry: Entry, accepted: bool) -> None:
    """Show the licence; raise ConfigError where it is not accepted."""
    lines = [f"{entry.name} ({entry.published}), {_size(entry)}; by using it you accept"]
    lines += [f"  {licence.name}, {licence.url}" for licence in entry.licences]
    if sys.stderr is not None:
        print(*lines, sep="\n", file=sys.stderr)
    if accepted:
        return
    if sys.stdin is None or sys.stderr is None or not sys.stdin.isatty():
        raise ConfigError(f"{entry.name}: nobody here to accept its licence; read it and add --accept-licence")
    print("Accept? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError(f"{entry.name}: licence not accepted, nothing was pulled")


def _describe(entry: Entry, store: Store, default: str) -> dict[str, Any]:
    return {
        "name": entry.name,
        "about": entry.about,
        "here": store.is_here(entry),
        "begun": store.is_begun(entry),
        "default": entry.name == default,
        "folder": str(store.folder_of(entry)),
        "bytes": entry.size,
        "licences": [{"name": licence.name, "url": licence.url} for licence in entry.licences],
        "sources": [{"name": source.name, "base": source.base} for source in entry.sources],
        "files": [{"path": file.path, "bytes": file.size, "sha256": file.sha256} for file in entry.files],
    }


def _row(entry: Entry, described: dict[str, Any]) -> str:
    where = "here" if described["here"] else "begun" if described["begun"] else "-"
    hubs = ", ".join(source.name for source in entry.sources) or "bundled"
    mark = "*" if described["default"] else " "
    terms = "; ".join(licence.name for licence in entry.licences)
    first = f"{mark} {entry.name:<23} {where:<6} {_size(entry):>12}  {hubs}"
    return f"{first}\n    {entry.about}\n    {terms}"


def _size(entry: Entry) -> str:
    return "size unknown" if entry.size is None else megabytes(entry.size)


def _print_verdict(entry: Entry, folder: Path, error: EdgeAsrError | None, json_lines: bool) -> None:
    if json_lines:
        verdict = {"name": entry.name, "ok": error is None, "folder": str(folder), "error": error and str(error)}
        print(json.dumps(verdict, ensure_ascii=False))
    elif error is None:
        print(f"{entry.name}: verified")
    else:
        print(*(f"{entry.name}: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
