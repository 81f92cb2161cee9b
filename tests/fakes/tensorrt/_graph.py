"""An ONNX graph as TensorRT sees it: inputs, outputs, shapes that depend on each other, layers."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

LAYERS = {
    "ADD": "ELEMENTWISE", "SUB": "ELEMENTWISE", "MUL": "ELEMENTWISE", "DIV": "ELEMENTWISE", "POW": "ELEMENTWISE",
    "MAX": "ELEMENTWISE", "MIN": "ELEMENTWISE", "MATMUL": "MATRIX_MULTIPLY", "GEMM": "MATRIX_MULTIPLY",
    "CONV": "CONVOLUTION", "SOFTMAX": "SOFTMAX", "LOGSOFTMAX": "SOFTMAX", "RELU": "ACTIVATION", "SIGMOID": "ACTIVATION",
    "REDUCEMEAN": "REDUCE", "REDUCEMAX": "REDUCE", "REDUCESUM": "REDUCE", "REDUCELOGSUMEXP": "REDUCE", "SQRT": "UNARY",
    "EXP": "UNARY", "LOG": "UNARY", "NEG": "UNARY", "RECIPROCAL": "UNARY", "SHAPE": "SHAPE", "GATHER": "GATHER",
    "SLICE": "SLICE", "SPLIT": "SLICE", "PAD": "SLICE", "CONCAT": "CONCATENATION", "CONSTANT": "CONSTANT",
    "CAST": "CAST",
    "ARGMAX": "TOPK", "LAYERNORMALIZATION": "NORMALIZATION", "SQUEEZE": "SQUEEZE", "UNSQUEEZE": "UNSQUEEZE",
}  # fmt: skip
"""Kind of layer by operator; all others are SHUFFLE."""
UNSUPPORTED = {
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "SequenceEmpty",
    "StringNormalizer",
}
"""Operators of no release; those of other domains are not supported either."""
LATER = {"LayerNormalization": (8, 6)}
"""Operators by the release that brought them."""


def unsupported(model, release):
    """Yield the nodes that a release's parser refuses."""
    for index, node in enumerate(model.graph.node):
        known = node.domain in ("", "ai.onnx") and node.op_type not in UNSUPPORTED
        if not known or release < LATER.get(node.op_type, (0,)):
            yield index, node


class Tensor:
    """An input or an output of a graph."""

    def __init__(self, value):
        kind = value.type.tensor_type
        self.name = value.name
        self.dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        self.dims = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in kind.shape.dim]
        """Sizes; names where they are dynamic; None where nobody has said."""

    @property
    def shape(self):
        """Sizes, -1 where they are dynamic."""
        return tuple(size if isinstance(size, int) else -1 for size in self.dims)


class Graph:
    """A parsed model."""

    def __init__(self, model):
        self.model = model
        constants = {tensor.name for tensor in model.graph.initializer}
        self.inputs = {v.name: Tensor(v) for v in model.graph.input if v.name not in constants}
        self.outputs = {v.name: Tensor(v) for v in model.graph.output}
        self._shapes = {}

    @property
    def tensors(self):
        return {**self.inputs, **self.outputs}

    def bind(self, shapes):
        """Return the size of each named dimension. Raises ValueError where two inputs disagree."""
        sizes = {}
        for name, shape in shapes.items():
            for wanted, size in zip(self.inputs[name].dims, shape, strict=True):
                if isinstance(wanted, str) and sizes.setdefault(wanted, size) != size:
                    raise ValueError(f"{name}: dimension {wanted} is {size} here and {sizes[wanted]} elsewhere")
        return sizes

    def output_shape(self, name, shapes):
        """Return an output's shape for shapes of all inputs."""
        sizes = self.bind(shapes)
        known = [size if isinstance(size, int) else sizes.get(size) for size in self.outputs[name].dims]
        if None not in known:
            return tuple(known)
        key = tuple(sorted(shapes.items()))
        if key not in self._shapes:
            self._shapes[key] = self._infer(shapes)
        return self._shapes[key][name]

    def _infer(self, shapes):
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for value in model.graph.input:
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
                dim.dim_value = size
        for value in model.graph.output:
            for dim in value.type.tensor_type.shape.dim:
                dim.Clear()
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        return {value.name: Tensor(value).shape for value in inferred.graph.output}

    def layers(self):
        """Return name, kind of layer, number of inputs, and outputs with their numpy types, of each operator."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        kinds = {
            v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info
        }
        kinds |= {v.name: v.type.tensor_type.elem_type for v in self.model.graph.output}
        kinds |= {t.name: t.data_type for t in self.model.graph.initializer}
        found = [(t.name, "CONSTANT", 0, [(t.name, _numpy(t.data_type))]) for t in self.model.graph.initializer]
        for index, node in enumerate(self.model.graph.node):
            outputs = [(name, _numpy(kinds.get(name, TensorProto.FLOAT))) for name in node.output if name]
            name = node.name or f"(Unnamed Layer* {index}) [{node.op_type}]"
            found.append((name, LAYERS.get(node.op_type.upper(), "SHUFFLE"), len(node.input), outputs))
        return found


def _numpy(kind):
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind))
