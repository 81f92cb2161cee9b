"""Bundles in every published layout, and in every way damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundled import BUNDLE, ENGINES, SHARED_DATA, bundle_of, sound_of, transcripts

from edge_asr.config import EngineConfig
from edge_asr.engine.build import build_engine
from edge_asr.errors import BundleError, EdgeAsrError
from edge_asr.loader import load_engine, load_whole
from edge_asr.recognizer.bundle import read_bundle
from edge_asr.recognizer.features import WIDTH
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.whole import WholeParaformer
from edge_asr.speech.vad import MODEL as SILERO

CONTRACT = SHARED_DATA / "contract"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model that may be damaged."""
    copy = tmp_path / "a-model"
    shutil.copytree(BUNDLE, copy, ignore=shutil.ignore_patterns("samples", "README.md"))
    return copy


@pytest.fixture
def published() -> Callable[[str], Path]:
    """Find a side file of a published model."""

    def find(name: str) -> Path:
        path = CONTRACT / name
        if not path.exists():
            pytest.skip(f"side files of published models are absent: {path}")
        return path

    return find


def open_bundle(folder: Path) -> WholeParaformer:
    return load_whole(read_bundle(folder), threads=1)


def as_funasr(folder: Path) -> None:
    (folder / "tokens.txt").unlink()


def as_sherpa(folder: Path) -> None:
    """Leave what sherpa-onnx publishes: graphs with metadata and `token id` lines."""
    for name in ("am.mvn", "tokens.json", "config.yaml"):
        (folder / name).unlink()
    (folder / "model_quant.onnx").rename(folder / "model.int8.onnx")


def as_old_funasr(folder: Path) -> None:
    """One token a line, without ids."""
    tokens = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    (folder / "tokens.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokens.json").unlink()


