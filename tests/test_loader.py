"""From a bundle to a recogniser: engines are built when they must be, and only then; what has none runs whole."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundled import BUNDLE, REPOSITORY, engine_of, recording, sound_of, transcripts
from mosquitto import PATIENCE_S, wait_for

from edge_asr import cli, loader
from edge_asr.catalogue import CATALOGUE
from edge_asr.child import EngineBuild
from edge_asr.config import BUNDLED_MODEL, EngineConfig
from edge_asr.errors import BundleError, EngineError
from edge_asr.loader import Recognizer, engine_folder, existing, load_engine, load_recognizer
from edge_asr.recognizer.bundle import FP32, INT8, Bundle, read_bundle
from edge_asr.recognizer.manifest import (
    FILE,
    Manifest,
    check_files,
    describe_file,
    describe_source,
    read_manifest,
    write_manifest,
)
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.whole import WholeParaformer

NAME = "01.wav"
WHOLE = "no engine, its graph runs whole, slower and without times of tokens: "
Load = Callable[..., Recognizer]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model."""
    copy = tmp_path / "a-model"
    shutil.copytree(BUNDLE, copy, ignore=shutil.ignore_patterns("samples", "README.md"))
    return copy


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder that does not exist yet."""
    return tmp_path / "state"


@pytest.fixture
def load(folder: Path, state: Path) -> Load:
    """Return what loads the copied bundle: `load(target=...)`. In fp32 unless told, for auto takes a while."""

    def run(target: str = FP32, **keys: Any) -> Recognizer:
        config = EngineConfig.model_validate({"target": target, "threads": 1, **keys})
        return load_recognizer(read_bundle(folder), config, state)

    return run


@pytest.fixture
def built(folder: Path, state: Path) -> Path:
    """The folder of the copied bundle's engine, which is there already."""
    place = engine_folder(read_bundle(folder), state)
    shutil.copytree(engine_of(FP32), place)
    edit(place, model="a-model")
    return place


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where engines are built; what is built comes ready-made, for a real build takes a second."""
    folders: list[Path] = []

    def build(child: EngineBuild, bundle: Bundle, folder: Path, config: EngineConfig) -> None:
        folders.append(folder)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(engine_of(config.target), folder)
        manifest = read_manifest(folder)
        assert manifest is not None
        write_manifest(folder, dataclasses.replace(manifest, source=describe_source(bundle.graph)))

    monkeypatch.setattr(EngineBuild, "run", build)
    return folders


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of all children, which run all the same."""
    commands: list[list[str]] = []
    start = subprocess.Popen

    def counted(command: list[str], **keys: Any) -> subprocess.Popen[Any]:
        commands.append(command)
        return start(command, **keys)

    monkeypatch.setattr(subprocess, "Popen", counted)
    return commands


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what puts a line of shell in the place of Python, which builds engines."""

    def use(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return use


def check(recognizer: Recognizer, kind: type[Recognizer], engine: str = FP32) -> None:
    """Assert that a recogniser is of a kind, and recognises."""
    assert type(recognizer) is kind
    assert recognizer.engine == engine
    assert recognizer.recognize(sound_of(NAME)).text == transcripts()[NAME]
    recognizer.close()


def edit(folder: Path, **keys: Any) -> None:
    """Change keys of a manifest."""
    content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    (folder / FILE).write_text(json.dumps({**content, **keys}), encoding="utf-8")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# Built once


def test_an_engine_is_built_once_by_a_child_and_used_from_then_on(
    load: Load, folder: Path, state: Path, children: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    check(load(), Paraformer)
    place = engine_folder(read_bundle(folder), state)
    [command] = children
    assert command[3] == "build-engine"
    assert caplog.messages == [f"building the engine of a-model, once for this machine, in {place}"]
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    manifest = read_manifest(place)
    assert manifest is not None
    assert {path.name for path in before} == {FILE, *manifest.files}
    check(load(), Paraformer)
    check(load("auto"), Paraformer)
    assert len(children) == 1
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before
    assert len(caplog.messages) == 1


def test_the_child_takes_a_folder_for_no_name_of_the_catalogue(
    folder: Path, tmp_path: Path, children: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(name for name in CATALOGUE if not (BUNDLE.parent / name).exists())
    folder.rename(tmp_path / name)
    bundle = read_bundle(Path(name))
    check(load_recognizer(bundle, EngineConfig(target="onnx-fp32", threads=1), Path("state")), Paraformer)
    assert len(children) == 1
    assert existing(bundle, engine_folder(bundle, tmp_path / "state"), FP32) is not None


def test_an_engine_that_another_process_builds_meanwhile_is_not_built_again(
    load: Load, folder: Path, state: Path, children: list[list[str]]
) -> None:
    place = engine_folder(read_bundle(folder), state)
    place.mkdir(parents=True)
    handle = os.open(place, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as a build does
    loading = threading.Thread(target=load)
    loading.start()
    wait_for(lambda: children, "the child")
    shutil.copytree(engine_of(FP32), place, dirs_exist_ok=True)
    before = {path: path.stat().st_ino for path in place.iterdir()}
    os.close(handle)
    loading.join(PATIENCE_S)
    assert len(children) == 1
    assert {path: path.stat().st_ino for path in place.iterdir()} == before


def test_the_child_imports_what_the_parent_does_and_nothing_from_the_working_directory(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "somebody's code"
    (place / "edge_asr").mkdir(parents=True)
    for module in ("yaml.py", "typer.py", "sitecustomize.py", "edge_asr/__init__.py", "edge_asr/cli.py"):
        (place / module).write_text("raise SystemExit('edge-asr: a stray was imported')\n")
    monkeypatch.chdir(place)
    check(load(), Paraformer)
    assert caplog.messages == []
    package = tmp_path / "another"
    package.mkdir()
    (package / "onnx.py").write_text("raise SystemExit('edge-asr: as in the parent')\n")
    monkeypatch.syspath_prepend(str(package))
    check(load(INT8), WholeParaformer)
    assert warned(caplog) == "as in the parent"


def test_the_child_is_not_configured_by_the_environment_of_its_parent(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_ASR_SOURCES__1__REALTIME", "true")  # right only beside a file with two sources
    recognizer = load()
    assert isinstance(recognizer, Paraformer)
    recognizer.close()


def test_bundles_of_one_name_have_engines_of_their_own(folder: Path, tmp_path: Path, state: Path) -> None:
    shutil.copytree(folder, tmp_path / "other" / "a-model")
    places = [engine_folder(read_bundle(path), state) for path in (folder, tmp_path / "other" / "a-model")]
    assert places[0] != places[1]
    assert {place.parent for place in places} == {state / "engines"}
    (tmp_path / "link").symlink_to(folder)
    assert engine_folder(dataclasses.replace(read_bundle(tmp_path / "link"), name="a-model"), state) == places[0]


# Built again, or not


def touch(folder: Path, engine: Path) -> None:
    (folder / "model.onnx").touch()


def copy_again(folder: Path, engine: Path) -> None:
    shutil.copy(BUNDLE / "model.onnx", folder / "model.onnx")


def change_the_card(folder: Path, engine: Path) -> None:
    (folder / "card.yaml").write_text("gates: {min_confidence: 0.1}\n")


def add_a_stray(folder: Path, engine: Path) -> None:
    (engine / "stray.txt").touch()


@pytest.mark.parametrize("change", [touch, copy_again, change_the_card, add_a_stray])
def test_an_engine_that_still_fits_is_not_built_again(
    load: Load, folder: Path, built: Path, builds: list[Path], change: Callable[[Path, Path], None]
) -> None:
    change(folder, built)
    check(load(), Paraformer)
    assert builds == []


def change_the_graph(folder: Path, engine: Path) -> None:
    model = onnx.load(str(folder / "model.onnx"))
    model.doc_string = "another"
    onnx.save(model, str(folder / "model.onnx"))


def another_machine(folder: Path, engine: Path) -> None:
    edit(engine, machine="aarch64, another")


def another_schema(folder: Path, engine: Path) -> None:
    edit(engine, schema="edge_asr.engine/0")


def another_target(folder: Path, engine: Path) -> None:
    edit(engine, engine=INT8)


def no_manifest(folder: Path, engine: Path) -> None:
    (engine / FILE).unlink()


def a_damaged_manifest(folder: Path, engine: Path) -> None:
    (engine / FILE).write_text("{")


def a_flipped_bit(folder: Path, engine: Path) -> None:
    flip_a_bit(max(engine.glob("encoder*"), key=lambda path: path.stat().st_size))


def a_cut_network(folder: Path, engine: Path) -> None:
    path = next(engine.glob("decoder*.onnx"))
    path.write_bytes(path.read_bytes()[:-1])


def no_network(folder: Path, engine: Path) -> None:
    next(engine.glob("decoder*.onnx")).unlink()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (change_the_graph, r": /.*/a-model/model\.onnx has changed since"),
        (another_machine, ": it was built for aarch64, another, this is .*"),
        (another_schema, r": /.*/manifest\.json: of another version of edge_asr \(edge_asr.engine/0\)"),
        (another_target, ": it is onnx-int8, onnx-fp32 is wanted"),
        (no_manifest, ""),
        (a_damaged_manifest, r": /.*/manifest\.json: not a manifest \(.*\)"),
        (a_flipped_bit, r": /.*/encoder-.*: damaged"),
        (a_cut_network, r": /.*/decoder-.*\.onnx: damaged"),
        (no_network, r": /.*/decoder-.*\.onnx: cannot be read \(.*\)"),
    ],
)
def test_an_engine_that_is_stale_or_damaged_is_built_again(
    load: Load,
    folder: Path,
    built: Path,
    builds: list[Path],
    change: Callable[[Path, Path], None],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    change(folder, built)
    check(load(), Paraformer)
    assert builds == [built]
    check(load(), Paraformer)
    assert builds == [built]
    [record] = caplog.records
    assert record.levelno == logging.INFO, "that is no cause for concern"
    first = f"building the engine of a-model, once for this machine, in {built}"
    assert re.fullmatch(re.escape(first) + why, record.getMessage())


def test_another_target_builds_another_engine(load: Load, built: Path, builds: list[Path]) -> None:
    check(load(INT8), Paraformer, INT8)
    assert builds == [built]
    check(load("auto"), Paraformer, INT8)
    assert builds == [built], "auto takes what is there"


def test_an_engine_is_built_of_what_is_left_of_the_bundle(
    load: Load, folder: Path, built: Path, builds: list[Path]
) -> None:
    (folder / "model.onnx").unlink()
    check(load(), Paraformer)
    assert builds == [built]


def test_a_wrong_token_list_is_the_bundles_fault_whatever_the_engine(
    load: Load, folder: Path, built: Path, builds: list[Path]
) -> None:
    tokens = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    (folder / "tokens.json").write_text(json.dumps(tokens[:-1]))
    with pytest.raises(BundleError, match="copy it again"):
        load()
    assert builds == []


# engine.dir


def test_an_engine_that_was_built_elsewhere_is_used_where_it_is(
    load: Load, tmp_path: Path, state: Path, builds: list[Path]
) -> None:
    check(load("auto", dir=engine_of(FP32)), Paraformer)
    assert not state.exists()
    assert builds == []


def test_the_engine_option_of_transcribe_names_it(
    tmp_path: Path, state: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["transcribe", "--json", "--model", str(BUNDLE), "--engine", str(engine_of(INT8))]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, str(recording(NAME)), "-o", f"state_dir={state}"])
    out, err = capfd.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert json.loads(out)["engine"] == INT8
    assert not state.exists()


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            ["build-engine", "--target", "foo"],
            "--target: engine.target: should be 'auto', 'tensorrt-fp16', 'onnx', 'onnx-int8' or 'onnx-fp32'",
        ),
        (["bench", "decode", "--threads", "999"], "--threads: engine.threads: should be less than or equal to 256"),
        (["models", "pull", "x", "--mirror", "nas"], "--mirror: models.mirror: should be an address"),
    ],
)
def test_an_option_is_named_as_it_was_typed(capfd: pytest.CaptureFixture[str], command: list[str], line: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "-o", "engine.threads=1"])
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith(f"edge-asr: {line}")


def test_a_folder_without_an_engine_is_refused_with_the_remedy(
    load: Load, folder: Path, tmp_path: Path, builds: list[Path]
) -> None:
    place = tmp_path / "nothing here"
    with pytest.raises(EngineError) as caught:
        load(dir=place)
    assert str(caught.value) == (f"{place}: holds no engine; run edge-asr build-engine --model {folder} --out {place}")
    assert caught.value.exit_code == 3
    assert builds == []
    assert not place.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_the_graph, "does not fit: .*model.onnx has changed since"),
        (another_machine, "does not fit: it was built for aarch64, another, this is "),
        (another_target, "does not fit: it is onnx-int8, onnx-fp32 is wanted"),
        (another_schema, "another version of edge_asr"),
        (a_damaged_manifest, "not a manifest"),
        (a_flipped_bit, "damaged"),
        (a_cut_network, "damaged"),
        (no_network, "cannot be read"),
    ],
)
def test_an_engine_that_was_named_and_does_not_fit_is_refused_not_replaced(
    load: Load, folder: Path, built: Path, builds: list[Path], change: Callable[[Path, Path], None], reason: str
) -> None:
    change(folder, built)
    before = {path: path.read_bytes() for path in built.iterdir()}
    with pytest.raises(EngineError, match=f"{reason}.*; run edge-asr build-engine") as caught:
        load(dir=built)
    line = str(caught.value)
    assert line.startswith(str(built))
    assert "\n" not in line
    assert caught.value.exit_code == 3
    assert builds == []
    assert {path: path.read_bytes() for path in built.iterdir()} == before


@pytest.mark.parametrize("source", ["changed", "gone", "changed, and the configuration"])
def test_an_engine_of_another_model_is_named_and_no_command_would_overwrite_it(
    load: Load, folder: Path, built: Path, source: str
) -> None:
    edit(built, model="another-model")
    if source == "gone":
        (folder / "model.onnx").unlink()
    else:
        change_the_graph(folder, built)
    if source.endswith("configuration"):
        (folder / "config.yaml").write_text("predictor_conf: {tail_threshold: 0.3}\n")
    with pytest.raises(EngineError) as caught:
        load(dir=built)
    assert str(caught.value) == (
        f"{built}: does not fit: it was built of another-model, not of a-model; name its own engine's folder, or run"
        f" edge-asr build-engine --model {folder} --out DIR first"
    )


def test_a_model_that_was_renamed_is_the_same_model(load: Load, built: Path) -> None:
    edit(built, model="another-name")
    check(load(dir=built), Paraformer)
    edit(built, machine="another")
    with pytest.raises(EngineError, match="does not fit: it was built for another, ") as caught:
        load(dir=built)
    assert str(caught.value).endswith(f" --out {built}")


def swap_while_loading(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    """Let a build of another target end just after the files have been checked."""

    def swapped(folder: Path, manifest: Manifest) -> None:
        check_files(folder, manifest)
        monkeypatch.setattr(loader, "check_files", check_files)
        for name in manifest.files:
            (built / name).unlink()
        shutil.copytree(engine_of(INT8), built, dirs_exist_ok=True)

    monkeypatch.setattr(loader, "check_files", swapped)


def test_an_engine_that_is_replaced_while_it_is_loaded_is_loaded_as_it_is_now(
    load: Load, built: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_while_loading(monkeypatch, built)
    check(load("auto", dir=built), Paraformer, INT8)
    shutil.rmtree(built)
    shutil.copytree(engine_of(FP32), built)
    swap_while_loading(monkeypatch, built)
    with pytest.raises(EngineError, match="it is onnx-int8, onnx-fp32 is wanted"):
        load(FP32, dir=built)
    assert builds == []


@pytest.mark.parametrize("network", ["encoder", "decoder"])
def test_a_network_that_cannot_be_loaded_is_the_engines_fault(load: Load, built: Path, network: str) -> None:
    manifest = read_manifest(built)
    assert manifest is not None
    path = built / (manifest.encoder if network == "encoder" else manifest.decoder)
    path.write_bytes(b"no graph")
    write_manifest(built, dataclasses.replace(manifest, files={**manifest.files, path.name: describe_file(path)}))
    with pytest.raises(EngineError) as caught:
        load(dir=built)
    line = str(caught.value)
    assert line.startswith(f"{path}: onnxruntime cannot load it")
    assert line.endswith("; run edge-asr build-engine again")
    assert "copy the bundle" not in line
    assert "\n" not in line


def test_of_an_engine_that_does_not_fit_transcribe_says_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["transcribe", "-o", f"engine.dir={tmp_path}", str(recording(NAME))])
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (3, "")
    assert err == (
        f"edge-asr: {tmp_path}: holds no engine; run edge-asr build-engine --model {BUNDLED_MODEL} --out {tmp_path}\n"
    )


# What runs whole


def warned(caplog: pytest.LogCaptureFixture) -> str:
    """Return the one warning's reason, which is a line."""
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    name, _, reason = record.getMessage().partition(f": {WHOLE}")
    assert name == "a-model"
    assert reason
    assert "\n" not in reason
    return reason


