"""Damaged graphs end in a clear error or in a working engine; nothing crashes, nothing else is raised."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundled import BUNDLE, REPOSITORY
from damage import DAMAGES, NAMES
from onnx import numpy_helper

from edge_asr.engine import published
from edge_asr.engine.build import build_engine
from edge_asr.engine.weights import UnknownGraphError, check
from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer.bundle import FP32, INT8, read_bundle
from edge_asr.recognizer.model_config import ModelConfig

KINDS = sorted(NAMES)
OUTCOME = re.compile(r"(engine|BundleError|EngineError)<[^\n]+> (whole|BundleError|EngineError)<[^\n]*>")


def outcomes(folder: Path, kind: str, first: int, count: int, damages: list[str]) -> list[str]:
    """Let a child handle cases of each damage; return what it says of each."""
    command = [sys.executable, "-W", "error", str(REPOSITORY / "tests" / "damage.py"), kind, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    child = subprocess.run(
        [*command, str(first), str(count), *damages],
        env=environment, capture_output=True, text=True, errors="replace", timeout=1_800, check=False,
    )  # fmt: skip
    cases = child.stdout.split("\ncase ")[1:]
    assert child.returncode == 0, f"ended with {child.returncode} at {cases[-1:]}: {child.stderr[-2000:]}"
    assert len(cases) == count * len(damages)
    # onnxruntime may print before the last line where a name is no text.
    said = [case.splitlines()[-1] for case in cases]
    for case, outcome in zip(cases, said, strict=True):
        assert OUTCOME.fullmatch(outcome), case
    return said


def test_damaged_graphs_end_in_a_clear_error_or_a_working_engine(tmp_path: Path) -> None:
    said = outcomes(
        tmp_path, "onnx-int8", 0, 1, ["cut", "flip_header", "flip_anywhere", "reshape_tensor", "rename_input"]
    )
    assert any(outcome.startswith("engine<") for outcome in said), "damages of every kind are refused"
    assert any(outcome.startswith("BundleError<") for outcome in said)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_graphs_end_in_a_clear_error_or_a_working_engine(kind: str, damage: str, tmp_path: Path) -> None:
    outcomes(tmp_path, kind, 0, 25, [damage])


def copied(folder: Path, change: Any, name: str = "model.onnx") -> Path:
    """Return a copy of the bundled model with one of its graphs, which is changed."""
    folder.mkdir()
    for side_file in ("am.mvn", "tokens.json", "config.yaml"):
        shutil.copy(BUNDLE / side_file, folder)
    model = onnx.load(str(BUNDLE / name))
    change(model.graph)
    onnx.save(model, str(folder / name))
    return folder


def swap_sign(graph: Any) -> None:
    """The weights stay what they are, but the second block's output is taken off the stream."""
    node = next(node for node in graph.node if node.name == "/encoder/encoders/encoders.1/Add")
    node.op_type = "Sub"


def triple_a_norm(graph: Any) -> None:
    """What a norm divides is three times as large, behind the division."""
    node = next(node for node in graph.node if node.name == "/encoder/encoders/encoders.0/norm1/Div")
    graph.initializer.append(numpy_helper.from_array(np.float32(3), "three"))
    tripled = onnx.helper.make_node("Mul", [node.output[0], "three"], ["tripled"], name="triple")
    for other in graph.node:
        for index, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[index] = "tripled"
    graph.node.insert(list(graph.node).index(node) + 1, tripled)


@pytest.mark.parametrize("change", [swap_sign, triple_a_norm])
def test_an_engine_that_answers_otherwise_than_the_published_graph_is_refused(change: Any, tmp_path: Path) -> None:
    bundle = read_bundle(copied(tmp_path / "bundle", change))
    published.read_graph(bundle.files[FP32], ModelConfig())  # nothing is wrong with the weights
    with pytest.raises(EngineError, match=r"^[^\n]*model\.onnx: not a Paraformer that can be [^\n]*token"):
        build_engine(bundle, FP32, tmp_path / "engine", threads=1)
    assert list((tmp_path / "engine").iterdir()) == []


def no_zero_point(graph: Any) -> None:
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name.endswith("_zero_point")))


def no_inputs(graph: Any) -> None:
    del next(node for node in graph.node if node.op_type == "MatMulInteger").input[:]


def no_cast(graph: Any) -> None:
    product = next(node for node in graph.node if node.op_type == "MatMulInteger")
    next(node for node in graph.node if node.input and node.input[0] == product.output[0]).op_type = "Relu"


def infinite_queries(graph: Any) -> None:
    """The scale of the queries, which tells the heads, is no number that heads could have."""
    node = next(node for node in graph.node if node.op_type == "Softmax")
    producers = {output: other for other in graph.node for output in other.output}
    node = producers[node.input[0]]
    while node.op_type != "MatMul":
        node = next(producers[name] for name in node.input if name in producers)
    scaled = producers[node.input[0]]
    constant = producers[scaled.input[1]]
    constant.attribute[0].t.CopyFrom(numpy_helper.from_array(np.float32(np.inf)))


def flat_matrix(graph: Any) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name.endswith("_quantized"))
    del tensor.dims[1:]


@pytest.mark.parametrize("change", [no_zero_point, no_inputs, no_cast, infinite_queries, flat_matrix])
def test_what_a_graph_lacks_is_said_in_one_line(change: Any, tmp_path: Path) -> None:
    bundle = read_bundle(copied(tmp_path / "bundle", change, "model_quant.onnx"))
    with pytest.raises(
        EngineError, match=r"^[^\n]*model_quant\.onnx: not a Paraformer that can be taken apart [^\n]*$"
    ):
        build_engine(bundle, INT8, tmp_path / "engine", threads=1)


def test_a_circle_of_names_ends(tmp_path: Path) -> None:
    def circle(graph: Any) -> None:
        pairs = (("a", "b"), ("b", "a"))
        graph.node.extend(onnx.helper.make_node("Identity", [source], [name]) for source, name in pairs)
        next(node for node in graph.node if node.op_type == "MatMul").input[1] = "a"

    bundle = read_bundle(copied(tmp_path / "bundle", circle))
    with pytest.raises(UnknownGraphError, match=r"no encoder\.encoders0\.0\.self_attn\.linear_q_k_v"):
        read_and_check(bundle.graph)


def test_a_circle_behind_the_softmax_ends(tmp_path: Path) -> None:
    def circle(graph: Any) -> None:
        node = next(node for node in graph.node if node.op_type == "Softmax")
        scores = next(other for other in graph.node if other.output[0] == node.input[0])
        scores.op_type = "Add"
        for index in range(len(scores.input)):
            scores.input[index] = scores.output[0]

    bundle = read_bundle(copied(tmp_path / "bundle", circle))
    with pytest.raises(BundleError, match="not acyclic"):
        build_engine(bundle, FP32, tmp_path / "engine", threads=1)


def test_weights_in_a_file_that_is_missing_are_a_damaged_bundle(tmp_path: Path) -> None:
    def elsewhere(graph: Any) -> None:
        onnx.external_data_helper.set_external_data(graph.initializer[0], location="weights.bin", offset=0, length=8)
        graph.initializer[0].ClearField("raw_data")

    bundle = read_bundle(copied(tmp_path / "bundle", elsewhere))
    with pytest.raises(BundleError, match=r"^[^\n]*model\.onnx: damaged[^\n]*$"):
        build_engine(bundle, FP32, tmp_path / "engine", threads=1)


def read_and_check(graph: Path) -> None:
    weights, _ = published.read_graph(graph, ModelConfig())
    check(weights)
