"""The networks hold nothing but what every backend has: their operators, inputs, outputs and layout on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundled import BUNDLE
from random_engine import recognizer_of, weights_from
from random_weights import utterance

from edge_asr.engine.graph import FLOAT_OPERATORS, INT8_OPERATORS, Graph, decoder_graph, encoder_graph, product_graph
from edge_asr.engine.quantize import quantize
from edge_asr.engine.weights import Weights
from edge_asr.recognizer.onnx_network import OnnxNetwork

FORBIDDEN = {"If", "Loop", "Scan", "NonZero", "Range", "ScatterND", "CumSum"}
"""What TensorRT does not take, or takes badly."""
METADATA = {"input_scale": "12.0", "tail": "0.45", "vocabulary": "64", "batches": "true"}
INPUTS = {
    ("encoder", False): {"x": ["B", "T", 560], "mask": ["B", "T"]},
    ("encoder", True): {"x": [1, "T", 560]},
    ("decoder", False): {
        "enc": ["B", "T", 144],
        "cif": ["B", "N", "T"],
        "enc_mask": ["B", "T"],
        "emb_mask": ["B", "N"],
    },
    ("decoder", True): {"enc": [1, "T", 144], "cif": [1, "N", "T"]},
}


@pytest.fixture(scope="module")
def exact() -> Weights:
    return weights_from("tiny")


@pytest.fixture(scope="module", params=[False, True], ids=["fp32", "int8"])
def weights(request: pytest.FixtureRequest, exact: Weights) -> Weights:
    return quantize(exact) if request.param else exact


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def part(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def graph(weights: Weights, part: str) -> Graph:
    return encoder_graph(weights, METADATA) if part == "encoder" else decoder_graph(weights)


def nodes_in(graph: Any) -> Iterator[Any]:
    """Yield all nodes, those of branches and loops among them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_in(attribute.g)


def operators(model: Any) -> set[str]:
    return {node.op_type for node in nodes_in(model.graph)}


def test_only_listed_operators_are_used(graph: Graph, weights: Weights) -> None:
    assert operators(graph.model()) <= (INT8_OPERATORS if weights.quantized else FLOAT_OPERATORS)


def test_all_listed_operators_are_used(exact: Weights) -> None:
    graphs = [encoder_graph(exact, METADATA), decoder_graph(exact)]
    assert set().union(*(operators(graph.model()) for graph in graphs)) == FLOAT_OPERATORS
    rounded = quantize(exact)
    graphs = [encoder_graph(rounded, METADATA), decoder_graph(rounded)]
    used = set().union(*(operators(graph.model()) for graph in graphs))
    assert used - FLOAT_OPERATORS == INT8_OPERATORS - FLOAT_OPERATORS


def test_there_is_no_control_flow(graph: Graph) -> None:
    assert not operators(graph.model()) & FORBIDDEN
    assert not FORBIDDEN & INT8_OPERATORS


@pytest.mark.parametrize("name", ["model.onnx", "model_quant.onnx"])
def test_published_graphs_hold_what_the_networks_do_without(name: str) -> None:
    found = operators(onnx.load(str(BUNDLE / name))) & FORBIDDEN
    assert {"If", "Range", "ScatterND", "CumSum"} <= found


def test_float_networks_are_of_the_standard_domain_only(exact: Weights) -> None:
    for graph in (encoder_graph(exact, METADATA), decoder_graph(exact)):
        model = graph.model()
        assert {node.domain for node in nodes_in(model.graph)} == {""}
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == 17


def test_8_bit_networks_take_only_products_from_onnxruntime(exact: Weights) -> None:
    rounded = quantize(exact)
    for graph in (encoder_graph(rounded, METADATA), decoder_graph(rounded)):
        foreign = {(node.domain, node.op_type) for node in nodes_in(graph.model().graph) if node.domain}
        assert foreign == {("com.microsoft", "MatMulIntegerToFloat")}


def test_networks_pass_onnxs_own_checks(graph: Graph) -> None:
    """Operators of onnxruntime's domain it lets pass unseen; types and shapes of all others are inferred."""
    model = graph.model()
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert len(inferred.graph.node) == len(model.graph.node)


