"""Weights come out of every file that a Paraformer is published in, the same numbers under the same names."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundled import BUNDLE, PACKAGE
from onnx import numpy_helper
from random_engine import recognizer_of, weights_from
from random_weights import state_dict, utterance

from edge_asr.engine.checkpoint import read_checkpoint, weights_of
from edge_asr.engine.published import read_graph
from edge_asr.engine.quantize import KEPT, dequantize, quantize
from edge_asr.engine.weights import Quantized, UnknownGraphError, Weights, check
from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer.model_config import ModelConfig

FLOAT, QUANTIZED = "model.onnx", "model_quant.onnx"
GRAPHS = (FLOAT, QUANTIZED)
ModelProto = Any


@pytest.fixture(scope="module", params=GRAPHS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def published() -> dict[str, Weights]:
    return {name: read_graph(BUNDLE / name, ModelConfig())[0] for name in GRAPHS}


@pytest.fixture(scope="module")
def models() -> dict[str, ModelProto]:
    return {name: onnx.load(str(BUNDLE / name)) for name in GRAPHS}


def read_changed(model: ModelProto, change: Callable[[Any], None], folder: Path, config: ModelConfig) -> Weights:
    """Read a graph after a change to a copy of it."""
    changed = copy.deepcopy(model)
    change(changed.graph)
    path = folder / "model.onnx"
    path.write_bytes(changed.SerializeToString())
    weights, _ = read_graph(path, config)
    check(weights)
    return weights


def assert_same(ours: Weights, expected: Weights) -> None:
    assert set(ours.matrices) == set(expected.matrices)
    assert set(ours.vectors) == set(expected.vectors)
    for key, vector in expected.vectors.items():
        np.testing.assert_array_equal(ours.vectors[key], vector, key)
    for key, matrix in expected.matrices.items():
        found = ours.matrices[key]
        if isinstance(matrix, Quantized):
            assert isinstance(found, Quantized), key
            for part in ("values", "scales", "zero_points"):
                np.testing.assert_array_equal(getattr(found, part), getattr(matrix, part), f"{key} {part}")
        else:
            np.testing.assert_array_equal(np.asarray(found), matrix, key)
    assert ours.config == expected.config


# Published graphs


def test_all_that_the_networks_need_is_found(published: dict[str, Weights], name: str) -> None:
    weights = published[name]
    check(weights)
    assert (weights.encoder_blocks, weights.decoder_blocks) == (5, 2)
    assert weights.quantized == (name == QUANTIZED)


def test_both_published_graphs_hold_the_same_weights(published: dict[str, Weights]) -> None:
    exact, rounded = published[FLOAT], published[QUANTIZED]
    assert set(exact.matrices) == set(rounded.matrices)
    assert set(exact.vectors) == set(rounded.vectors)
    for key, vector in exact.vectors.items():
        np.testing.assert_array_equal(rounded.vectors[key], vector, key)
    for key, matrix in exact.matrices.items():
        found = rounded.matrices[key]
        assert isinstance(matrix, np.ndarray)
        if key in KEPT:
            np.testing.assert_array_equal(np.asarray(found), matrix, key)
        else:
            assert isinstance(found, Quantized), key
            assert (np.abs(found.dequantized() - matrix) <= found.scales).all(), key


def test_signed_bytes_mean_exactly_what_the_published_unsigned_ones_mean(
    models: dict[str, ModelProto], published: dict[str, Weights]
) -> None:
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in models[QUANTIZED].graph.initializer}
    nodes = [node for node in models[QUANTIZED].graph.node if node.op_type == "MatMulInteger"]
    meant = []
    for node in nodes:
        values, zero_points = (tensors[node.input[index]] for index in (1, 3))
        assert values.dtype == zero_points.dtype == np.uint8
        scales = tensors[node.input[1].replace("_quantized", "_scale")]
        meant.append((values.astype(np.float32) - zero_points.astype(np.float32)) * scales)
    found = [matrix for matrix in published[QUANTIZED].matrices.values() if isinstance(matrix, Quantized)]
    assert len(found) == len(meant) == 36
    for ours, expected in zip(found, meant, strict=True):  # in the order of the nodes
        assert ours.values.dtype == ours.zero_points.dtype == np.int8
        np.testing.assert_array_equal(ours.dequantized(), expected)


def test_one_quantised_input_may_meet_several_matrices(models: dict[str, ModelProto]) -> None:
    """As the encoder's frames meet the keys and values of each decoder block: the premise of the tests above."""
    nodes = models[QUANTIZED].graph.node
    inputs = [node.input[0] for node in nodes if node.op_type == "MatMulInteger"]
    assert len(set(inputs)) == len(inputs) - 1 == sum(node.op_type == "DynamicQuantizeLinear" for node in nodes)


