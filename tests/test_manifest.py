"""The manifest of an engine: written and read, damaged, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from bundled import BUNDLE, engine_of

from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import FP32, INT8, Bundle, read_bundle
from edge_asr.recognizer.manifest import (
    FILE,
    SCHEMA,
    Manifest,
    check_files,
    read_manifest,
    sha256_of,
    this_machine,
    unfit,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An engine that may be damaged."""
    copy = tmp_path / "engine"
    shutil.copytree(engine_of(FP32), copy)
    return copy


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A copy of the bundle that the engine was built of."""
    copy = tmp_path / "a-model"
    shutil.copytree(BUNDLE, copy, ignore=shutil.ignore_patterns("samples", "README.md"), copy_function=shutil.copy2)
    return read_bundle(copy)


def known(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def change(folder: Path, **keys: Any) -> None:
    """Change keys of the file; None removes one."""
    content = {**json.loads((folder / FILE).read_text(encoding="utf-8")), **keys}
    text = json.dumps({key: value for key, value in content.items() if value is not None})
    (folder / FILE).write_text(text, encoding="utf-8")


def test_what_is_written_is_read_again(tmp_path: Path, folder: Path) -> None:
    manifest = known(folder)
    assert write_manifest(tmp_path, manifest) == tmp_path / FILE
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [FILE], "no draft is left"


def test_a_manifest_says_what_was_built_of_what_and_where(folder: Path) -> None:
    manifest = known(folder)
    assert (manifest.schema, manifest.engine, manifest.asked) == (SCHEMA, FP32, FP32)
    assert (manifest.model, manifest.source.name) == (BUNDLE.name, "model.onnx")
    assert manifest.source.sha256 == sha256_of(BUNDLE / "model.onnx")
    assert manifest.machine == this_machine()
    assert set(manifest.versions) == {"edge_asr", "onnxruntime"}
    assert {manifest.encoder, manifest.decoder} <= set(manifest.files)
    assert {path.name for path in folder.iterdir()} == {*manifest.files, FILE}
    for name, record in manifest.files.items():
        assert (record.size, record.sha256) == ((folder / name).stat().st_size, sha256_of(folder / name))


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = known(folder)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(folder, dataclasses.replace(before, why="another"))
    assert read_manifest(folder) == before


@pytest.mark.parametrize("place", ["nowhere", "manifest.json", ""], ids=["no folder", "a file", "an empty folder"])
def test_where_there_is_no_manifest_there_is_no_engine(tmp_path: Path, place: str) -> None:
    if place == FILE:
        (tmp_path / FILE).touch()
    assert read_manifest(tmp_path / place) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", "{}", f'{{"schema": "{SCHEMA}"}}', b"\xff\xfe", "[" * 100_000],
    ids=["empty", "no json", "list", "null", "number", "no keys", "schema only", "no text", "nested"],
)
def test_a_damaged_manifest_is_refused_in_a_line(folder: Path, text: str | bytes) -> None:
    (folder / FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(EngineError) as caught:
        read_manifest(folder)
    line = str(caught.value)
    assert line.startswith(f"{folder / FILE}: not a manifest (")
    assert line.endswith("run edge-asr build-engine again")
    assert "\n" not in line


@pytest.mark.parametrize(
    "keys",
    [
        {"encoder": None},
        {"machine": None},
        {"source": None},
        {"source": "model.onnx"},
        {"source": {"name": "model.onnx"}},
        {"files": None},
        {"files": []},
        {"files": {"encoder.onnx": 7}},
        {"files": {"encoder.onnx": {"size": 7}}},
        {"more": 7},
    ],
    ids=str,
)
def test_a_manifest_with_other_keys_is_refused(folder: Path, keys: dict[str, Any]) -> None:
    change(folder, **keys)
    with pytest.raises(EngineError, match=r"manifest\.json: not a manifest"):
        read_manifest(folder)


def test_a_manifest_of_another_version_is_refused(folder: Path) -> None:
    change(folder, schema="edge_asr.engine/99")
    with pytest.raises(EngineError, match=r"another version of edge_asr .*; run edge-asr build-engine"):
        read_manifest(folder)


# What fits


@pytest.mark.parametrize("target", ["auto", FP32])
def test_an_engine_fits_its_bundle_machine_and_target(folder: Path, bundle: Bundle, target: str) -> None:
    assert unfit(known(folder), bundle, target) is None


def test_an_engine_of_another_target_does_not_fit(folder: Path, bundle: Bundle) -> None:
    assert unfit(known(folder), bundle, INT8) == "it is onnx-fp32, onnx-int8 is wanted"


def test_an_engine_of_another_machine_does_not_fit(folder: Path, bundle: Bundle) -> None:
    foreign = dataclasses.replace(known(folder), machine="aarch64, Cortex-A78AE")
    assert unfit(foreign, bundle) == f"it was built for aarch64, Cortex-A78AE, this is {this_machine()}"


def test_an_engine_of_another_runtime_does_not_fit(folder: Path, bundle: Bundle) -> None:
    other = dataclasses.replace(known(folder), versions={"onnxruntime": "0.1"})
    assert re.fullmatch(r"it was measured with onnxruntime 0\.1, this is \d.*", unfit(other, bundle) or "")


def test_an_engine_of_another_configuration_of_the_model_does_not_fit(folder: Path, bundle: Bundle) -> None:
    other = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, tail=0.9))
    assert unfit(known(folder), other) == f"the configuration in {bundle.folder} has changed since"


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": None},
        {"encoder": "../encoder-012345678901.onnx"},
        {"decoder": "elsewhere.onnx"},
        {"files": {"../x.onnx": {"size": 1, "sha256": ""}}},
        {"source": {"name": "/etc/passwd", "size": 1, "mtime_ns": 1, "sha256": ""}},
    ],
    ids=["null", "above", "not listed", "a file elsewhere", "a source elsewhere"],
)
def test_a_manifest_names_files_of_its_own_folder_only(folder: Path, change: dict[str, Any]) -> None:
    path = folder / FILE
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(EngineError, match=r"manifest\.json: not a manifest \("):
        read_manifest(folder)


def test_new_times_of_the_same_file_change_nothing(folder: Path, bundle: Bundle) -> None:
    os.utime(bundle.graph, (1, 1))
    assert unfit(known(folder), bundle) is None


@pytest.mark.parametrize("size", [0, 1], ids=["of the same size", "longer"])
def test_an_engine_of_another_file_does_not_fit(folder: Path, bundle: Bundle, size: int) -> None:
    content = bytearray(bundle.graph.read_bytes())
    content[-100] ^= 1
    bundle.graph.write_bytes(bytes(content) + bytes(size))
    assert unfit(known(folder), bundle) == f"{bundle.graph} has changed since"


def test_an_engine_whose_file_is_gone_does_not_fit(folder: Path, bundle: Bundle) -> None:
    bundle.graph.unlink()
    assert unfit(known(folder), bundle) == f"{bundle.graph}, of which it was built, is gone"


def test_other_files_of_the_bundle_do_not_matter(folder: Path, bundle: Bundle) -> None:
    for name in ("model_quant.onnx", "README.md", "samples"):
        (bundle.folder / name).unlink(missing_ok=True)
    assert unfit(known(folder), bundle) is None


def test_the_machine_is_named_the_same_each_time() -> None:
    assert this_machine() == this_machine()
    assert this_machine().startswith(platform.machine())


# Files


def test_files_as_they_were_written_pass(folder: Path) -> None:
    check_files(folder, known(folder))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("damage", ["a bit", "cut", "longer", "gone"])
def test_each_damaged_file_is_found(folder: Path, part: str, damage: str) -> None:
    manifest = known(folder)
    paths = [path for path in folder.iterdir() if path.name.startswith(part)]
    assert paths
    for path in paths:
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        elif damage == "a bit":
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        else:
            path.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
        said = "cannot be read" if damage == "gone" else "damaged"
        with pytest.raises(EngineError, match=f"{path.name}: {said}.*; run edge-asr build-engine again"):
            check_files(folder, manifest)
        path.write_bytes(content)
    check_files(folder, manifest)