def test_where_no_engine_can_be_written_the_graph_runs_whole(
    load: Load, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state.write_text("in the way")
    check(load(), WholeParaformer)
    reason = warned(caplog)
    assert reason.startswith(f"{state / 'engines'}")
    assert "cannot write the engine there" in reason


def test_with_strict_nothing_runs_whole(load: Load, state: Path, caplog: pytest.LogCaptureFixture) -> None:
    state.write_text("in the way")
    with pytest.raises(EngineError, match="cannot write the engine there"):
        load(strict=True)
    assert caplog.messages == []


def test_without_onnx_the_graph_runs_whole(
    load: Load, tmp_path: Path, state: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tmp_path / "hidden" / "onnx"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'onnx'\", name='onnx')\n")
    monkeypatch.syspath_prepend(str(hidden.parent))
    check(load(), WholeParaformer)
    assert warned(caplog) == "an engine cannot be built without onnx: pip install 'edge-asr[cpu]'"
    assert not list(state.rglob("*.onnx"))


def rename_everything(path: Path) -> None:
    """Give nodes and weights names that tell nothing."""
    model = onnx.load(str(path))
    names = {tensor.name: f"tensor_{number}" for number, tensor in enumerate(model.graph.initializer)}
    names |= {
        output: f"value_{number}_{k}"
        for number, node in enumerate(model.graph.node)
        for k, output in enumerate(node.output)
        if output not in {result.name for result in model.graph.output}
    }
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    _rename_nodes(model.graph, names)
    del model.graph.value_info[:]
    onnx.save(model, str(path))


def _rename_nodes(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        node.name = ""
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename_nodes(attribute.g, names)
    for output in graph.output:
        output.name = names.get(output.name, output.name)


def test_a_graph_that_is_not_recognised_runs_whole(
    load: Load, folder: Path, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rename_everything(folder / "model.onnx")
    check(load(), WholeParaformer)
    reason = warned(caplog)
    assert reason.startswith(f"{folder / 'model.onnx'}: not a Paraformer that can be taken apart (")
    assert not list(state.rglob("*.onnx"))


def test_a_graph_that_is_not_recognised_has_tokens_without_times(load: Load, folder: Path) -> None:
    rename_everything(folder / "model.onnx")
    tokens = load().recognize(sound_of(NAME)).tokens
    assert [token.text for token in tokens] == list(transcripts()[NAME])
    assert {(token.start_ms, token.end_ms) for token in tokens} == {(None, None)}


def test_a_damaged_bundle_is_an_error_without_a_warning(
    load: Load, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1_000_000])
    with pytest.raises(BundleError, match=r"model\.onnx: .*copy the bundle again"):
        load()
    assert caplog.messages == []


def test_a_checkpoint_that_cannot_be_built_is_an_error(
    load: Load, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for graph in folder.glob("*.onnx"):
        graph.unlink()
    (folder / "model.pt").write_bytes(b"no checkpoint")
    with pytest.raises(EngineError, match=r"model\.pt: ") as caught:
        load()
    assert "\n" not in str(caught.value)
    assert caplog.messages == [], "there is nothing that could run whole"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "build-engine ended with 1"),
        ("echo 'a warning' >&2; exit 7", "build-engine ended with 7"),
        ("echo 'edge-asr: one' >&2; echo 'edge-asr: two' >&2; echo 'a warning at exit' >&2; exit 3", "two"),
        ("echo ' 10 % onnx-int8: reading' >&2; kill -KILL $$", "build-engine was killed by SIGKILL: out of memory?"),
        ("kill -SEGV $$", "build-engine was killed by SIGSEGV"),
        ("kill -40 $$", "build-engine was killed by signal 40"),
    ],
)
def test_a_child_that_fails_is_known_by_its_last_line_for_the_user_or_by_how_it_ended(
    load: Load, child: Callable[[str], None], caplog: pytest.LogCaptureFixture, script: str, reason: str
) -> None:
    child(script)
    check(load(), WholeParaformer)
    assert warned(caplog) == reason


