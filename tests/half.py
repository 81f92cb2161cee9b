"""A backend that computes node by node in numpy and rounds to FP16 whatever is FP16, infinity and all, as a GPU does.

onnxruntime on a CPU computes FP16 nodes in FP32, so that what overflows on a GPU comes out finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edge_asr.engine.graph import Graph
from edge_asr.recognizer.network import Arrays

Array = npt.NDArray[Any]
TYPES: dict[int, Any] = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.INT32: np.int32,
}


class HalfNetwork:
    """A graph, run node by node; see Network."""

    def __init__(self, graph: Graph, narrow_sums: bool = False) -> None:
        """`narrow_sums`: products of FP16 are added up in FP16, a few at a time."""
        self._operators = {**OPERATORS, "MatMul": _narrow_product} if narrow_sums else OPERATORS
        self._graph = graph
        self._last = _last_readers(graph)

    @property
    def metadata(self) -> Mapping[str, str]:
        return {entry.key: entry.value for entry in self._graph.skeleton.metadata_props}

    def run(self, inputs: Arrays) -> Arrays:
        """Compute; what overflows is infinite, not an error."""
        skeleton, known = self._graph.skeleton.graph, {**self._graph.tensors, **inputs}
        with np.errstate(all="ignore"):
            for number, node in enumerate(skeleton.node):
                arrays = [known[name] for name in node.input]
                attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
                answers = self._operators[node.op_type](*arrays, **attributes)
                known.update(zip(node.output, answers if isinstance(answers, list) else [answers], strict=True))
                for name in self._last.get(number, ()):
                    del known[name]
        return {output.name: known[output.name] for output in skeleton.output}

    def close(self) -> None:
        """Nothing is open."""


def _last_readers(graph: Graph) -> dict[int, list[str]]:
    """Return the activations that nobody reads behind a node, by its number: a large network would take too much."""
    readers = {name: number for number, node in enumerate(graph.skeleton.graph.node) for name in node.input}
    kept = {*graph.tensors, *(value.name for value in graph.skeleton.graph.output)}
    last: dict[int, list[str]] = {}
    for name, number in readers.items():
        if name not in kept:
            last.setdefault(number, []).append(name)
    return last


def _same_type(*arrays: Array) -> Any:
    """Return the type of all; a network that mixes them would fail to load."""
    kinds = {array.dtype for array in arrays}
    assert len(kinds) == 1, kinds
    return kinds.pop()


def _single(function: Callable[..., Array]) -> Callable[..., Array]:
    """Compute in FP32, as tensor cores add up, and round what comes out to the type that went in."""

    def rounded(*arrays: Array, **attributes: Any) -> Array:
        kind = _same_type(*arrays)
        return function(*(array.astype(np.float32, copy=False) for array in arrays), **attributes).astype(kind)

    return rounded


def _narrow_product(a: Array, b: Array) -> Array:
    if _same_type(a, b) != np.float16:
        product: Array = np.matmul(a, b)
        return product
    total: Array = np.zeros((), np.float16)
    for start in range(0, a.shape[-1], 16):
        few = a[..., start : start + 16].astype(np.float32) @ b[..., start : start + 16, :].astype(np.float32)
        total = (total + few).astype(np.float16)
    return total


def _conv(x: Array, weight: Array, *bias: Array, kernel_shape: list[int], pads: list[int], group: int = 1) -> Array:
    """Convolve along the last axis; axes between it and the channels are of size 1."""
    shape, size = x.shape, kernel_shape[-1]
    assert set(shape[2:-1]) <= {1}
    rows = x.reshape(shape[0], shape[1], shape[-1])
    before, after = pads[len(pads) // 2 - 1], pads[-1]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(rows, ((0, 0), (0, 0), (before, after))), size, axis=-1)
    kernels = weight.reshape(len(weight), -1, size)
    if group == 1:
        y = np.einsum("bctk,ock->bot", windows, kernels, optimize=True)
    else:
        assert group == shape[1]
        y = np.einsum("bctk,ck->bct", windows, kernels[:, 0], optimize=True)
    convolved: Array = y + bias[0][:, None] if bias else y
    return convolved.reshape(shape[0], len(weight), *shape[2:-1], y.shape[-1])


def _norm(x: Array, weight: Array, bias: Array, axis: int, epsilon: float) -> Array:
    centred = x - x.mean(axis=axis, keepdims=True)
    variance = np.square(centred).mean(axis=axis, keepdims=True)
    normed: Array = centred / np.sqrt(variance + np.float32(epsilon)) * weight + bias
    return normed


def _softmax(x: Array, axis: int) -> Array:
    """In FP16 each step is rounded: the worst that a kernel may do."""
    shares = np.exp(x - x.max(axis=axis, keepdims=True))
    total: Array = shares / shares.sum(axis=axis, keepdims=True)
    return total


def _log_softmax(x: Array, axis: int) -> Array:
    shifted = x - x.max(axis=axis, keepdims=True)
    logarithms: Array = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return logarithms


def _reshape(x: Array, sizes: Array) -> Array:
    return x.reshape([x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(sizes)])


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _single(np.add),
    "ArgMax": lambda x, axis, keepdims: x.argmax(axis=axis),
    "Cast": lambda x, to: x.astype(TYPES[to]),
    "Conv": _single(_conv),
    "Div": _single(np.divide),
    "LayerNormalization": _single(_norm),
    "LogSoftmax": _single(_log_softmax),
    "MatMul": _single(np.matmul),
    "Mul": _single(np.multiply),
    "ReduceMax": lambda x, axes, keepdims: x.max(axis=tuple(axes), keepdims=bool(keepdims)),
    "ReduceMean": _single(lambda x, axes, keepdims: x.mean(axis=tuple(axes), keepdims=bool(keepdims))),
    "Relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "Reshape": _reshape,
    "Sigmoid": _single(lambda x: 1 / (1 + np.exp(-x))),
    "Softmax": _softmax,
    "Split": lambda x, sizes, axis: np.split(x, np.cumsum(sizes)[:-1], axis=axis),
    "Sqrt": _single(np.sqrt),
    "Squeeze": lambda x, axes: np.squeeze(x, axis=tuple(axes)),
    "Sub": _single(np.subtract),
    "Transpose": lambda x, perm: np.transpose(x, perm),
    "Unsqueeze": lambda x, axes: np.expand_dims(x, tuple(axes)),
}
"""Sums of two FP16 numbers and the like are the same whether rounded once or from FP32."""
