"""The least time that a device can take: its arithmetic at full speed, or its weights read once, if that is longer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import onnx

PRODUCTS = frozenset({"MatMul", "Conv"})
"""Operators of which the second input may be weights."""
BYTES = {"tensorrt-fp16": 2, "onnx-cuda-fp16": 2, "onnx-int8": 1}
"""Of a weight, by engine; 4 in all others."""


@dataclass(frozen=True, slots=True)
class Known:
    """A device whose limits its maker has published."""

    name: str
    pattern: str
    """Of what the machine says it is, in lower case."""
    fp16_tflops: float
    """Of the GPU's tensor cores, without sparsity, at the highest clock."""
    bandwidth_gb_s: float
    memory_gb: tuple[float, float] = (0, math.inf)
    """What tells models of one name apart: how much memory the system sees, at least and at most."""
    source: str = ""


_BRIEF = "NVIDIA, Jetson AGX Orin Series Technical Brief; a quarter of the sparse INT8 TOPS of the GPU"
_ORIN = "NVIDIA, data sheet of the module; a quarter of the sparse INT8 TOPS of the GPU"
_SUPER = "NVIDIA, announcement of Jetson Orin Nano Super, December 2024"
_THOR = "NVIDIA, data sheet of Jetson Thor; an eighth of the sparse FP4 TFLOPS"
_XAVIER = "NVIDIA, data sheet of the module"
_CARD = "NVIDIA, data sheet or architecture white paper; FP16 with FP16 accumulation, dense"

KNOWN = (
    Known("Jetson AGX Xavier", "jetson.agx$|agx xavier", 11, 136.5, source=_XAVIER),
    Known("Jetson Xavier NX", "xavier nx", 6, 59.7, source=_XAVIER),
    Known("Jetson AGX Orin 64 GB", "agx orin", 42.5, 204.8, (40, math.inf), _BRIEF),
    Known("Jetson AGX Orin 32 GB", "agx orin", 27, 204.8, (0, 40), _BRIEF),
    Known("Jetson Orin NX 16 GB", "orin nx(?!.*super)", 15, 102.4, (10, math.inf), _ORIN),
    Known("Jetson Orin NX 8 GB", "orin nx(?!.*super)", 12.5, 102.4, (0, 10), _ORIN),
    Known("Jetson Orin Nano Super 8 GB", "orin nano.*super", 17, 102, (5, math.inf), _SUPER),
    Known("Jetson Orin Nano 8 GB", "orin nano(?!.*super)", 10, 68, (5, math.inf), _ORIN),
    Known("Jetson Orin Nano 4 GB", "orin nano(?!.*super)", 5, 34, (0, 5), _ORIN),
    Known("Jetson Thor T5000", "thor", 258.75, 273, (100, math.inf), _THOR),
    Known("Tesla T4", "tesla t4", 65, 320, source=_CARD),
    Known("L4", r"nvidia l4$", 121, 300, source=_CARD),
    Known("GeForce RTX 3060", r"rtx 3060$", 51, 360, source=_CARD),
    Known("GeForce RTX 3090", r"rtx 3090$", 142, 936, source=_CARD),
    Known("GeForce RTX 4060", r"rtx 4060$", 60, 272, source=_CARD),
    Known("GeForce RTX 4090", r"rtx 4090$", 330, 1008, source=_CARD),
    Known("A100 80 GB PCIe", "a100 80gb pcie", 312, 1935, source=_CARD),
    Known("H100 SXM", "h100 80gb hbm3", 989, 3350, source=_CARD),
    Known("H200", "h200", 989, 4800, source=_CARD),
)


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What a model's arithmetic follows from."""

    width: int
    encoder_weights: int
    """Weights that each frame is multiplied by, in the encoder."""
    encoder_attentions: int
    decoder_weights: int
    """Weights that each token is multiplied by, in the decoder."""
    decoder_frame_weights: int
    """Weights that each frame is multiplied by, in the decoder: keys and values."""
    decoder_attentions: int

    @property
    def weights(self) -> int:
        """All of them."""
        return self.encoder_weights + self.decoder_weights + self.decoder_frame_weights

    def operations(self, frames: int, tokens: int, batch: int = 1) -> int:
        """Return the additions and multiplications that so many frames and tokens take, of `batch` utterances."""
        by_weights = frames * (self.encoder_weights + self.decoder_frame_weights) + tokens * self.decoder_weights
        # Scores and then sums of values: two products for each attention; one product makes embeddings of frames.
        pairs = self.encoder_attentions * 2 * frames * frames + (self.decoder_attentions * 2 + 1) * tokens * frames
        return 2 * batch * (by_weights + pairs * self.width)


def find(name: str, memory_gb: float) -> Known | None:
    """Return the device of that name (as a Jetson's device tree or a driver has it) and memory; None: not known."""
    fits = (each for each in KNOWN if re.search(each.pattern, name.lower()))
    return next((each for each in fits if each.memory_gb[0] <= memory_gb < each.memory_gb[1]), None)


def floor_ms(known: Known, engine: str, dimensions: Dimensions, frames: int, tokens: int, batch: int) -> float:
    """Return the milliseconds below which that device cannot get with that engine."""
    compute_s = dimensions.operations(frames, tokens, batch) / (known.fp16_tflops * 1e12)
    reading_s = dimensions.weights * BYTES.get(engine, 4) / (known.bandwidth_gb_s * 1e9)
    return max(compute_s, reading_s) * 1e3


def dimensions_of(encoder: Path, decoder: Path) -> Dimensions:
    """Read what the arithmetic follows from out of the two networks of an onnx-fp32 engine, without its weights."""
    first, second = (onnx.load(str(path), load_external_data=False).graph for path in (encoder, decoder))
    per_frame, per_token = _weights(second)
    return Dimensions(
        width=next(output for output in first.output if output.name == "enc").type.tensor_type.shape.dim[2].dim_value,
        encoder_weights=sum(_weights(first)),
        encoder_attentions=_attentions(first),
        decoder_weights=per_token,
        decoder_frame_weights=per_frame,
        decoder_attentions=_attentions(second),
    )


def _weights(graph: onnx.GraphProto) -> tuple[int, int]:
    """Return how many weights multiply what `enc` holds, which has a row for each frame, and how many the rest."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    counts = [0, 0]
    for node in graph.node:
        if node.op_type in PRODUCTS and node.input[1] in sizes:
            counts[node.input[0] != "enc"] += sizes[node.input[1]]
    return counts[0], counts[1]


def _attentions(graph: onnx.GraphProto) -> int:
    return sum(node.op_type == "Softmax" for node in graph.node)