def test_a_child_that_cannot_be_started_leaves_the_graph_whole(
    load: Load, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    check(load(), WholeParaformer)
    assert warned(caplog).startswith("build-engine cannot be started (")


# Ended before it is done


def ended(pid_file: Path) -> bool:
    """True where the process that has written its number is no more."""
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("manners", ["", "trap '' TERM; "], ids=["polite", "deaf"])
def test_a_build_that_is_cancelled_ends_its_child_and_nothing_runs_whole(
    folder: Path,
    state: Path,
    tmp_path: Path,
    child: Callable[[str], None],
    manners: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pid = tmp_path / "pid"
    child(f"{manners}echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60")
    begun, failures = [], []
    build = EngineBuild(lambda: begun.append("told"))

    def load() -> None:
        try:
            load_recognizer(read_bundle(folder), EngineConfig(threads=1), state, build)
        except EngineError as error:
            failures.append(error)

    loading = threading.Thread(target=load)
    loading.start()
    wait_for(pid.exists, "the child")
    build.cancel()
    loading.join(PATIENCE_S)
    assert ended(pid)
    assert len(failures) == 1
    assert begun == ["told"]
    assert caplog.messages == []


def test_after_a_cancel_no_child_is_started(folder: Path, state: Path, children: list[list[str]]) -> None:
    begun: list[str] = []
    build = EngineBuild(lambda: begun.append("told"))
    build.cancel()
    with pytest.raises(EngineError, match="cancelled"):
        load_recognizer(read_bundle(folder), EngineConfig(threads=1), state, build)
    assert (children, begun) == ([], [])


IN_PLACE = """
import sys
from edge_asr import child, cli
child._command = lambda *given: ["sh", "-c", "echo $$ > pid.new; mv pid.new pid; exec sleep 60"]
cli.main()
"""


@pytest.mark.parametrize("to", ["the process", "its group, as a terminal does"])
def test_an_interrupt_of_transcribe_ends_the_child_too(tmp_path: Path, state: Path, to: str) -> None:
    command = [sys.executable, "-c", IN_PLACE, "transcribe", "--model", str(BUNDLE), "-o", f"state_dir={state}"]
    process = subprocess.Popen(
        [*command, str(recording(NAME))],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    wait_for((tmp_path / "pid").exists, "the child")
    (os.kill if to == "the process" else os.killpg)(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert ended(tmp_path / "pid")
    assert process.returncode == 130
    [line] = said.splitlines()
    assert "building the engine of" in line


# Both


def test_both_ways_say_the_same(folder: Path, built: Path) -> None:
    bundle = read_bundle(folder)
    engine, whole = load_engine(bundle, built, EngineConfig(threads=1)), loader.load_whole(bundle, 1)
    for name in transcripts():
        found, expected = engine.recognize(sound_of(name)), whole.recognize(sound_of(name))
        assert found.text == expected.text
        ours, theirs = ([token.confidence for token in one.tokens] for one in (found, expected))
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