def no_names(graph: Any) -> None:
    for node in graph.node:
        node.name = ""


def counted_names(graph: Any) -> None:
    """Name nodes as torch 1.x did."""
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"


def plain_numbers(graph: Any) -> None:
    """Name what has no name in torch by its number, as torch 1.x did."""
    no_names(graph)

    def numbered(name: str) -> str:
        return re.sub(r"^onnx::[A-Za-z]+_(\d+)", r"\1", name)

    for tensor in graph.initializer:
        tensor.name = numbered(tensor.name)
    for node in graph.node:
        node.input[:] = [numbered(name) for name in node.input]


def renumbered(graph: Any) -> None:
    """Give the matrices the numbers of another model, in another order."""
    counted_names(graph)
    constants = [tensor for tensor in graph.initializer if tensor.name.startswith("onnx::")]
    names = {tensor.name: f"onnx::MatMul_{9000 - index}" for index, tensor in enumerate(constants)}
    for tensor in constants:
        tensor.name = names[tensor.name]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def layer_norms_in_one_node(graph: Any) -> None:
    """Write LayerNorms as exports of opset 17 do."""
    producers = {output: node for node in graph.node for output in node.output}
    replaced = 0
    for node in graph.node:
        if node.op_type == "Add" and re.search(r"norm\d?\.bias$", node.input[1]):
            scaled = producers[node.input[0]]
            deviation = producers[producers[scaled.input[0]].input[0]]
            assert (scaled.op_type, deviation.op_type) == ("Mul", "Sub")
            inputs = [deviation.input[0], scaled.input[1], node.input[1]]
            outputs = list(node.output)
            node.CopyFrom(onnx.helper.make_node("LayerNormalization", inputs, outputs, name="", epsilon=1e-12))
            replaced += 1
    while remove_unused(graph):
        pass
    assert replaced == 24
    assert not [node for node in graph.node if node.op_type in ("Sqrt", "Pow")]


def remove_unused(graph: Any) -> int:
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    # What the branches of If use from outside.
    used |= {
        name
        for node in graph.node
        for attribute in node.attribute
        for inner in attribute.g.node
        for name in inner.input
    }
    unused = [node for node in graph.node if not set(node.output) & used]
    for node in unused:
        graph.node.remove(node)
    return len(unused)


