"""The two networks of a Paraformer, written as ONNX graphs.

Encoder: `x` f32 `[B, T, 560]`, `mask` f32 `[B, T]` -> `enc` f32 `[B, T, d]`, `alphas` f32 `[B, T]`.
Decoder: `enc`, `enc_mask` f32 `[B, T]`, `cif` f32 `[B, N, T]`, `emb_mask` f32 `[B, N]` -> `ids` i64 `[B, N]` (the best
token) and `logp` f32 `[B, N]` (its log-probability). 1 in a mask: a frame or token that counts.

Quantised weights give graphs for one utterance (B = 1) without masks: activations are scaled over the whole input, so
what is padded or batched would change the others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_asr.engine.weights import (
    DECODER_BLOCK,
    ENCODER_BLOCK,
    FIRST_BLOCK,
    LAST_BLOCK,
    OUTPUT,
    PREDICTOR_OUTPUT,
    SIGN,
    Bytes,
    Quantized,
    Weights,
)
from edge_asr.recognizer.features import WIDTH

OPSET = 17
IR_VERSION = 8
LARGE = 1024
"""Bytes from which a constant goes into the data file; what shapes are made of must be in the graph."""
PAGE = 4096
HASH_DIGITS = 12
"""Of the hash in a file's name."""
CONTRIB = "com.microsoft"
"""onnxruntime's own operators: 8-bit products with the scales in the same pass."""
LAYER_NORM_EPSILON = 1e-12
HIDDEN = -1e4
"""Added to the scores of what is masked, as FunASR does; -inf would turn to NaN in half precision."""

