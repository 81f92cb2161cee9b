"""`edge-asr models`: what it prints, what it asks, and what the other commands make of a pulled model."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import yaml
from bundled import BUNDLE, transcripts
from model_server import ModelServer, answers
from test_models_pull import BODIES, GRAPH, NAME, RECORDING, entry_of

from edge_asr import cli
from edge_asr.catalogue import BUNDLED, CATALOGUE, HUGGING_FACE, Entry, Licence, Source
from edge_asr.config import BUNDLED_MODEL, Config, default_state_dir
from edge_asr.config_reader import load_config
from edge_asr.errors import ConfigError
from edge_asr.models.progress import shown
from edge_asr.recognizer.manifest import describe_file, read_manifest, write_manifest

TEXT = transcripts()[Path(RECORDING).name]
Run = Callable[..., "Ran"]


@dataclasses.dataclass
class Ran:
    """How a command ended."""

    code: int | str | None
    out: str
    err: str


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state folder, by way of the environment."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return tmp_path / "data" / "edge_asr"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """A hub with one model, which is in the catalogue."""
    hub = ModelServer({f"repo/{path}": body for path, body in BODIES.items()})
    entry = dataclasses.replace(
        entry_of(f"{hub.url}/repo"),
        licences=(Licence("Test Licence 1", "https://licence.example"),),
        sources=(Source("huggingface", f"{hub.url}/repo"), Source("modelscope", f"{hub.url}/other")),
    )
    monkeypatch.setitem(CATALOGUE, NAME, entry)
    yield hub
    hub.close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def main(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        printed = capsys.readouterr()
        return Ran(caught.value.code, printed.out, printed.err)

    return main


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    """A USB stick with the model in the folder that it was published as."""
    for path, body in BODIES.items():
        (tmp_path / "stick" / "published-name" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stick" / "published-name" / path).write_bytes(body)
    return tmp_path / "stick"


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


def test_a_pulled_model_is_what_the_other_commands_use(server: ModelServer, run: Run, state: Path) -> None:
    before = yaml.safe_load(run("check-config").out)
    assert before["model"] == str(BUNDLED_MODEL)
    assert not state.exists()
    pulled = run("models", "pull", NAME, "-y")
    assert (pulled.code, pulled.out) == (0, f"{NAME}: verified, in {state}/models/{NAME}; the model from now on\n")
    assert yaml.safe_load(run("check-config").out)["model"] == str(state / "models" / NAME)
    assert json.loads(run("transcribe", "--json", str(BUNDLE / RECORDING)).out)["model"] == NAME
    assert json.loads(run("transcribe", "--json", "--model", "paraformer-tiny", str(BUNDLE / RECORDING)).out)[
        "model"
    ] == "paraformer-tiny"  # fmt: skip
    assert run("models", "remove", NAME).out == f"{NAME}: removed\n"
    assert yaml.safe_load(run("check-config").out)["model"] == str(BUNDLED_MODEL)
    assert [path.name for path in (state / "models").iterdir()] == [f".{NAME}.lock"]


def test_a_model_can_be_pulled_and_named_without_becoming_the_default(
    server: ModelServer, run: Run, state: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {NAME}\nstate_dir: kept\n")
    refused = run("check-config", "--config", str(config))
    assert refused.code == 2
    assert refused.err == (
        f"edge-asr: {config}:1: model: {NAME} is not in {tmp_path}/kept/models; run: edge-asr models pull {NAME}\n"
    )
    assert run("models", "pull", NAME, "-y", "--no-default", "--config", str(config)).code == 0
    assert yaml.safe_load(run("check-config", "--config", str(config)).out)["model"] == str(
        tmp_path / "kept" / "models" / NAME
    )
    kept = tmp_path / "kept"
    assert load_config(None, [f"state_dir={kept}"], {}).model == BUNDLED_MODEL
    assert not (kept / "models" / "default").exists()
    assert not state.exists()


def test_a_folder_called_as_a_model_of_the_catalogue_is_named_with_a_slash(tmp_path: Path) -> None:
    assert load_config(None, ["model=./paraformer-small"], {}).model == Path("paraformer-small")
    assert load_config(None, [], {}, model="./paraformer-small").model == Path("paraformer-small")
    with pytest.raises(ConfigError, match="edge-asr models pull paraformer-small"):
        load_config(None, [], {}, model="paraformer-small")


def test_a_default_that_was_deleted_by_hand_is_explained(server: ModelServer, run: Run, state: Path) -> None:
    assert run("models", "pull", NAME, "-y").code == 0
    shutil.rmtree(state / "models" / NAME)
    refused = run("check-config")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == f"edge-asr: model: {NAME} is not in {state}/models; run: edge-asr models pull {NAME}\n"
    assert run("models", "list").code == 0


def test_the_licence_is_shown_and_asked_for_once(
    server: ModelServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    nobody = run("models", "pull", NAME)
    assert nobody.code == 2
    assert f"{NAME} (published-name)" in nobody.err
    assert "Test Licence 1, https://licence.example" in nobody.err
    assert nobody.err.endswith(
        f"edge-asr: {NAME}: nobody here to accept its licence; read it and add --accept-licence\n"
    )
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    declined = run("models", "pull", NAME)
    assert declined.code == 2
    assert declined.err.endswith(f"{NAME}: licence not accepted, nothing was pulled\n")
    assert server.requests == []
    server.tricks[f"repo/{RECORDING}"] = [answers(404)]
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert run("models", "pull", NAME).code == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    again = run("models", "pull", NAME)
    assert again.code == 0
    assert "Licence" not in again.err


def test_a_usb_stick_is_copied_and_verified_the_same_way(
    server: ModelServer, run: Run, state: Path, stick: Path
) -> None:
    graph = stick / "published-name" / GRAPH
    graph.write_bytes(BODIES[GRAPH][::-1])
    wrong = run("models", "pull", NAME, "-y", "--from", str(stick))
    assert wrong.code == 3
    assert f"edge-asr: {graph}: has sha256" in wrong.err
    graph.unlink()
    missing = run("models", "pull", NAME, "-y", "--from", str(stick))
    assert missing.code == 2
    assert f"--from {graph.parent}: {GRAPH} missing; copy all files of {NAME} there" in missing.err
    assert "--from /nowhere: holds no" in run("models", "pull", NAME, "-y", "--from", "/nowhere").err
    assert not (state / "models" / NAME).exists()
    graph.write_bytes(BODIES[GRAPH])
    assert run("models", "pull", NAME, "-y", "--from", str(stick)).code == 0
    assert (state / "models" / NAME / GRAPH).read_bytes() == BODIES[GRAPH]
    assert server.requests == []


def test_a_mirror_has_the_files_below_the_name(server: ModelServer, run: Run) -> None:
    server.files = {f"mirror/{NAME}/{path}": body for path, body in BODIES.items()}
    assert run("models", "pull", NAME, "-y", "--mirror", f"{server.url}/mirror/").code == 0
    assert run("models", "remove", NAME).code == 0
    assert run("models", "pull", NAME, "-y", "-o", f"models.mirror={server.url}/mirror").code == 0
    assert {request.path.split("/")[0] for request in server.requests} == {"mirror"}


def test_one_hub_can_be_chosen(server: ModelServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "modelscope: HTTP 404" in run("models", "pull", NAME, "-y", "--source", "modelscope").err
    assert {request.path.split("/")[0] for request in server.requests} == {"other"}
    assert "known: huggingface, modelscope" in run("models", "pull", NAME, "-y", "--source", "github").err
    moved = dataclasses.replace(CATALOGUE[NAME], sources=(Source("huggingface", f"{HUGGING_FACE}/repo"),))
    monkeypatch.setitem(CATALOGUE, NAME, moved)
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    assert run("models", "pull", NAME, "-y").code == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["pull", "paraformer-smal"], "no such model in the catalogue; did you mean paraformer-small?"),
        (["verify", "x"], "no such model in the catalogue; known: paraformer-tiny, paraformer-small"),
        (["pull", "paraformer-tiny"], "comes with the repository and cannot be pulled; name another: paraformer-small"),
        (["remove", "paraformer-tiny"], "is the bundled model and stays"),
        (["remove", "paraformer-small"], "is not here, so there is nothing to remove"),
        (["pull", "paraformer-small", "--from", "a", "--mirror", "http://b"], "exclude each other; give one"),
        (["pull", "paraformer-small", "--mirror", "nas"], "models.mirror: should be an address such as https://"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(run: Run, state: Path, arguments: list[str], line: str) -> None:
    ran = run("models", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert line in ran.err
    assert len(ran.err.splitlines()) == 1
    assert not state.exists()


def test_list_says_what_is_here(server: ModelServer, run: Run) -> None:
    rows = run("models", "list").out
    assert "* paraformer-tiny         here " in rows
    assert f"  {NAME}         -  " in rows
    run("models", "pull", NAME, "-y")
    assert f"* {NAME}         here " in run("models", "list").out
    listed = {row["name"]: row for row in map(json.loads, run("models", "list", "--json").out.splitlines())}
    assert list(listed) == list(CATALOGUE)
    assert (listed[NAME]["here"], listed[NAME]["default"]) == (True, True)
    assert listed[NAME]["bytes"] == sum(map(len, BODIES.values()))
    assert (listed["paraformer-small"]["here"], listed["paraformer-small"]["default"]) == (False, False)


def test_verify_finds_what_has_changed(server: ModelServer, run: Run, state: Path) -> None:
    run("models", "pull", NAME, "-y")
    good = run("models", "verify")
    assert (good.code, good.out) == (0, f"paraformer-tiny: verified\n{NAME}: verified\n")
    (state / "models" / NAME / GRAPH).write_bytes(BODIES[GRAPH][:-1] + b"x")
    (state / "models" / NAME / "am.mvn").unlink()
    bad = run("models", "verify", NAME, "paraformer-small")
    assert (bad.code, bad.out) == (3, "")
    assert f"{NAME}: {state}/models/{NAME}/{GRAPH}: has sha256" in bad.err
    assert f"{NAME}: {state}/models/{NAME}/am.mvn: is missing; run: edge-asr models remove {NAME}, then" in bad.err
    assert "paraformer-small: is not here; edge-asr models pull paraformer-small" in bad.err
    verdicts = [json.loads(line) for line in run("models", "verify", "--json").out.splitlines()]
    assert [(verdict["name"], verdict["ok"]) for verdict in verdicts] == [("paraformer-tiny", True), (NAME, False)]
    assert "is missing" in verdicts[1]["error"]


def test_verify_tries_the_model_on_its_recording(
    server: ModelServer, run: Run, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = dataclasses.replace(entry_of(server.url, known=False), sources=CATALOGUE[NAME].sources)
    monkeypatch.setitem(CATALOGUE, NAME, unknown)
    assert run("models", "pull", NAME, "-y").code == 0
    shutil.copy(BUNDLE / "samples" / "03.wav", state / "models" / NAME / RECORDING)
    bad = run("models", "verify", NAME)
    assert bad.code == 3
    assert f"{RECORDING} gives '现在几点' instead of '{TEXT}'; run: edge-asr models remove" in bad.err


def spoil(engine: Path, scale: str) -> None:
    """Write another scale of the inputs into an engine, and the manifest that goes with it."""
    manifest = read_manifest(engine)
    assert manifest is not None
    encoder = engine / manifest.encoder
    model = onnx.load(str(encoder), load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == "input_scale":
            entry.value = scale
    encoder.write_bytes(model.SerializeToString())
    files = {**manifest.files, manifest.encoder: describe_file(encoder)}
    write_manifest(engine, dataclasses.replace(manifest, files=files))


@pytest.mark.parametrize(("scale", "why"), [("0.0001", f"{RECORDING} gives '"), ("much", "its engine lacks")])
def test_verify_tries_the_engine_as_well(server: ModelServer, run: Run, state: Path, scale: str, why: str) -> None:
    run("models", "pull", NAME, "-y")
    assert run("models", "verify", NAME).code == 0
    assert not (state / "engines").exists()
    assert run("build-engine", "--model", NAME, "--target", "onnx-int8").code == 0
    assert run("models", "verify", NAME).out == f"{NAME}: verified\n"
    [engine] = (state / "engines").iterdir()
    spoil(engine, scale)
    bad = run("models", "verify", NAME)
    assert (bad.code, bad.out) == (3, "")
    assert bad.err.startswith(f"{NAME}: {engine}: the engine: ")
    assert why in bad.err
    assert bad.err.endswith(f"; run: edge-asr build-engine --model {NAME}\n")
    assert run("models", "pull", NAME, "-y").code == 0
    assert run("models", "verify", NAME, "-o", "engine.target=onnx-fp32").code == 0


def test_verify_tries_the_engine_for_a_gpu_as_well(server: ModelServer, run: Run, state: Path) -> None:
    run("models", "pull", NAME, "-y")
    assert run("build-engine", "--model", NAME, "--target", "onnx-fp32").code == 0
    [built] = (state / "engines").iterdir()
    engine = built.rename(built.with_name(f"{built.name}-onnx-cuda"))
    assert run("models", "verify", NAME).code == 0
    spoil(engine, "0.0001")
    assert f"{NAME}: {engine}: the engine: " in run("models", "verify", NAME).err


def test_verify_tries_the_engine_that_is_configured(server: ModelServer, run: Run, state: Path, tmp_path: Path) -> None:
    run("models", "pull", NAME, "-y")
    place = tmp_path / "engine"
    assert run("build-engine", "--model", NAME, "--target", "onnx-int8", "--out", str(place)).code == 0
    spoil(place, "0.0001")
    assert run("models", "verify", NAME).code == 0
    assert f"{NAME}: {place}: the engine: " in run("models", "verify", NAME, "-o", f"engine.dir={place}").err


def test_a_removed_model_takes_its_engines_along(server: ModelServer, run: Run, state: Path) -> None:
    run("models", "pull", NAME, "-y")
    assert run("build-engine", "--model", NAME, "--target", "onnx-int8").code == 0
    [engine] = (state / "engines").iterdir()
    for target in ("tensorrt-fp16", "onnx-cuda"):
        engine.with_name(f"{engine.name}-{target}").mkdir()
    other = state / "engines" / f"{NAME}-00000000"
    other.mkdir()
    (state / "models" / NAME / "tokens.json").write_bytes(b"damaged")
    assert run("models", "remove", NAME).out == f"{NAME}: removed\n"
    assert list((state / "engines").iterdir()) == [other]


def test_the_engine_of_a_model_that_was_deleted_by_hand_can_be_removed(
    server: ModelServer, run: Run, state: Path
) -> None:
    run("models", "pull", NAME, "-y")
    assert run("build-engine", "--model", NAME, "--target", "onnx-int8").code == 0
    shutil.rmtree(state / "models" / NAME)
    assert run("models", "remove", NAME).code == 0
    assert not any((state / "engines").iterdir())
    assert run("models", "remove", NAME).code == 2


def test_what_cannot_be_deleted_is_one_line_and_leaves_the_model(
    server: ModelServer, run: Run, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    run("models", "pull", NAME, "-y")
    assert run("build-engine", "--model", NAME, "--target", "onnx-int8").code == 0
    [engine] = (state / "engines").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        refused = run("models", "remove", NAME)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == f"edge-asr: {engine}: cannot be deleted: Permission denied; remove it again\n"
    assert run("models", "verify", NAME).code == 0
    assert f"* {NAME}" in run("models", "list").out


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with shown() as progress:
            progress.begin("model.onnx", 0, 10_000_000)
            for _ in range(100):
                progress.advance(100_000)
            progress.begin("tokens.txt", 500, None)
            progress.advance(500)
            progress.say("[done]")
        told.append(stream.getvalue())
    assert "10.0/10.0 MB" in told[0]
    assert "1.0/? kB" in told[0]
    assert "[done]" in told[0]
    lines = told[1].splitlines()
    assert lines[0] == "model.onnx: begin, 10.0 MB in all"
    assert lines[1:11] == [f"model.onnx: {ten}0 %, {ten}.0 MB" for ten in range(1, 11)]
    assert lines[11:] == ["tokens.txt: going on at 0.5 kB, size unknown", "[done]"]


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "XDG_DATA_HOME": "/data"}, "/var/lib/a"),
        ({"XDG_DATA_HOME": "/data"}, "/data/edge_asr"),
        ({"XDG_DATA_HOME": "relative"}, "/home/me/.local/share/edge_asr"),
        ({}, "/home/me/.local/share/edge_asr"),
    ],
)
def test_state_goes_where_the_system_wants_it(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], folder: str
) -> None:
    for name in ("STATE_DIRECTORY", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environ}.items():
        monkeypatch.setenv(name, value)
    assert Config().state_dir == Path(folder)


def test_a_service_without_a_home_has_a_place_for_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert default_state_dir() == Path("/var/lib/edge_asr")


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=list(CATALOGUE))
def test_every_entry_is_complete(entry: Entry) -> None:
    paths = [file.path for file in entry.files]
    assert len(set(paths)) == len(paths)
    assert entry.goldens
    assert {golden.recording for golden in entry.goldens} <= set(paths)
    assert entry.licences
    assert entry.about
    assert all(source.base.startswith("https://") for source in entry.sources)
    for file in entry.files:
        assert not Path(file.path).is_absolute()
        assert ".." not in Path(file.path).parts
        assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32


def test_the_catalogue_knows_the_bundled_model_as_it_is() -> None:
    assert {Path(golden.recording).name: golden.text for golden in BUNDLED.goldens} == transcripts()
    assert BUNDLED_MODEL.name == BUNDLED.name == "paraformer-tiny"