def test_inputs_are_as_documented(graph: Graph, weights: Weights, part: str) -> None:
    found = {value.name: shape(value) for value in graph.model().graph.input}
    assert found == INPUTS[part, weights.quantized]
    assert {value.type.tensor_type.elem_type for value in graph.model().graph.input} == {onnx.TensorProto.FLOAT}


def test_outputs_are_as_documented(graph: Graph, weights: Weights, part: str) -> None:
    batch = 1 if weights.quantized else "B"
    outputs = {value.name: (value.type.tensor_type.elem_type, shape(value)) for value in graph.model().graph.output}
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    assert (
        outputs
        == {
            "encoder": {"enc": (float32, [batch, "T", 144]), "alphas": (float32, [batch, "T"])},
            "decoder": {"ids": (int64, [batch, "N"]), "logp": (float32, [batch, "N"])},
        }[part]
    )


def shape(value: Any) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_the_encoder_carries_its_metadata(exact: Weights, tmp_path: Path) -> None:
    path, _ = encoder_graph(exact, METADATA).write(tmp_path, "encoder")
    network = OnnxNetwork(path, threads=1)
    assert dict(network.metadata) == METADATA
    network.close()


def test_a_network_on_disk_is_the_same_with_its_constants_beside_it(graph: Graph, tmp_path: Path) -> None:
    path, data = graph.write(tmp_path, "network")
    assert sorted(tmp_path.iterdir()) == sorted((path, data))
    assert path.stat().st_size < data.stat().st_size
    onnx.checker.check_model(str(path))
    inside, beside = graph.model(), onnx.load(str(path))
    for expected, found in zip(inside.graph.initializer, beside.graph.initializer, strict=True):
        ours, theirs = onnx.numpy_helper.to_array(found), onnx.numpy_helper.to_array(expected)
        assert (found.name, ours.dtype, ours.shape) == (expected.name, theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(ours, theirs)


def test_the_same_weights_give_the_same_files(exact: Weights, tmp_path: Path) -> None:
    first = [path.name for path in encoder_graph(exact, METADATA).write(tmp_path, "encoder")]
    again = [path.name for path in encoder_graph(weights_from("tiny"), METADATA).write(tmp_path, "encoder")]
    assert first == again


def test_unsigned_weights_give_the_same_answers_as_signed_ones(exact: Weights, tmp_path: Path) -> None:
    """What processors fall back to that multiply signed bytes inexactly."""
    rounded = quantize(exact)
    folders = [tmp_path / name for name in ("signed", "unsigned")]
    for folder in folders:
        folder.mkdir()
    signed, unsigned = (recognizer_of(rounded, "tiny", folder, signed=folder.name == "signed") for folder in folders)
    for index in range(2, 12):
        ours, expected = unsigned.decode(utterance(index)), signed.decode(utterance(index))
        for part in ("ids", "log_probabilities", "alphas"):
            np.testing.assert_array_equal(getattr(ours, part), getattr(expected, part), f"{index} {part}")


@pytest.mark.parametrize(("signed", "kind"), [(True, onnx.TensorProto.INT8), (False, onnx.TensorProto.UINT8)])
def test_weights_are_stored_with_or_without_a_sign(exact: Weights, signed: bool, kind: int, part: str) -> None:
    rounded = quantize(exact)
    graph = encoder_graph(rounded, METADATA, signed) if part == "encoder" else decoder_graph(rounded, signed)
    tensors = {tensor.name: tensor.data_type for tensor in graph.model().graph.initializer}
    products = [node for node in graph.model().graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert products
    for node in products:
        assert (tensors[node.input[1]], tensors[node.input[5]]) == (kind, kind)


def test_the_graph_that_tries_products_is_exact_for_small_numbers(tmp_path: Path) -> None:
    values = np.arange(-6, 6, dtype=np.int8).reshape(4, 3)
    path, *_ = product_graph(values).write(tmp_path, "product")
    network = OnnxNetwork(path, threads=1)
    product = network.run({"x": np.array([[1, 2, 3, 4]], np.uint8)})["y"]
    np.testing.assert_array_equal(product, [[1, 2, 3, 4]] @ values.astype(np.float32))
    network.close()
