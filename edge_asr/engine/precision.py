"""FP16 written into the networks, so that every backend rounds alike; values that it cannot hold are divided before.

FP16: products and convolutions with their weights, and what lies between them. FP32: LayerNorm, softmax, the
predictor, sums of two activations (the stream from block to block), log-softmax, and what goes in and out.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import wave
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edge_asr.engine import trial
from edge_asr.engine.graph import Graph
from edge_asr.engine.weights import OUTPUT
from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import FP32, Bundle
from edge_asr.recognizer.network import Arrays, Network
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.types import SAMPLE_RATE, Samples

Tensors = dict[str, npt.NDArray[Any]]

PRODUCTS = frozenset({"Conv", "MatMul"})
BETWEEN = frozenset({"Add", "Mul", "Relu", "Reshape", "Split", "Sub", "Transpose", "Unsqueeze"})
"""Take the type of what is before or behind them, which saves casts."""
KEPT = ("predictor.", f"{OUTPUT}.bias")
"""Constants, by how their names begin, that stay in FP32 with the nodes that read them. The bias of the scores is added
behind their cast: best and second best are often closer than what FP16 tells apart."""

LARGEST = 8_192.0
"""What activations are divided down to: an eighth of what FP16 holds, for louder speech than the calibration's."""
REFUSED = 32_752.0
"""From here on a model is refused whose activations cannot be divided: half of what FP16 holds."""
LOWERED = (".linear_out", ".fsmn_block", ".w_2")
"""Modules of an encoder block whose answers are added to the stream."""
HIDDEN = ".w_1"
"""The module before a Relu."""

WATCHED = ("Add", "Conv", "LayerNormalization", "MatMul")
"""Nodes behind which an activation can be larger than before."""
PEAK = ".peak"
RECORDINGS, RECORDED_S = 16, 10
"""How many of a bundle's recordings are used, and how much of each."""


def half(graph: Graph, softmax: bool = False, wide_sums: bool = False) -> Graph:
    """Return a masked fp32 network in FP16, its inputs and outputs in FP32 as before, `ids` in INT32.

    `softmax`: that of the attention in FP16 as well, with the addition of its mask. `wide_sums`: products are added up
    in FP32, which TensorRT may else do in FP16. Raises EngineError where a weight does not fit into FP16: it is never
    clipped.
    """
    halves = _halves(graph, softmax)
    writer = _Writer(graph.tensors, halves, wide_sums)
    for node in graph.skeleton.graph.node:
        writer.add(node)
    model = _with(graph.skeleton, writer.nodes)
    for output in model.graph.output:
        if output.name == "ids":  # TensorRT before 9 knows no INT64
            output.type.tensor_type.elem_type = TensorProto.INT32
    return Graph(model, writer.tensors)


def opset13(graph: Graph) -> Graph:
    """Return the graph in opset 13, with LayerNormalization written out: for TensorRT 8.5, which does not know it.

    To be called behind `half`, which would not know the parts for what they are.
    """
    tensors, nodes = dict(graph.tensors), []
    for node in graph.skeleton.graph.node:
        if node.op_type != "LayerNormalization":
            nodes.append(node)
            continue
        epsilon = next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")
        tensors["epsilon"] = np.array(epsilon, np.float32)
        nodes += _norm_parts(node)
    model = _with(graph.skeleton, nodes)
    model.opset_import[0].version = 13
    return Graph(model, tensors)


def rescale(graph: Graph, scale: int = 1, inner: Mapping[str, int] | None = None) -> Graph:
    """Return the graph with its stream from encoder block to encoder block divided by `scale`, a power of two.

    The last LayerNorm takes it out again, so the answer is the same. `inner`: feed-forward layers by module, and what
    their hidden values are divided by; in an encoder the second matrix, in a decoder the LayerNorm takes that out.
    """
    tensors: Tensors = {}
    for name, array in graph.tensors.items():
        divisor = _divisor(name, scale, inner or {})
        tensors[name] = array if divisor == 1 else array * np.float32(1 / divisor)
    return dataclasses.replace(graph, tensors=tensors)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How large a model's activations get, and what they have to be divided by to fit into FP16."""

    scale: int
    """Power of two for the stream of the encoder; see `rescale`."""
    inner: Mapping[str, int]
    """Powers of two for the hidden values of feed-forward layers by module, where they are needed at all."""
    largest: float
    """The largest absolute value in the encoder's stream and what is added to it, in fp32."""
    where: str
    """The module that it is behind."""