def equal_ones_once(graph: Any) -> None:
    """Let every bias come out of an Identity, as exporters write parameters that are equal."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for name in [name for name in tensors if name.endswith(".bias")]:
        tensors[name].name = f"shared {name}"
        graph.node.insert(0, onnx.helper.make_node("Identity", [f"shared {name}"], [name]))


@pytest.mark.parametrize(
    "change", [no_names, counted_names, plain_numbers, renumbered, layer_norms_in_one_node, equal_ones_once]
)
def test_weights_are_found_however_an_exporter_names_them(
    models: dict[str, ModelProto], published: dict[str, Weights], name: str, change: Any, tmp_path: Path
) -> None:
    assert_same(read_changed(models[name], change, tmp_path, ModelConfig()), published[name])


def test_layer_norms_in_one_node_are_understood_without_names_too(
    models: dict[str, ModelProto], published: dict[str, Weights], name: str, tmp_path: Path
) -> None:
    def change(graph: Any) -> None:
        layer_norms_in_one_node(graph)
        plain_numbers(graph)

    assert_same(read_changed(models[name], change, tmp_path, ModelConfig()), published[name])


def test_one_scale_for_a_whole_matrix_is_understood(models: dict[str, ModelProto], tmp_path: Path) -> None:
    def change(graph: Any) -> None:
        for tensor in graph.initializer:
            if tensor.name.endswith("_scale"):
                tensor.CopyFrom(numpy_helper.from_array(np.float32(0.01), tensor.name))
            if tensor.name.endswith("_zero_point"):
                tensor.CopyFrom(numpy_helper.from_array(np.uint8(131), tensor.name))

    weights = read_changed(models[QUANTIZED], change, tmp_path, ModelConfig())
    original = {tensor.name: numpy_helper.to_array(tensor) for tensor in models[QUANTIZED].graph.initializer}
    values = [array for key, array in original.items() if key.endswith("_quantized")]
    found = [matrix for matrix in weights.matrices.values() if isinstance(matrix, Quantized)]
    for matrix in found:
        assert matrix.scales.shape == matrix.zero_points.shape == matrix.shape[1:]
        meant = [(array.astype(np.float32) - 131) * np.float32(0.01) for array in values if array.shape == matrix.shape]
        assert any(np.array_equal(matrix.dequantized(), expected) for expected in meant)


def test_unsigned_bytes_without_zero_points_count_from_zero(models: dict[str, ModelProto], tmp_path: Path) -> None:
    def change(graph: Any) -> None:
        for node in graph.node:
            if node.op_type == "MatMulInteger":
                del node.input[3]

    weights = read_changed(models[QUANTIZED], change, tmp_path, ModelConfig())
    for matrix in weights.matrices.values():
        if isinstance(matrix, Quantized):
            unsigned = matrix.values.view(np.uint8) ^ np.uint8(128)
            np.testing.assert_array_equal(matrix.dequantized(), unsigned.astype(np.float32) * matrix.scales)


def test_the_graphs_own_numbers_rise_above_the_configuration(published: dict[str, Weights], name: str) -> None:
    wrong = ModelConfig(heads=8, input_scale=3.0, tail=0.4, smooth_factor=0.5, noise_threshold=0.1)
    weights, _ = read_graph(BUNDLE / name, wrong)
    assert weights.config.heads == published[name].config.heads == 4
    assert weights.input_scale == pytest.approx(weights.width**0.5, rel=1e-6)
    assert weights.config.tail == pytest.approx(0.45)
    assert (weights.config.smooth_factor, weights.config.noise_threshold) == (1, 0)


def test_another_input_scale_in_the_graph_is_taken(models: dict[str, ModelProto], name: str, tmp_path: Path) -> None:
    """As the published small model scales by the square root of 512, not of its width."""

    def change(graph: Any) -> None:
        scaled = next(node for node in graph.node if node.op_type == "Mul" and "speech" in node.input)
        number = next(index for index, source in enumerate(scaled.input) if source != "speech")
        graph.initializer.append(numpy_helper.from_array(np.float32(22.62742), "sqrt 512"))
        scaled.input[number] = "sqrt 512"

    weights = read_changed(models[name], change, tmp_path, ModelConfig())
    assert weights.input_scale == pytest.approx(22.62742)


def test_without_an_input_scale_it_is_the_root_of_the_width() -> None:
    assert weights_from("tiny").input_scale == 12


def test_a_graph_of_another_kind_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    silero = PACKAGE / "speech" / "silero_vad.onnx"
    with pytest.raises(UnknownGraphError):
        check(read_graph(silero, ModelConfig())[0])
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 1000)
    with pytest.raises(BundleError, match=r"model\.onnx: damaged, or no ONNX graph"):
        read_graph(tmp_path / "model.onnx", ModelConfig())
    with pytest.raises(BundleError, match=r"none\.onnx: damaged, or no ONNX graph"):
        read_graph(tmp_path / "none.onnx", ModelConfig())


# 8 bits


def test_quantised_weights_are_within_half_a_step() -> None:
    exact = weights_from("tiny")
    rounded = quantize(exact)
    for key, matrix in exact.matrices.items():
        found = rounded.matrices[key]
        assert isinstance(matrix, np.ndarray)
        if key in KEPT:
            assert found is matrix
            continue
        assert isinstance(found, Quantized)
        assert not found.zero_points.any()
        assert np.abs(found.values.astype(int)).max() == 127
        assert (np.abs(found.dequantized() - matrix) <= found.scales * 0.50001).all()
    assert rounded.quantized
    assert not exact.quantized


def test_a_matrix_of_zeros_stays_zeros() -> None:
    key = "encoder.encoders.0.feed_forward.w_1"
    weights = weights_from("tiny", **{f"{key}.weight": np.zeros((576, 144), np.float32)})
    matrix = quantize(weights).matrices[key]
    assert isinstance(matrix, Quantized)
    assert not matrix.dequantized().any()


def test_dequantised_weights_are_in_float_all_over(published: dict[str, Weights]) -> None:
    weights = dequantize(published[QUANTIZED])
    assert not weights.quantized
    check(weights)
    for key, matrix in published[QUANTIZED].matrices.items():
        expected = matrix.dequantized() if isinstance(matrix, Quantized) else matrix
        np.testing.assert_array_equal(np.asarray(weights.matrices[key]), expected, key)


# Checkpoints


def test_a_state_dict_has_all_that_is_needed() -> None:
    weights = weights_of(state_dict("tiny"), ModelConfig())
    check(weights)
    assert (weights.width, weights.vocabulary) == (144, 64)
    assert (weights.encoder_blocks, weights.decoder_blocks) == (5, 2)


MORE = {
    "decoder.embed.0.weight": (64, 144),
    "seaco_decoder.decoders.0.feed_forward.w_1.weight": (64, 144),
    "seaco_decoder.output_layer.weight": (7, 7),
    "bias_encoder.weight_ih_l0": (576, 144),
    "bias_embed.weight": (64, 144),
    "hotword_output_layer.weight": (64, 144),
    "predictor.upsample_cnn.weight": (144, 144, 3),
    "predictor.blstm.weight_ih_l0": (576, 144),
    "predictor.cif_output2.weight": (1, 288),
    "ctc.ctc_lo.weight": (64, 144),
    "criterion_att.steps": (),
}


def test_a_checkpoint_with_more_than_is_needed_is_accepted(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    more = {key: np.asarray(drawn.standard_normal(shape), np.float32) for key, shape in MORE.items()}
    weights = weights_of({**more, **state_dict("tiny")}, ModelConfig())
    check(weights)
    plain, rich = (recognizer_of(w, "tiny", tmp_path) for w in (weights_from("tiny"), weights))
    ours, expected = rich.decode(utterance(7)), plain.decode(utterance(7))
    np.testing.assert_array_equal(ours.log_probabilities, expected.log_probabilities)


NEEDED = (
    "encoder.encoders0.0.norm1.weight",
    "encoder.encoders0.0.self_attn.linear_q_k_v.weight",
    "encoder.encoders.3.self_attn.fsmn_block.weight",
    "encoder.encoders.4.feed_forward.w_2.bias",
    "encoder.after_norm.weight",
    "encoder.after_norm.bias",
    "predictor.cif_conv1d.weight",
    "predictor.cif_output.weight",
    "predictor.cif_output.bias",
    "decoder.decoders.1.src_attn.linear_k_v.weight",
    "decoder.decoders.0.feed_forward.norm.bias",
    "decoder.decoders.0.feed_forward.w_2.weight",
    "decoder.decoders3.0.norm1.weight",
    "decoder.decoders3.0.feed_forward.w_1.weight",
    "decoder.after_norm.bias",
    "decoder.output_layer.weight",
    "decoder.output_layer.bias",
)


@pytest.mark.parametrize("missing", NEEDED)
def test_what_is_missing_is_named(missing: str) -> None:
    parameters = state_dict("tiny")
    del parameters[missing]
    with pytest.raises(UnknownGraphError, match=f"^no {re.escape(missing.removesuffix('.weight'))}"):
        check(weights_of(parameters, ModelConfig()))


@pytest.mark.parametrize("wrong", [name for name in NEEDED if name != "encoder.after_norm.weight"])  # it is the width
def test_what_has_the_wrong_shape_is_named(wrong: str) -> None:
    parameters = state_dict("tiny")
    parameters[wrong] = parameters[wrong][:-1]
    with pytest.raises(UnknownGraphError, match=r"^\S+ is of shape \[[\d, ]*\], expected \[[-\d, ]+\]$"):
        check(weights_of(parameters, ModelConfig()))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UnknownGraphError, match="7 heads do not divide a width of 144"):
        check(weights_of(state_dict("tiny"), ModelConfig(heads=7)))


def test_without_torch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=r"^[^\n]*model\.pt: [^\n]*pip install 'edge-asr\[checkpoint\]'[^\n]*$"):
        read_checkpoint(tmp_path / "model.pt", ModelConfig())


@pytest.mark.parametrize("archive", [False, True], ids=["before torch 1.6", "today"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_of_torch_is_read(wrapped: bool, archive: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(value.copy()) for name, value in state_dict("tiny").items()}
    tensors["steps"] = torch.tensor(5)
    saved = {"state_dict": tensors, "epoch": 3} if wrapped else tensors
    torch.save(saved, tmp_path / "model.pt", _use_new_zipfile_serialization=archive)
    weights = read_checkpoint(tmp_path / "model.pt", ModelConfig())
    expected = weights_of({**state_dict("tiny"), "steps": np.array(5, np.float32)}, ModelConfig())
    assert_same(weights, expected)


class Torch:
    """Of torch, what reads a checkpoint; like it, this maps nothing but archives."""

    is_tensor = staticmethod(lambda value: False)

    def __init__(self, error: Exception | None = None) -> None:
        self.mapped: list[bool] = []
        self._error = error

    def load(self, path: str, *, map_location: str, weights_only: bool, mmap: bool) -> dict[str, int]:
        self.mapped.append(mmap)
        if self._error is not None:
            raise self._error
        if mmap and not Path(path).read_bytes().startswith(b"PK\x03\x04"):
            raise RuntimeError("mmap can only be used with files saved with `_use_new_zipfile_serialization=True`")
        return {"epoch": 3}


@pytest.mark.parametrize(("content", "mapped"), [(b"PK\x03\x04rest", True), (b"\x80\x02\x8a\nl", False)])
def test_only_archives_are_mapped(
    content: bytes, mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = Torch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    (tmp_path / "model.pb").write_bytes(content)
    assert not read_checkpoint(tmp_path / "model.pb", ModelConfig()).matrices
    assert torch.mapped == [mapped]


@pytest.mark.parametrize("said", ["", "Weights only load failed.\nAnd much more."])
def test_whatever_torch_says_of_a_checkpoint_is_one_line(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", Torch(RuntimeError(said)))
    (tmp_path / "model.pt").write_bytes(b"")
    reason = re.escape(said.partition("\n")[0] or "RuntimeError")
    with pytest.raises(BundleError, match=rf"^[^\n]*model\.pt: damaged, [^\n]*\({reason}\)\Z"):
        read_checkpoint(tmp_path / "model.pt", ModelConfig())


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(BundleError, match=r"^[^\n]*model\.pt: damaged, or no checkpoint of torch[^\n]*$"):
        read_checkpoint(tmp_path / "model.pt", ModelConfig())