def as_int8_only(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def as_sherpa_int8_only(folder: Path) -> None:
    as_sherpa(folder)
    (folder / "model.onnx").unlink()


# Layouts


@pytest.mark.parametrize(
    ("layout", "engine", "graph"),
    [
        (as_funasr, "onnx-fp32", "model.onnx"),
        (as_sherpa, "onnx-fp32", "model.onnx"),
        (as_old_funasr, "onnx-fp32", "model.onnx"),
        (as_int8_only, "onnx-int8", "model_quant.onnx"),
        (as_sherpa_int8_only, "onnx-int8", "model.int8.onnx"),
    ],
)
def test_every_published_layout_is_read_and_recognises(
    folder: Path, layout: Callable[[Path], None], engine: str, graph: str
) -> None:
    layout(folder)
    recognizer = open_bundle(folder)
    assert (recognizer.bundle.name, recognizer.bundle.kind, recognizer.engine) == ("a-model", engine, engine)
    assert recognizer.bundle.graph == folder / graph
    assert recognizer.recognize(sound_of("01.wav")).text == transcripts()["01.wav"]


@pytest.mark.parametrize("layout", [as_funasr, as_sherpa, as_old_funasr, as_int8_only, as_sherpa_int8_only])
@pytest.mark.parametrize("engine", ENGINES)
def test_of_every_published_layout_either_engine_is_built_and_recognises(
    folder: Path, tmp_path: Path, layout: Callable[[Path], None], engine: str
) -> None:
    layout(folder)
    bundle = read_bundle(folder)
    manifest = build_engine(bundle, engine, tmp_path / "engine", threads=1)
    same = bundle.files.get(engine, bundle.graph)
    assert (manifest.engine, manifest.source.name) == (engine, same.name), "what was published in it is taken"
    recognizer = load_engine(bundle, tmp_path / "engine", EngineConfig(threads=1))
    assert recognizer.recognize(sound_of("01.wav")).text == transcripts()["01.wav"]


@pytest.mark.parametrize(("name", "kind"), [("model.onnx", "onnx-fp32"), ("model_quant.onnx", "onnx-int8")])
@pytest.mark.parametrize("called", ["model.onnx", "model_quant.onnx", "model.int8.onnx"])
def test_a_graph_says_itself_what_it_is_whatever_it_is_called(folder: Path, name: str, kind: str, called: str) -> None:
    for graph in folder.glob("*.onnx"):
        graph.unlink()
    shutil.copy(BUNDLE / name, folder / called)
    bundle = read_bundle(folder)
    assert bundle.files == {kind: folder / called}
    assert (bundle.kind, bundle.graph) == (kind, folder / called)


@pytest.mark.parametrize("called", ["model.pt", "model.pb"])
def test_a_checkpoint_is_taken_where_there_is_no_graph(folder: Path, called: str) -> None:
    (folder / called).touch()
    assert read_bundle(folder).kind == "onnx-fp32"
    assert set(read_bundle(folder).files) == {"onnx-fp32", "onnx-int8", "checkpoint"}
    for graph in folder.glob("*.onnx"):
        graph.unlink()
    bundle = read_bundle(folder)
    assert (bundle.kind, bundle.graph) == ("checkpoint", folder / called)


def test_metadata_and_am_mvn_hold_the_same_normalisation(folder: Path) -> None:
    with_file = open_bundle(folder)
    as_sherpa(folder)
    with_metadata = open_bundle(folder)
    assert with_file.bundle.cmvn is not None
    assert with_metadata.bundle.cmvn is None
    samples = sound_of("02.wav")
    np.testing.assert_allclose(with_metadata._features(samples), with_file._features(samples), atol=1e-3)


def test_token_lists_of_all_layouts_are_the_same(folder: Path) -> None:
    expected = tuple(json.loads((folder / "tokens.json").read_text(encoding="utf-8")))
    assert read_bundle(folder).tokens == expected
    (folder / "tokens.json").unlink()
    assert read_bundle(folder).tokens == expected
    (folder / "tokens.txt").write_text("\r\n".join(expected) + "\r\n", encoding="utf-8", newline="")
    assert read_bundle(folder).tokens == expected


def test_the_name_of_a_model_is_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert read_bundle(Path()).name == "a-model"


def test_a_card_gives_the_thresholds_of_the_gates(folder: Path) -> None:
    assert read_bundle(BUNDLE).gates, "the bundled model has thresholds"
    (folder / "card.yaml").write_text("gates:\n  min_confidence: 0.5\n  max_tokens_per_s: 9\n")
    assert read_bundle(folder).gates == {"min_confidence": 0.5, "max_tokens_per_s": 9.0}


@pytest.mark.parametrize("card", ["", "gates:\n", "language: zh\n"])
def test_a_card_may_leave_the_gates_out(folder: Path, card: str) -> None:
    (folder / "card.yaml").write_text(card)
    assert read_bundle(folder).gates == {}


# Side files of published models


@pytest.mark.parametrize(
    ("file", "tokens"),
    [
        ("paraformer-large/tokens.json", 8404),
        ("seaco-paraformer-large/tokens.json", 8404),
        ("paraformer-large-onnx-v0/tokens.txt", 8404),
        ("paraformer-small-sherpa/tokens.txt", 8359),
        ("paraformer-streaming-bilingual-sherpa/tokens.txt", 8404),
        ("paraformer-aishell1/tokens.txt", 4234),
    ],
)
def test_published_token_lists_are_read(folder: Path, published: Callable[[str], Path], file: str, tokens: int) -> None:
    source = published(file)
    for name in ("tokens.json", "tokens.txt"):
        (folder / name).unlink()
    shutil.copy(source, folder)
    read = read_bundle(folder).tokens
    assert len(read) == len(set(read)) == tokens
    assert read[:3] == ("<blank>", "<s>", "</s>")
    assert read[-1] == "<unk>"
    assert not any(token.split() != [token] for token in read)


@pytest.mark.parametrize("model", ["paraformer-large", "paraformer-large-online", "seaco-paraformer-large"])
def test_published_normalisations_are_read(folder: Path, published: Callable[[str], Path], model: str) -> None:
    path = published(f"{model}/am.mvn")
    shutil.copy(path, folder)
    cmvn = read_bundle(folder).cmvn
    assert cmvn is not None
    # Kaldi's own words: the numbers between the brackets of the second and third component.
    shift, scale = (part.split("]")[0].split("[")[1] for part in path.read_text().split("<LearnRateCoef>")[1:])
    np.testing.assert_array_equal(cmvn.neg_mean, np.array(shift.split(), np.float32))
    np.testing.assert_array_equal(cmvn.inv_stddev, np.array(scale.split(), np.float32))
    assert (cmvn.inv_stddev > 0).all()


# Damage


def refused(folder: Path, *named: str) -> str:
    """Open a bundle that must be refused in one line that names all of `named`; return the line."""
    with pytest.raises(EdgeAsrError) as raised:
        open_bundle(folder)
    line = str(raised.value)
    assert isinstance(raised.value, BundleError)
    assert raised.value.exit_code == 3
    assert "\n" not in line
    assert all(name in line for name in named), line
    return line


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such folder", "set `model`")


def test_a_file_is_no_bundle(folder: Path) -> None:
    refused(folder / "model.onnx", "model.onnx", "set `model`")


def test_a_folder_without_a_graph_is_refused(folder: Path) -> None:
    for graph in folder.glob("*.onnx"):
        graph.unlink()
    refused(folder, str(folder), "model.onnx, model_quant.onnx, model.int8.onnx, model.pt", "copy the bundle again")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model_eb.onnx", "an export with hot words"),
        ("encoder.onnx", "a streaming Paraformer"),
        ("encoder.int8.onnx", "a streaming Paraformer"),
    ],
)
@pytest.mark.parametrize("others", [True, False], ids=["beside a graph", "alone"])
def test_a_bundle_that_looks_like_ours_and_is_not_is_refused(folder: Path, name: str, why: str, others: bool) -> None:
    (folder / "model.onnx").rename(folder / name)
    if not others:
        (folder / "model_quant.onnx").unlink()
    refused(folder, str(folder), name, why, "use")