def calibrate(
    bundle: Bundle, encoder: Graph, decoder: Graph, sounds: Sequence[Samples], folder: Path, threads: int = 0
) -> Calibration:
    """Run both fp32 networks on sounds (16 kHz, full scale +-1), and on some that `trial` makes; return what to divide.

    The networks are written into a folder below `folder` meanwhile. Raises EngineError where activations get so large
    that FP16 does not hold them, and no division helps.
    """
    made = [make(seconds) for seconds in trial.TRIED_S for make in (trial.babble, trial.hiss)]
    with tempfile.TemporaryDirectory(prefix="calibration-", dir=folder) as work:
        first, second = (_Watch(graph, Path(work), threads) for graph in (encoder, decoder))
        recognizer = Paraformer(bundle, first, second, FP32)
        for sound in (*sounds, *made):
            recognizer.decode(sound)
        recognizer.close()
    return _decide({**first.peaks, **second.peaks})


def recordings(bundle: Bundle) -> list[Samples]:
    """Return the beginnings of a bundle's own recordings, those in 16 bits, 16 kHz, mono: speech that it knows."""
    found: list[Samples] = []
    for path in sorted(bundle.folder.rglob("*.wav"))[:RECORDINGS]:
        try:
            with wave.open(str(path), "rb") as file:
                if (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE):
                    raw = np.frombuffer(file.readframes(RECORDED_S * SAMPLE_RATE), "<i2")
                    found.append(raw.astype(np.float32) / np.float32(32_768))
        except (OSError, EOFError, ValueError, wave.Error):
            continue  # it is only an example
    return found


# FP16


def _halves(graph: Graph, softmax: bool) -> set[str]:
    """Return the names of the activations that are in FP16."""
    nodes, halves = graph.skeleton.graph.node, set[str]()
    seeds = PRODUCTS | ({"Softmax"} if softmax else set())
    for node in nodes:
        inputs = [name for name in node.input if name not in graph.tensors]
        follows = node.op_type in BETWEEN and any(name in halves for name in inputs)
        residual = node.op_type == "Add" and len(inputs) == 2
        if not _kept(node) and (node.op_type in seeds or (follows and not residual)):
            halves.update(node.output)
    readers: dict[str, list[str]] = defaultdict(list)
    for node in reversed(nodes):  # what leads to FP16 only is cast before, not behind
        behind = [reader for name in node.output for reader in readers[name]]
        if node.op_type in BETWEEN and behind and all(reader in halves for reader in behind):
            halves.update(node.output)
        for name in node.input:
            readers[name].append(node.output[0])
    return halves


def _kept(node: onnx.NodeProto) -> bool:
    return any(name.startswith(KEPT) for name in node.input)


class _Writer:
    """Nodes and constants of a network in the making, each tensor cast at most once."""

    def __init__(self, constants: Mapping[str, npt.NDArray[Any]], halves: set[str], wide_sums: bool) -> None:
        self._constants, self._halves, self._wide_sums = constants, halves, wide_sums
        self._cast: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: Tensors = {}

    def add(self, node: onnx.NodeProto) -> None:
        written = onnx.NodeProto()
        written.CopyFrom(node)
        wanted = node.output[0] in self._halves
        written.input[:] = [self._typed(name, wanted) for name in node.input]
        if self._wide_sums and wanted and node.op_type == "MatMul":
            written.input[:] = [self._widened(name) for name in written.input]
            written.name = written.output[0] = f"{node.output[0]}.wide"
            self.nodes.append(written)
            self._append_cast(written.output[0], node.output[0], TensorProto.FLOAT16)
            return
        if node.output[0] == "ids":
            written.name = written.output[0] = "ids.wide"
        self.nodes.append(written)
        if node.output[0] == "ids":
            self._append_cast("ids.wide", "ids", TensorProto.INT32)

    def _typed(self, name: str, wanted: bool) -> str:
        """Return the name of a tensor in FP16 if `wanted`, else in FP32; constants of integers stay as they are."""
        if name in self._constants:
            constant = self._constants[name]
            wanted = wanted and constant.dtype == np.float32
            typed = f"{name}.half" if wanted else name
            if typed not in self.tensors:
                self.tensors[typed] = _to_half(name, constant) if wanted else constant
            return typed
        if (name in self._halves) == wanted:
            return name
        typed = f"{name}.half" if wanted else f"{name}.float"
        if typed not in self._cast:
            self._append_cast(name, typed, TensorProto.FLOAT16 if wanted else TensorProto.FLOAT)
        return typed

    def _widened(self, name: str) -> str:
        """Return the name of a tensor in FP16 cast to FP32, its values as they are: TensorRT makes one kernel of it."""
        typed = f"{name}.widened"
        if typed not in self._cast:
            self._append_cast(name, typed, TensorProto.FLOAT)
        return typed

    def _append_cast(self, name: str, output: str, kind: int) -> None:
        self._cast.add(output)
        self.nodes.append(helper.make_node("Cast", [name], [output], name=output, to=kind))


def _to_half(name: str, array: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):  # what overflows is refused right here
        converted = array.astype(np.float16)
    if not np.isfinite(converted).all():
        raise EngineError(
            f"{name}: a weight of {np.abs(array).max():g} does not fit into FP16, which ends at 65504; use onnx-fp32"
        )
    return converted


