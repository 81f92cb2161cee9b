"""The weights of a Paraformer by FunASR's names, whatever file they came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_asr.recognizer.features import WIDTH
from edge_asr.recognizer.model_config import ModelConfig

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.int8]

FIRST_BLOCK = "encoder.encoders0.0"
ENCODER_BLOCK = "encoder.encoders.{}"
DECODER_BLOCK = "decoder.decoders.{}"
LAST_BLOCK = "decoder.decoders3.0"
BLOCKS_WITHOUT_ATTENTION = "decoder.decoders2."
"""Of variants with more blocks than attention layers, which nobody publishes."""
OUTPUT = "decoder.output_layer"
PREDICTOR_OUTPUT = "predictor.cif_output"

SIGN = 128
"""From unsigned to signed 8 bits: values and zero points move together, so that nothing changes."""


class UnknownGraphError(Exception):
    """The weights are not those of a Paraformer that we can write as two networks; the text says why."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix in 8 bits: column by column `(values - zero_points) * scales`."""

    values: Bytes
    """`[in, out]`."""
    scales: Array
    """`[out]`."""
    zero_points: Bytes
    """`[out]`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(in, out)`."""
        return self.values.shape

    def dequantized(self) -> Array:
        """Return the matrix in float32."""
        matrix: Array = self.values.astype(np.float32)
        matrix -= self.zero_points.astype(np.float32)
        matrix *= self.scales
        return matrix


Matrix = Array | Quantized
"""`[in, out]`, as ONNX multiplies: the transpose of torch's."""


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a Paraformer."""

    matrices: Mapping[str, Matrix]
    """Linear layers by module: `encoder.encoders.0.self_attn.linear_q_k_v`."""
    vectors: Mapping[str, Array]
    """All other parameters: biases, LayerNorms and convolutions, in torch's shapes."""
    config: ModelConfig

    @property
    def width(self) -> int:
        """Size of an encoder frame."""
        return int(self.vectors["encoder.after_norm.weight"].shape[0])

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.matrices[OUTPUT].shape[1])

    @property
    def encoder_blocks(self) -> int:
        """Number of encoder blocks behind the first, which is of its own kind."""
        return _count(self.matrices, ENCODER_BLOCK)

    @property
    def decoder_blocks(self) -> int:
        """Number of decoder blocks with attention."""
        return _count(self.matrices, DECODER_BLOCK)

    @property
    def input_scale(self) -> float:
        """What features are multiplied by."""
        return self.config.input_scale or float(self.width**0.5)

    @property
    def quantized(self) -> bool:
        """True where the matrices are in 8 bits."""
        return any(isinstance(matrix, Quantized) for matrix in self.matrices.values())


def check(weights: Weights) -> None:
    """Raise UnknownGraphError unless everything that the networks need is there, in the right shape."""
    for needed in ("encoder.after_norm.weight",):
        if needed not in weights.vectors:
            raise UnknownGraphError(f"no {needed}")
    if OUTPUT not in weights.matrices:
        raise UnknownGraphError(f"no {OUTPUT}")
    if any(name.startswith(BLOCKS_WITHOUT_ATTENTION) for name in weights.matrices):
        raise UnknownGraphError("it has decoder blocks without attention")
    if not weights.encoder_blocks or not weights.decoder_blocks:
        raise UnknownGraphError("no encoder or decoder blocks")
    if weights.width % weights.config.heads:
        raise UnknownGraphError(f"{weights.config.heads} heads do not divide a width of {weights.width}")
    matrices, vectors = _expected(weights)
    _compare(matrices, weights.matrices)
    _compare(vectors, weights.vectors)


def _expected(weights: Weights) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return the shapes of all matrices and vectors by name; -1: any size."""
    d, v = weights.width, weights.vocabulary
    matrices: dict[str, tuple[int, ...]] = {}
    vectors: dict[str, tuple[int, ...]] = {}

    def norm(name: str, size: int) -> None:
        vectors[f"{name}.weight"] = vectors[f"{name}.bias"] = (size,)

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        matrices[name] = (inputs, outputs)
        if bias:
            vectors[f"{name}.bias"] = (outputs,)

    def feed_forward(block: str, inner_norm: bool) -> None:
        f = _columns(weights.matrices, f"{block}.feed_forward.w_1")
        linear(f"{block}.feed_forward.w_1", d, f)
        linear(f"{block}.feed_forward.w_2", f, d, bias=not inner_norm)
        if inner_norm:
            norm(f"{block}.feed_forward.norm", f)

    for block in (FIRST_BLOCK, *(ENCODER_BLOCK.format(i) for i in range(weights.encoder_blocks))):
        size = WIDTH if block == FIRST_BLOCK else d
        norm(f"{block}.norm1", size)
        linear(f"{block}.self_attn.linear_q_k_v", size, 3 * d)
        linear(f"{block}.self_attn.linear_out", d, d)
        vectors[f"{block}.self_attn.fsmn_block.weight"] = (d, 1, -1)
        norm(f"{block}.norm2", d)
        feed_forward(block, inner_norm=False)
    norm("encoder.after_norm", d)
    vectors["predictor.cif_conv1d.weight"] = (d, d, 3)
    vectors["predictor.cif_conv1d.bias"] = (d,)
    linear(PREDICTOR_OUTPUT, d, 1)
    for block in (DECODER_BLOCK.format(i) for i in range(weights.decoder_blocks)):
        for name in ("norm1", "norm2", "norm3"):
            norm(f"{block}.{name}", d)
        feed_forward(block, inner_norm=True)
        vectors[f"{block}.self_attn.fsmn_block.weight"] = (d, 1, -1)
        linear(f"{block}.src_attn.linear_q", d, d)
        linear(f"{block}.src_attn.linear_k_v", d, 2 * d)
        linear(f"{block}.src_attn.linear_out", d, d)
    norm(f"{LAST_BLOCK}.norm1", d)
    feed_forward(LAST_BLOCK, inner_norm=True)
    norm("decoder.after_norm", d)
    linear(OUTPUT, d, v)
    return matrices, vectors


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Matrix]) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise UnknownGraphError(f"no {name}")
        actual = found[name].shape
        if len(actual) != len(shape) or any(
            wanted not in (-1, size) for wanted, size in zip(shape, actual, strict=True)
        ):
            raise UnknownGraphError(f"{name} is of shape {list(actual)}, expected {list(shape)}")


def _columns(matrices: Mapping[str, Matrix], name: str) -> int:
    return int(matrices[name].shape[-1]) if name in matrices else -1


def _count(names: Mapping[str, Matrix], block: str) -> int:
    number = 0
    while f"{block.format(number)}.feed_forward.w_1" in names:
        number += 1
    return number