def test_a_folder_without_tokens_is_refused(folder: Path) -> None:
    for tokens in folder.glob("tokens.*"):
        tokens.unlink()
    refused(folder, str(folder), "tokens.json, tokens.txt", "copy the bundle again")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_token_list_of_another_length_than_the_graph_is_refused(folder: Path, change: int) -> None:
    tokens = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    (folder / "tokens.json").write_text(json.dumps(tokens[:change] if change < 0 else [*tokens, "加"]))
    refused(folder, str(folder), f"{len(tokens) + change} tokens", str(len(tokens)), "copy it again")


@pytest.mark.parametrize(
    "text",
    ["{}", '["<blank>", 1, 2, 3, 4]', '["<blank>", "<s>"', "", "[]", '["<blank>"]', "\x00\x01"],
    ids=["no list", "no strings", "cut off", "empty file", "empty list", "one token", "no text"],
)
def test_a_damaged_tokens_json_is_refused(folder: Path, text: str) -> None:
    (folder / "tokens.json").write_text(text)
    refused(folder, str(folder / "tokens.json"), "copy the bundle again")


def test_tokens_that_are_not_utf_8_are_refused(folder: Path) -> None:
    (folder / "tokens.json").write_bytes('["打", "开", "客", "厅"]'.encode("gb18030"))
    refused(folder, str(folder / "tokens.json"), "copy the bundle again")


@pytest.mark.parametrize(
    ("line", "damaged"),
    [("<s> 1", "<s> 7"), ("<s> 1\n", ""), ("<s> 1", "<s> one"), ("<s> 1", "<s>"), ("<s> 1", "1"), ("<s> 1", "<s> 01")],
    ids=["wrong id", "line missing", "id in words", "id missing", "token missing", "id of another form"],
)
def test_token_ids_that_do_not_count_up_are_refused(folder: Path, line: str, damaged: str) -> None:
    as_sherpa(folder)
    text = (folder / "tokens.txt").read_text(encoding="utf-8")
    assert line in text
    (folder / "tokens.txt").write_text(text.replace(line, damaged, 1), encoding="utf-8")
    refused(folder, str(folder / "tokens.txt"), "count from 0", "copy the bundle again")


def cmvn(shift: str, scale: str) -> str:
    return (
        "<Nnet>\n<Splice> 560 560\n[ 0 ]\n<AddShift> 560 560\n<LearnRateCoef> 0 [ " + shift + " ]\n"
        "<Rescale> 560 560\n<LearnRateCoef> 0 [ " + scale + " ]\n</Nnet>\n"
    )