FLOAT_OPERATORS = frozenset(
    "Add ArgMax Conv LayerNormalization LogSoftmax MatMul Mul ReduceMax Relu Reshape Sigmoid Softmax Split Squeeze Sub"  # noqa: SIM905
    " Transpose Unsqueeze".split()
)
"""All that the networks consist of: every backend has them, and no control flow."""
INT8_OPERATORS = FLOAT_OPERATORS | {"DynamicQuantizeLinear", "MatMulIntegerToFloat"}


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph, and apart from it the constants that it holds: they are most of it, and are not to be copied about."""

    skeleton: onnx.ModelProto
    """Everything but the constants."""
    tensors: Mapping[str, npt.NDArray[Any]]

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write `<name>-<hash>.onnx`, and its large constants beside it in `<name>-<hash>.data`; return both paths.

        Constants in a file of their own are mapped into memory, not read: so a network loads in a third of the time and
        takes a quarter less memory.
        """
        draft = folder / f"{name}.draft"
        with draft.open("wb") as file:
            places, digest = self._write_constants(file)
            _flush(file)
        data = draft.replace(folder / f"{name}-{digest[:HASH_DIGITS]}.data")
        model = self._referring(places, data.name).SerializeToString()
        path = folder / f"{name}-{hashlib.sha256(model).hexdigest()[:HASH_DIGITS]}.onnx"
        with path.open("wb") as file:
            file.write(model)
            _flush(file)
        return path, data

    def model(self) -> onnx.ModelProto:
        """Return the graph with its constants inside."""
        return self._referring({}, "")

    def _write_constants(self, file: BinaryIO) -> tuple[dict[str, tuple[int, int]], str]:
        """Write large constants one behind the other; return offset and length of each, and the hash of all."""
        places, digest, end = {}, hashlib.sha256(), 0
        for name, array in self.tensors.items():
            if array.nbytes >= LARGE:
                start = -(-end // PAGE) * PAGE
                for part in (bytes(start - end), np.ascontiguousarray(array).data.cast("B")):
                    file.write(part)
                    digest.update(part)
                places[name], end = (start, array.nbytes), start + array.nbytes
        return places, digest.hexdigest()

    def _referring(self, places: Mapping[str, tuple[int, int]], data: str) -> onnx.ModelProto:
        """Return the graph with its constants inside, but for those that lie in the file `data`."""
        model = onnx.ModelProto()
        model.CopyFrom(self.skeleton)
        for name, array in self.tensors.items():
            if name in places:
                model.graph.initializer.append(_elsewhere(name, array, data, *places[name]))
            else:
                model.graph.initializer.append(
                    numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
                )
        return model


def _elsewhere(name: str, array: npt.NDArray[Any], data: str, offset: int, length: int) -> onnx.TensorProto:
    constant = onnx.TensorProto(name=name, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
    constant.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    for key, value in (("location", data), ("offset", offset), ("length", length)):
        constant.external_data.add(key=key, value=str(value))
    return constant


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def encoder_graph(weights: Weights, metadata: Mapping[str, str], signed: bool = True) -> Graph:
    """Return the encoder network; `metadata` travels in it. `signed`: of 8-bit weights."""
    author = _Author(weights, signed)
    masked = not weights.quantized
    hidden = author.hidden("mask") if masked else None
    frames = author.column("mask") if masked else None

    normed = author.norm("x", f"{FIRST_BLOCK}.norm1")
    stream = author.self_attention(normed, f"{FIRST_BLOCK}.self_attn", hidden, frames)
    for block in (FIRST_BLOCK, *(ENCODER_BLOCK.format(i) for i in range(weights.encoder_blocks))):
        if block != FIRST_BLOCK:
            normed = author.norm(stream, f"{block}.norm1")
            attended = author.self_attention(normed, f"{block}.self_attn", hidden, frames)
            stream = author.op("Add", stream, attended)
        normed = author.norm(stream, f"{block}.norm2")
        stream = author.op("Add", stream, author.encoder_feed_forward(normed, f"{block}.feed_forward"))
    author.norm(stream, "encoder.after_norm", output="enc")
    author.alphas("enc", "mask" if masked else None, frames)

    batch: Any = "B" if masked else 1
    inputs = {"x": [batch, "T", WIDTH], **({"mask": [batch, "T"]} if masked else {})}
    return author.model("encoder", inputs, {"enc": [batch, "T", weights.width], "alphas": [batch, "T"]}, metadata)


def decoder_graph(weights: Weights, signed: bool = True) -> Graph:
    """Return the decoder network."""
    author = _Author(weights, signed)
    masked = not weights.quantized
    hidden = author.hidden("enc_mask") if masked else None
    tokens = author.column("emb_mask") if masked else None

    stream = author.op("MatMul", "cif", "enc")
    for block in (DECODER_BLOCK.format(i) for i in range(weights.decoder_blocks)):
        normed = author.norm(stream, f"{block}.norm1")
        normed = author.norm(author.decoder_feed_forward(normed, f"{block}.feed_forward"), f"{block}.norm2")
        stream = author.op("Add", stream, author.memory(normed, f"{block}.self_attn.fsmn_block", tokens))
        normed = author.norm(stream, f"{block}.norm3")
        stream = author.op("Add", stream, author.cross_attention(normed, f"{block}.src_attn", hidden))
    normed = author.norm(stream, f"{LAST_BLOCK}.norm1")
    normed = author.norm(author.decoder_feed_forward(normed, f"{LAST_BLOCK}.feed_forward"), "decoder.after_norm")
    scores = author.op("LogSoftmax", author.linear(normed, OUTPUT), axis=-1)
    author.op("ArgMax", scores, output="ids", axis=-1, keepdims=0)
    author.op("ReduceMax", scores, output="logp", axes=[-1], keepdims=0)

    batch: Any = "B" if masked else 1
    inputs = {"enc": [batch, "T", weights.width], "cif": [batch, "N", "T"]}
    if masked:
        inputs = {**inputs, "enc_mask": [batch, "T"], "emb_mask": [batch, "N"]}
    return author.model("decoder", inputs, {"ids": [batch, "N"], "logp": [batch, "N"]}, {})


class _Author:
    """A graph in the making: each method adds nodes and returns the name of what they compute."""

    def __init__(self, weights: Weights, signed: bool = True) -> None:
        self._weights = weights
        self._sign = np.uint8(0 if signed else SIGN)
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, npt.NDArray[Any]] = {}
        self._quantized: dict[str, Sequence[str]] = {}

    def op(self, kind: str, *inputs: str, output: str = "", domain: str = "", **attributes: Any) -> str:
        return self._ops(kind, inputs, [output or f"{kind}_{len(self._nodes)}"], domain, **attributes)[0]

    def norm(self, x: str, module: str, output: str = "") -> str:
        weight, bias = (self._parameter(f"{module}.{name}") for name in ("weight", "bias"))
        return self.op("LayerNormalization", x, weight, bias, output=output, axis=-1, epsilon=LAYER_NORM_EPSILON)

    def linear(self, x: str, module: str, part: slice | None = None) -> str:
        """`x @ weight + bias`; `part`: of some of the columns only."""
        matrix = self._weights.matrices[module]
        bias = self._weights.vectors.get(f"{module}.bias")
        columns, name = part or slice(None), module if part is None else f"{module}.{part.start}"
        biases = [] if bias is None else [self._constant(f"{name}.bias", bias[columns])]
        if isinstance(matrix, Quantized):
            values, scale, zero_point = self._quantize(x)
            weight = self._constant(f"{name}.weight", self._signed(matrix.values[:, columns]))
            scales = self._constant(f"{name}.scales", matrix.scales[columns])
            zero_points = self._constant(f"{name}.zero_points", self._signed(matrix.zero_points[columns]))
            inputs = (values, weight, scale, scales, zero_point, zero_points, *biases)
            return self.op("MatMulIntegerToFloat", *inputs, domain=CONTRIB)
        product = self.op("MatMul", x, self._constant(f"{name}.weight", matrix[:, columns]))
        return self.op("Add", product, *biases) if biases else product

    def self_attention(self, x: str, module: str, hidden: str | None, frames: str | None) -> str:
        q, k, v = self._parts(x, f"{module}.linear_q_k_v", 3)
        attended = self.linear(self._attention(q, k, v, hidden), f"{module}.linear_out")
        return self.op("Add", attended, self.memory(v, f"{module}.fsmn_block", frames))

    def cross_attention(self, x: str, module: str, hidden: str | None) -> str:
        k, v = self._parts("enc", f"{module}.linear_k_v", 2)
        return self.linear(self._attention(self.linear(x, f"{module}.linear_q"), k, v, hidden), f"{module}.linear_out")

    def memory(self, x: str, module: str, mask: str | None) -> str:
        """FSMN: a convolution along time, channel by channel, plus x: the same as 1 more on its middle tap."""
        kernel = self._weights.vectors[f"{module}.weight"][:, :, None, :].copy()
        channels, size = kernel.shape[0], kernel.shape[-1]
        kernel[..., (size - 1) // 2] += 1
        if mask is not None:
            x = self.op("Mul", x, mask)
        # As an image of height 1 with the channels last: the form that onnxruntime's fast convolutions take.
        image = self.op("Transpose", self.op("Reshape", x, self._sizes(0, 1, -1, channels)), perm=[0, 3, 1, 2])
        padding = [0, (size - 1) // 2, 0, size // 2]
        kernels = self._constant(f"{module}.kernel", kernel)
        image = self.op("Conv", image, kernels, group=channels, kernel_shape=[1, size], pads=padding)
        return self.op("Reshape", self.op("Transpose", image, perm=[0, 2, 3, 1]), self._sizes(0, -1, channels))

    def encoder_feed_forward(self, x: str, module: str) -> str:
        return self.linear(self.op("Relu", self.linear(x, f"{module}.w_1")), f"{module}.w_2")

    def decoder_feed_forward(self, x: str, module: str) -> str:
        inner = self.norm(self.op("Relu", self.linear(x, f"{module}.w_1")), f"{module}.norm")
        return self.linear(inner, f"{module}.w_2")

    def alphas(self, enc: str, mask: str | None, frames: str | None) -> None:
        """CIF's predictor: the share of a token that each frame holds. It sees nothing of masked frames."""
        seen = enc if frames is None else self.op("Mul", enc, frames)
        weight, bias = (self._parameter(f"predictor.cif_conv1d.{name}") for name in ("weight", "bias"))
        channels = self.op("Transpose", seen, perm=[0, 2, 1])
        context = self.op("Relu", self.op("Conv", channels, weight, bias, kernel_shape=[3], pads=[1, 1]))
        scores = self.linear(self.op("Transpose", context, perm=[0, 2, 1]), PREDICTOR_OUTPUT)
        output = "" if mask else "alphas"
        config = self._weights.config
        if config.smooth_factor == 1 and config.noise_threshold == 0:
            shares = self.op("Sigmoid", scores)
        else:
            factor = self._constant("smooth_factor", np.float32(config.smooth_factor))
            threshold = self._constant("noise_threshold", np.float32(config.noise_threshold))
            shares = self.op("Sub", self.op("Mul", self.op("Sigmoid", scores), factor), threshold)
            shares = self.op("Relu", shares)
        shares = self.op("Squeeze", shares, self._sizes(-1), output=output)
        if mask:
            self.op("Mul", shares, mask, output="alphas")

    def hidden(self, mask: str) -> str:
        """`[B, T]` -> `[B, 1, 1, T]`: what is added to the scores of attention."""
        one, hidden = self._constant("one", np.float32(1)), self._constant("hidden", np.float32(HIDDEN))
        return self.op("Unsqueeze", self.op("Mul", self.op("Sub", one, mask), hidden), self._sizes(1, 2))

    def column(self, mask: str) -> str:
        """`[B, T]` -> `[B, T, 1]`."""
        return self.op("Unsqueeze", mask, self._sizes(-1))

    def model(
        self, name: str, inputs: Mapping[str, Sequence[Any]], outputs: Mapping[str, Sequence[Any]],
        metadata: Mapping[str, str],
    ) -> Graph:  # fmt: skip
        types = {"ids": TensorProto.INT64}
        declared_inputs, declared_outputs = (
            [
                helper.make_tensor_value_info(tensor, types.get(tensor, TensorProto.FLOAT), shape)
                for tensor, shape in group.items()
            ]
            for group in (inputs, outputs)
        )
        graph = helper.make_graph(self._nodes, name, declared_inputs, declared_outputs)
        model = _model(graph)
        helper.set_model_props(model, dict(metadata))
        return Graph(model, self._tensors)

    def _ops(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> Sequence[str]:
        self._nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs

    def _parts(self, x: str, module: str, number: int) -> list[str]:
        """Several matrices of equal size in one, apart; in 8 bits as products of their own, with nothing to cut."""
        d = self._weights.width
        if isinstance(self._weights.matrices[module], Quantized):
            return [self.linear(x, module, slice(i * d, i * d + d)) for i in range(number)]
        outputs = [f"Split_{len(self._nodes)}_{i}" for i in range(number)]
        return list(self._ops("Split", [self.linear(x, module), self._sizes(*[d] * number)], outputs, axis=-1))

    def _attention(self, q: str, k: str, v: str, hidden: str | None) -> str:
        """Scaled dot-product attention; `hidden` is added to the scores."""
        heads, size = self._weights.config.heads, self._weights.width // self._weights.config.heads
        q, k, v = (
            self.op("Transpose", self.op("Reshape", x, self._sizes(0, -1, heads, size)), perm=perm)
            for x, perm in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3]))
        )
        scores = self.op("MatMul", self.op("Mul", q, self._constant("query_scale", np.float32(size**-0.5))), k)
        if hidden is not None:
            scores = self.op("Add", scores, hidden)
        context = self.op("Transpose", self.op("MatMul", self.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        return self.op("Reshape", context, self._sizes(0, -1, heads * size))

    def _quantize(self, x: str) -> Sequence[str]:
        """8-bit values, scale and zero point of an activation, once however many matrices it meets."""
        if x not in self._quantized:
            outputs = [f"DynamicQuantizeLinear_{len(self._nodes)}_{part}" for part in ("values", "scale", "zero_point")]
            self._quantized[x] = self._ops("DynamicQuantizeLinear", [x], outputs)
        return self._quantized[x]

    def _signed(self, values: Bytes) -> npt.NDArray[Any]:
        return values.view(np.uint8) ^ self._sign if self._sign else values

    def _parameter(self, name: str) -> str:
        return self._constant(name, self._weights.vectors[name])

    def _sizes(self, *sizes: int) -> str:
        return self._constant("sizes_" + "_".join(map(str, sizes)), np.array(sizes, np.int64))

    def _constant(self, name: str, array: npt.NDArray[Any] | np.generic) -> str:
        if name not in self._tensors:
            self._tensors[name] = np.asarray(array)
        return name


def product_graph(values: Bytes) -> Graph:
    """Return a graph `x` u8 `[M, K]` -> `y` f32 `[M, N]`, the exact 8-bit product with `values` s8 `[K, N]`."""
    size, columns = values.shape
    tensors: dict[str, npt.NDArray[Any]] = {
        "weight": values,
        "scale": np.array(1, np.float32),
        "scales": np.ones(columns, np.float32),
        "zero": np.array(0, np.uint8),
        "zeros": np.zeros(columns, np.int8),
    }
    node = helper.make_node(
        "MatMulIntegerToFloat", ["x", "weight", "scale", "scales", "zero", "zeros"], ["y"], domain=CONTRIB
    )
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, ["M", size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", columns])
    return Graph(_model(helper.make_graph([node], "product", [x], [y])), tensors)


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    versions = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, producer_name="edge_asr", opset_imports=versions, ir_version=IR_VERSION)
