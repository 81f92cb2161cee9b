"""Weights out of a published ONNX graph, in fp32 or int8: names are found by what a node is called or followed by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from edge_asr.engine.weights import (
    FIRST_BLOCK,
    SIGN,
    Array,
    Bytes,
    Matrix,
    Quantized,
    UnknownGraphError,
    Weights,
)
from edge_asr.errors import BundleError
from edge_asr.recognizer.model_config import ModelConfig

NOT_THERE = (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError)
"""What comes of looking for something in a graph that lacks it, or has something else there."""


T = TypeVar("T")


def read_graph(path: Path, config: ModelConfig) -> tuple[Weights, Mapping[str, str]]:
    """Return the weights of a published graph and its metadata; the graph's own numbers rise above those of `config`.

    Raises BundleError where the file is damaged, UnknownGraphError where it is another kind of graph.
    """
    try:
        model = onnx.load(str(path))
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        raise BundleError(f"{path}: damaged, or no ONNX graph; copy the bundle again ({error})") from error
    try:
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        return _Graph(model.graph).weights(config), metadata
    except NOT_THERE as error:
        raise UnknownGraphError(f"{type(error).__name__}: {error}") from error


class _Graph:
    """A graph with its edges in both directions."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes = list(graph.node)
        self._producer = {output: node for node in self._nodes for output in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self._nodes:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def weights(self, config: ModelConfig) -> Weights:
        matrices: dict[str, Matrix] = {}
        for node in self._nodes:
            if node.op_type in ("MatMul", "MatMulInteger") and self._is_constant(node.input[1]):
                matrices[self._module(node)] = self._matrix(node)
        vectors = {module_name(name): self._array(name) for name in self._parameters()}
        smooth_factor, noise_threshold = self._predictor_numbers()
        found = ModelConfig(
            heads=_first(self._heads(vectors), config.heads),
            input_scale=_first(self._input_scale(), config.input_scale),
            tail=_first(self._tail(), config.tail),
            smooth_factor=_first(smooth_factor, config.smooth_factor),
            noise_threshold=_first(noise_threshold, config.noise_threshold),
        )
        return Weights(matrices, vectors, found)

    def _parameters(self) -> Iterator[str]:
        """Yield the names of biases, LayerNorms and convolutions; exporters write equal ones once, with aliases."""
        for name in [*self._tensors, *(node.output[0] for node in self._nodes if node.op_type == "Identity")]:
            if re.match(r"(encoder|decoder|predictor)\.", name) and self._is_constant(name):
                yield name

    def _matrix(self, node: onnx.NodeProto) -> Matrix:
        if node.op_type == "MatMul":
            matrix: Array = self._array(node.input[1])
            return matrix
        values = self._array(node.input[1])
        columns = values.shape[1]
        zero_points = self._array(node.input[3]) if len(node.input) > 3 else np.zeros(columns, values.dtype)
        scales = np.asarray(self._scales(node), np.float32)
        return Quantized(
            _signed(values),
            np.ascontiguousarray(np.broadcast_to(scales.reshape(-1), columns)),
            np.ascontiguousarray(np.broadcast_to(_signed(zero_points).reshape(-1), columns)),
        )

    def _scales(self, node: onnx.NodeProto) -> Any:
        """Return the scales of a MatMulInteger: what its product is multiplied by is input scale times weight scale."""
        dequantised = self._next(self._next(node, "Cast"), "Mul")
        for name in dequantised.input:
            product = self._producer.get(name)
            if product is not None and product.op_type == "Mul":
                return next(self._array(factor) for factor in product.input if self._is_constant(factor))
        raise UnknownGraphError(f"{node.name} is not quantised as expected")

    def _module(self, node: onnx.NodeProto) -> str:
        """Return the module that a matrix belongs to."""
        behind = self._next(self._next(node, "Cast"), "Mul") if node.op_type == "MatMulInteger" else node
        for follower in self._consumers.get(behind.output[0], []):
            for name in follower.input:
                if follower.op_type == "Add" and self._is_constant(name) and name.endswith(".bias"):
                    return module_name(name.removesuffix(".bias"))
        if node.name.startswith("/"):
            path = node.name.strip("/").split("/")[:-1]
            return module_name(".".join(part for part, child in zip(path, [*path[1:], ""], strict=True)
                                        if not child.startswith(f"{part}.")))  # fmt: skip
        # Old exports name no nodes, and the decoder's w_2 has no bias: it stands behind the norm of its feed-forward.
        before = self._producer[node.input[0]]
        if before.op_type == "DynamicQuantizeLinear":
            before = self._producer[before.input[0]]
        for name in before.input:
            if name.endswith(".feed_forward.norm.bias"):
                return module_name(name.removesuffix("norm.bias") + "w_2")
        raise UnknownGraphError(f"a matrix without a name: {node.input[1]}")

    def _heads(self, vectors: dict[str, Array]) -> int | None:
        """Return the number of heads from the scale of the queries, `head_size ** -0.5`; None where it is not found."""
        width = len(vectors[f"{FIRST_BLOCK}.self_attn.linear_out.bias"])
        for node in self._nodes:
            if node.op_type == "Softmax":
                scores = self._producer[node.input[0]]
                for _ in self._nodes:  # a damaged graph may hold a circle
                    if scores.op_type not in ("Add", "Where", "Mul", "Div"):
                        break
                    scores = next(p for name in scores.input if (p := self._producer.get(name)) is not None)
                queries = self._producer[scores.input[0]]
                scale = next((s for name in queries.input if (s := self._scalar(name)) is not None), None)
                return None if not scale else round(width * scale**2)
        return None

    def _input_scale(self) -> float | None:
        scaled = next((node for node in self._consumers["speech"] if node.op_type == "Mul"), None)
        return None if scaled is None else next(s for name in scaled.input if (s := self._scalar(name)) is not None)

    def _tail(self) -> float | None:
        """Return what is added behind the last frame: a share, times the difference of two masks; None if not found."""
        found = set()
        for node in self._nodes:
            kinds = {self._producer[name].op_type for name in node.input if name in self._producer}
            if node.op_type == "Mul" and "Sub" in kinds:
                found |= {scale for name in node.input if (scale := self._scalar(name)) is not None and 0 < scale < 1}
        return found.pop() if len(found) == 1 else None

    def _predictor_numbers(self) -> tuple[float | None, float | None]:
        """Return smooth factor and noise threshold, by which the frames' shares are multiplied and lessened."""
        for node in self._nodes:
            if node.op_type == "Sigmoid" and self._is_biased(node.input[0], "predictor.cif_output.bias"):
                scaled = self._following(node, "Mul")
                lessened = scaled and self._following(scaled, "Sub")
                # The exporter leaves out what takes nothing away.
                return self._number(scaled), self._number(lessened) if lessened else 0.0
        return None, None

    def _is_biased(self, name: str, bias: str) -> bool:
        producer = self._producer.get(name)
        return producer is not None and bias in producer.input

    def _following(self, node: onnx.NodeProto, kind: str) -> onnx.NodeProto | None:
        return next((n for n in self._consumers.get(node.output[0], []) if n.op_type == kind), None)

    def _number(self, node: onnx.NodeProto | None) -> float | None:
        """Return the constant number among a node's inputs."""
        return None if node is None else next((s for name in node.input if (s := self._scalar(name)) is not None), None)

    def _next(self, node: onnx.NodeProto, kind: str) -> onnx.NodeProto:
        return next(follower for follower in self._consumers[node.output[0]] if follower.op_type == kind)

    def _is_constant(self, name: str) -> bool:
        return self._source(name) in self._tensors

    def _source(self, name: str) -> str:
        for _ in self._nodes:  # a damaged graph may hold a circle
            if name not in self._producer or self._producer[name].op_type != "Identity":
                break
            name = self._producer[name].input[0]
        return name

    def _array(self, name: str) -> Any:
        return numpy_helper.to_array(self._tensors[self._source(name)])

    def _scalar(self, name: str) -> float | None:
        """Return a constant number, be it an initialiser or a Constant node; None where it is something else."""
        producer = self._producer.get(name)
        if producer is not None and producer.op_type == "Constant":
            value = numpy_helper.to_array(producer.attribute[0].t)
        elif self._is_constant(name):
            value = self._array(name)
        else:
            return None
        return float(value) if value.size == 1 else None


def module_name(name: str) -> str:
    """Return FunASR's own name: its exporter wraps encoder and decoder once more."""
    return re.sub(r"^(encoder|decoder)\.model\.", r"\1.", name)


def _first(found: T | None, otherwise: T) -> T:
    return otherwise if found is None else found


def _signed(values: Any) -> Bytes:
    if values.dtype == np.uint8:
        signed: Bytes = (values ^ np.uint8(SIGN)).view(np.int8)
        return signed
    return np.asarray(values, np.int8)