RIGHT = " ".join(["1.5"] * WIDTH)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (cmvn(RIGHT, "1 2 3"), "3 values, expected 560"),
        (cmvn(RIGHT + " 1", RIGHT), "561 values, expected 560"),
        (cmvn("", RIGHT), "0 values, expected 560"),
        (cmvn(RIGHT.replace("1.5", "nan", 1), RIGHT), "not finite"),
        (cmvn(RIGHT, RIGHT.replace("1.5", "-inf", 1)), "not finite"),
        (cmvn(RIGHT.replace("1.5", "eins", 1), RIGHT), "not a CMVN file"),
        (cmvn(RIGHT, RIGHT)[:3000], "<Rescale> is missing"),
        (cmvn(RIGHT, RIGHT).replace("AddShift", "Shift"), "<AddShift> is missing"),
        (cmvn(RIGHT, RIGHT).replace(f"<LearnRateCoef> 0 [ {RIGHT} ]", "", 1), "<AddShift> is missing"),
        ("", "<AddShift> is missing"),
    ],
    ids=[
        "short", "long", "without values", "nan", "infinite", "no number", "cut off", "another component",
        "component without values", "empty",
    ],
)  # fmt: skip
def test_a_damaged_normalisation_is_refused(folder: Path, text: str, why: str) -> None:
    (folder / "am.mvn").write_text(text)
    line = refused(folder, str(folder / "am.mvn"), why)
    assert "copy the bundle again" in line or "belongs to another model" in line


def test_a_right_normalisation_of_the_same_form_is_read(folder: Path) -> None:
    (folder / "am.mvn").write_text(cmvn(RIGHT, RIGHT))
    read = read_bundle(folder).cmvn
    assert read is not None
    np.testing.assert_array_equal(read.neg_mean, np.full(WIDTH, 1.5, np.float32))


def test_a_normalisation_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "am.mvn").write_bytes(b"\xff\xfe\x00\x80")
    refused(folder, str(folder / "am.mvn"), "not a CMVN file", "copy the bundle again")


def test_a_normalisation_that_is_a_folder_is_refused(folder: Path) -> None:
    (folder / "am.mvn").unlink()
    (folder / "am.mvn").mkdir()
    refused(folder, str(folder / "am.mvn"), "not a CMVN file", "copy the bundle again")


@pytest.mark.parametrize("share", [0, 0.5, 0.999], ids=["empty", "half", "nearly whole"])
def test_a_truncated_graph_is_refused(folder: Path, share: float) -> None:
    graph = folder / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[: int(len(content) * share)])
    refused(folder, str(graph), "copy the bundle again")


def test_a_pointer_of_git_lfs_is_no_graph(folder: Path) -> None:
    (folder / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 881000000\n")
    refused(folder, str(folder / "model.onnx"), "copy the bundle again")


def test_a_folder_that_cannot_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read") as caught:
        read_bundle(tmp_path / ("x" * 300))
    assert caught.value.exit_code == 3


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "or empty", "set `model`")


def test_a_token_list_that_is_nested_without_end_is_refused(folder: Path) -> None:
    (folder / "tokens.json").write_text("[" * 100_000)
    refused(folder, str(folder / "tokens.json"), "copy the bundle again")


def test_a_normalisation_out_of_all_bounds_is_refused(folder: Path) -> None:
    (folder / "am.mvn").write_text(cmvn(RIGHT, RIGHT.replace("1.5", "1e38")))
    refused(folder, str(folder), "no finite numbers", "copy the bundle again")


def test_a_graph_of_another_model_is_refused(folder: Path) -> None:
    shutil.copy(SILERO, folder / "model.onnx")
    refused(folder, str(folder / "model.onnx"), "no Paraformer graph", "set `model`")


def test_a_graph_of_another_model_without_normalisation_is_refused(folder: Path) -> None:
    as_sherpa(folder)
    shutil.copy(SILERO, folder / "model.onnx")
    refused(folder, str(folder), "no am.mvn", "copy the bundle again")


@pytest.mark.parametrize(
    "card",
    [
        "gates: [1, 2]",
        "gates: {min_confidence: high}",
        "- gates",
        "gates: {a: [",
        "\x00",
        "gates: {min_confidnce: 0.9}",
        "gates: {min_confidence: .nan}",
        "gates: {min_confidence: 90}",
    ],
    ids=["list", "no number", "no mapping", "no yaml", "no text", "unknown key", "nan", "per cent"],
)
def test_a_damaged_card_is_refused(folder: Path, card: str) -> None:
    (folder / "card.yaml").write_text(card)
    refused(folder, str(folder / "card.yaml"), "remove the file")


def test_a_graph_that_is_gone_when_it_is_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx: no such file; copy the bundle again"):
        OnnxNetwork(tmp_path / "model.onnx")


def test_the_bundled_model_has_both_graphs() -> None:
    assert {kind: path.name for kind, path in read_bundle(BUNDLE).files.items()} == {
        "onnx-fp32": "model.onnx",
        "onnx-int8": "model_quant.onnx",
    }
    assert bundle_of("onnx-int8").tokens == bundle_of("onnx-fp32").tokens