def _with(skeleton: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """Return a copy with other nodes, of the standard domain only."""
    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.opset_import[:]
    model.opset_import.extend(entry for entry in skeleton.opset_import if not entry.domain)
    return model


def _norm_parts(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    x, weight, bias = node.input

    def part(kind: str, *inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=output, **attributes)

    name = node.output[0]
    mean, centred, squares, variance = (f"{name}.{key}" for key in ("mean", "centred", "squares", "variance"))
    raised, deviation, normed, scaled = (f"{name}.{key}" for key in ("raised", "deviation", "normed", "scaled"))
    yield part("ReduceMean", x, output=mean, axes=[-1], keepdims=1)
    yield part("Sub", x, mean, output=centred)
    yield part("Mul", centred, centred, output=squares)
    yield part("ReduceMean", squares, output=variance, axes=[-1], keepdims=1)
    yield part("Add", variance, "epsilon", output=raised)
    yield part("Sqrt", raised, output=deviation)
    yield part("Div", centred, deviation, output=normed)
    yield part("Mul", normed, weight, output=scaled)
    yield part("Add", scaled, bias, output=name)


# Division


def _divisor(name: str, scale: int, inner: Mapping[str, int]) -> float:
    """Return what a constant is divided by."""
    module = name.rpartition(".")[0]
    hidden = inner.get(module.rpartition(".")[0], 1)
    if module.endswith(HIDDEN):
        return hidden
    if not _lowered(module):
        return 1
    return scale / hidden if name.endswith(".w_2.weight") else scale


def _lowered(module: str) -> bool:
    """Tell whether a module adds to the stream of the encoder."""
    return module.startswith("encoder.") and module.endswith(LOWERED)


# Calibration


class _Watch:
    """A network that notes the largest absolute values of its activations; see Network."""

    def __init__(self, graph: Graph, folder: Path, threads: int) -> None:
        path, _ = _watched(graph).write(folder, graph.skeleton.graph.name)
        self._network: Network = OnnxNetwork(path, threads)
        self._origins = _origins(graph)
        self.peaks: dict[str, float] = defaultdict(float)
        """By the module that they are behind."""

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._network.metadata

    def run(self, inputs: Arrays) -> Arrays:
        outputs = self._network.run(inputs)
        for name, value in outputs.items():
            if name.endswith(PEAK):
                module = self._origins[name.removesuffix(PEAK)]
                self.peaks[module] = float(np.maximum(self.peaks[module], value))  # NaN stays
        return outputs

    def close(self) -> None:
        self._network.close()


def _watched(graph: Graph) -> Graph:
    """Return the graph with the largest absolute value of its activations among its outputs: memory stays small."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.skeleton)
    for node in graph.skeleton.graph.node:
        if node.op_type in WATCHED and not _kept(node):
            sizes, peak = f"{node.output[0]}.absolute", node.output[0] + PEAK
            model.graph.node.append(helper.make_node("Abs", node.output[:1], [sizes]))
            model.graph.node.append(helper.make_node("ReduceMax", [sizes], [peak], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(peak, TensorProto.FLOAT, []))
    return dataclasses.replace(graph, skeleton=model)


def _origins(graph: Graph) -> dict[str, str]:
    """Return for each activation the module whose parameters it went through last, by its last addend."""
    origins: dict[str, str] = {value.name: value.name for value in graph.skeleton.graph.input}
    for node in graph.skeleton.graph.node:
        modules = [name.rpartition(".")[0] for name in node.input if name in graph.tensors and "." in name]
        sources = [origins[name] for name in node.input if name not in graph.tensors]
        for output in node.output:
            origins[output] = (modules or [name for name in sources if "." in name] or sources)[-1]
    return origins


def _decide(peaks: Mapping[str, float]) -> Calibration:
    """Return what to divide where activations are so large, by module. Raises EngineError."""
    for module, peak in peaks.items():
        divisible = _lowered(module) or module.endswith(HIDDEN)
        if not (peak <= REFUSED or (divisible and math.isfinite(peak))):
            raise EngineError(
                f"{module}: its activations reach {peak:g}, too much for FP16, which ends at 65504; use onnx-fp32"
            )
    where = max(filter(_lowered, peaks), key=lambda module: peaks[module])
    hidden = {module.removesuffix(HIDDEN): _power(peak) for module, peak in peaks.items() if module.endswith(HIDDEN)}
    inner = {module: divisor for module, divisor in hidden.items() if divisor > 1}
    return Calibration(_power(peaks[where]), inner, peaks[where], where)


def _power(peak: float) -> int:
    """Return the smallest power of two that divides a peak down to what is allowed; 1 where it is small."""
    power = 1
    while peak / power >= LARGEST:
        power *= 2
    return power
