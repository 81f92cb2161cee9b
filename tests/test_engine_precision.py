"""FP16 written into the networks: what is rounded and what is not, what TensorRT takes, and that the answers stay."""

from __future__ import annotations

import dataclasses
import wave
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import random_engine
import random_weights
from bundled import BUNDLE, load, sound_of, transcripts, write_wav
from half import HalfNetwork
from onnx import TensorProto, helper
from random_engine import weights_from

from edge_asr.engine import trial
from edge_asr.engine.graph import Graph, decoder_graph, encoder_graph
from edge_asr.engine.precision import LARGEST, Calibration, calibrate, half, opset13, recordings, rescale
from edge_asr.engine.published import read_graph
from edge_asr.engine.weights import Weights
from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import FP32, Bundle, read_bundle
from edge_asr.recognizer.network import Network
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.paraformer import Decoded, Paraformer
from edge_asr.types import Samples

ALPHA = 2e-3
"""What FP16 may change in the share of a token that a frame holds."""
EXACT = 1e-5
"""What may be between two ways to compute the same in fp32."""
FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
INT32, INT64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64


@dataclass(frozen=True)
class Networks:
    """Both networks in fp32, and the bundle that they are of."""

    bundle: Bundle
    encoder: Graph
    decoder: Graph

    def changed(self, change: Callable[[Graph], Graph]) -> Networks:
        return Networks(self.bundle, change(self.encoder), change(self.decoder))

    def calibrated(self, calibration: Calibration) -> Networks:
        encoder = rescale(self.encoder, calibration.scale, calibration.inner)
        return Networks(self.bundle, encoder, rescale(self.decoder, inner=calibration.inner))

    def rounded(self) -> Paraformer:
        """Load them where FP16 is rounded."""
        return Paraformer(self.bundle, HalfNetwork(self.encoder), HalfNetwork(self.decoder), "fp16")

    def on_onnxruntime(self, folder: Path) -> Paraformer:
        encoder, decoder = (load_graph(graph, folder) for graph in (self.encoder, self.decoder))
        return Paraformer(self.bundle, encoder, decoder, "fp16")

    @property
    def graphs(self) -> tuple[Graph, Graph]:
        return self.encoder, self.decoder


def load_graph(graph: Graph, folder: Path) -> Network:
    return OnnxNetwork(graph.write(folder, graph.skeleton.graph.name)[0], threads=1)


def networks_of(bundle: Bundle, weights: Weights) -> Networks:
    metadata = {
        "input_scale": repr(weights.input_scale),
        "tail": repr(weights.config.tail),
        "vocabulary": str(weights.vocabulary),
        "batches": "true",
    }
    return Networks(bundle, encoder_graph(weights, metadata), decoder_graph(weights))


@pytest.fixture(scope="module")
def trained() -> tuple[Bundle, Weights]:
    """The bundled model."""
    bundle = read_bundle(BUNDLE)
    return bundle, read_graph(bundle.files[FP32], bundle.config)[0]


@pytest.fixture(scope="module")
def bundled(trained: tuple[Bundle, Weights]) -> Networks:
    return networks_of(*trained)


@pytest.fixture(scope="module")
def sounds() -> list[Samples]:
    return [sound_of(name) for name in transcripts()]


@pytest.fixture(scope="module")
def expected(sounds: list[Samples]) -> list[Decoded]:
    """What fp32 says of the recordings, on onnxruntime."""
    recognizer = load(FP32)
    answers = [recognizer.decode(sound) for sound in sounds]
    recognizer.close()
    return answers


@pytest.fixture(scope="module")
def tiny() -> Networks:
    """Random weights: nothing in them is zero or alike."""
    return networks_of(random_engine.bundle_of("tiny", Path()), weights_from("tiny"))


def apart(ours: list[Decoded], theirs: list[Decoded]) -> float:
    """Return how far alphas are apart; all ids must be the same."""
    for number, (found, wanted) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_array_equal(found.ids, wanted.ids, str(number))
    return max(float(np.abs(f.alphas - w.alphas).max()) for f, w in zip(ours, theirs, strict=True))


def assert_near(ours: list[Decoded], theirs: list[Decoded]) -> None:
    """Of random weights: there are close calls among their tokens, which may go the other way."""
    for found, wanted in zip(ours, theirs, strict=True):
        assert len(found.ids) == len(wanted.ids)
        assert float(np.abs(found.alphas - wanted.alphas).max()) < ALPHA
    same = np.concatenate([found.ids == wanted.ids for found, wanted in zip(ours, theirs, strict=True)])
    assert len(same) > 50
    assert same.mean() > 0.85


# What FP16 says


@pytest.mark.parametrize("softmax", [False, True])
def test_fp16_hears_in_the_recordings_what_fp32_hears(
    bundled: Networks, sounds: list[Samples], expected: list[Decoded], softmax: bool
) -> None:
    recognizer = bundled.changed(lambda graph: half(graph, softmax)).rounded()
    assert apart([recognizer.decode(sound) for sound in sounds], expected) < ALPHA
    assert [recognizer.recognize(sound).text for sound in sounds] == list(transcripts().values())


def test_a_padded_batch_in_fp16_is_heard_as_each_alone(
    bundled: Networks, sounds: list[Samples], expected: list[Decoded]
) -> None:
    recognizer = bundled.changed(lambda graph: half(graph, softmax=True)).rounded()
    features = [recognizer._features(sound) for sound in sounds[:4]]
    assert apart(recognizer._decode(features, {}, padding=9), expected[:4]) < ALPHA


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("change", [half, lambda graph, softmax: opset13(half(graph, softmax))], ids=["17", "13"])
def test_onnxruntime_runs_the_fp16_networks(
    bundled: Networks, sounds: list[Samples], expected: list[Decoded], tmp_path: Path,
    change: Callable[[Graph, bool], Graph], softmax: bool,
) -> None:  # fmt: skip
    """On a CPU it proves that they are valid, no more: it computes FP16 in FP32."""
    recognizer = bundled.changed(lambda graph: change(graph, softmax)).on_onnxruntime(tmp_path)
    assert apart([recognizer.decode(sound) for sound in sounds], expected) < ALPHA
    recognizer.close()


# What does not fit


def louder(weights: Weights, factor: float, blocks: set[str] | None = None) -> Weights:
    """Return weights whose encoder's stream is so many times larger; `blocks`: what those add to it only."""

    def within(name: str) -> bool:
        return name.startswith("encoder.encoders") and (blocks is None or name.split(".feed_forward")[0] in blocks)

    matrices, vectors = dict(weights.matrices), dict(weights.vectors)
    for name in filter(within, weights.matrices):
        if name.endswith("w_2") or (blocks is None and name.endswith("linear_out")):
            matrices[name] = np.asarray(matrices[name] * np.float32(factor))
            vectors[f"{name}.bias"] = vectors[f"{name}.bias"] * np.float32(factor)
    for name in filter(within, weights.vectors):
        if blocks is None and name.endswith("fsmn_block.weight"):
            kernel = vectors[name] * np.float32(factor)
            kernel[..., (kernel.shape[-1] - 1) // 2] += np.float32(factor - 1)  # what it adds to v itself
            vectors[name] = kernel
    return Weights(matrices, vectors, weights.config)


def test_a_loud_stream_overflows_unless_it_is_divided(
    trained: tuple[Bundle, Weights], sounds: list[Samples], expected: list[Decoded], tmp_path: Path
) -> None:
    """The stream is 4096 times as large, the answer in fp32 the same: the last LayerNorm takes it out."""
    loud = networks_of(trained[0], louder(trained[1], 4096))
    recognizer = loud.on_onnxruntime(tmp_path)
    assert apart([recognizer.decode(sound) for sound in sounds], expected) < EXACT
    recognizer.close()
    with pytest.raises(EngineError, match="no finite numbers"):
        loud.changed(half).rounded()
    calibration = calibrate(loud.bundle, *loud.graphs, sounds, tmp_path, threads=1)
    assert calibration.scale > 64
    recognizer = loud.calibrated(calibration).changed(half).rounded()
    assert apart([recognizer.decode(sound) for sound in sounds], expected) < ALPHA


def test_hidden_values_that_overflow_are_divided_as_well(
    trained: tuple[Bundle, Weights], sounds: list[Samples], expected: list[Decoded], tmp_path: Path
) -> None:
    """A Relu lets every factor through; what follows it takes the factor out."""
    modules = ["encoder.encoders.2.feed_forward", "decoder.decoders.1.feed_forward"]
    matrices, vectors = dict(trained[1].matrices), dict(trained[1].vectors)
    for module in modules:
        matrices[f"{module}.w_1"] = np.asarray(matrices[f"{module}.w_1"] * np.float32(2**15))
        vectors[f"{module}.w_1.bias"] = vectors[f"{module}.w_1.bias"] * np.float32(2**15)
    matrices[f"{modules[0]}.w_2"] = np.asarray(matrices[f"{modules[0]}.w_2"] / np.float32(2**15))
    loud = networks_of(trained[0], Weights(matrices, vectors, trained[1].config))
    with pytest.raises(EngineError, match="no finite numbers"):
        loud.changed(half).rounded()
    calibration = calibrate(loud.bundle, *loud.graphs, sounds, tmp_path, threads=1)
    assert calibration.scale == 1
    assert sorted(calibration.inner) == sorted(modules)
    recognizer = loud.calibrated(calibration).changed(half).rounded()
    assert apart([recognizer.decode(sound) for sound in sounds], expected) < ALPHA


@pytest.mark.parametrize(("blocks", "loud"), [(10, 6), pytest.param(50, 30, marks=pytest.mark.slow)])
def test_a_deep_network_that_overflows_late_is_heard_nearly_as_in_fp32(blocks: int, loud: int, tmp_path: Path) -> None:
    """As reported of published models: of 50 blocks 30 to 38 overflow."""
    with pytest.MonkeyPatch.context() as patch:
        width, hidden, _, decoder = random_weights.DIMENSIONS["tiny"]
        patch.setitem(random_weights.DIMENSIONS, "tiny", (width, hidden, blocks, decoder))
        weights = weights_from("tiny")
    weights = louder(weights, 1e5, {f"encoder.encoders.{block}" for block in range(loud, min(loud + 8, blocks))})
    deep = networks_of(random_engine.bundle_of("tiny", tmp_path), weights)
    sounds = [random_weights.utterance(index) for index in range(2, 9)]
    recognizer = deep.on_onnxruntime(tmp_path)
    expected = [recognizer.decode(sound) for sound in sounds]
    recognizer.close()
    with pytest.raises(EngineError, match="no finite numbers"):
        deep.changed(half).rounded()
    calibration = calibrate(deep.bundle, *deep.graphs, sounds[:3], tmp_path, threads=1)
    assert int(calibration.where.split(".")[2]) >= loud
    assert calibration.scale > 1
    recognizer = deep.calibrated(calibration).changed(half).rounded()
    assert_near([recognizer.decode(sound) for sound in sounds], expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "large"])
def test_fp16_is_near_fp32_at_full_size(size: random_weights.Size, tmp_path: Path) -> None:
    networks = networks_of(random_engine.bundle_of(size, tmp_path), weights_from(size))
    sounds = [random_weights.utterance(index) for index in (3, 4)]
    recognizer = networks.on_onnxruntime(tmp_path)
    expected = [recognizer.decode(sound) for sound in sounds]
    recognizer.close()
    recognizer = networks.changed(half).rounded()
    assert_near([recognizer.decode(sound) for sound in sounds], expected)


def test_a_weight_that_fp16_does_not_hold_is_refused_and_not_clipped(tiny: Networks) -> None:
    name = "encoder.encoders.3.feed_forward.w_1.weight"
    tensors = {**tiny.encoder.tensors, name: tiny.encoder.tensors[name].copy()}
    tensors[name][5, 7] = -65504
    assert half(Graph(tiny.encoder.skeleton, tensors)).tensors[f"{name}.half"][5, 7] == -65504
    tensors[name][5, 7] = -65520  # halfway to what would come next
    with pytest.raises(EngineError, match=rf"{name}: a weight of 65520 does not fit into FP16.*onnx-fp32"):
        half(Graph(tiny.encoder.skeleton, tensors))


def test_weights_are_rounded_to_the_nearest(tiny: Networks) -> None:
    rounded = half(tiny.encoder).tensors
    name = "encoder.encoders.3.self_attn.linear_out.weight"
    np.testing.assert_array_equal(rounded[f"{name}.half"], tiny.encoder.tensors[name].astype(np.float16))


# Division


@pytest.mark.parametrize("scale", [1, 64])
def test_division_changes_no_answer_in_fp32(
    bundled: Networks, sounds: list[Samples], expected: list[Decoded], tmp_path: Path, scale: int
) -> None:
    divided = Networks(bundled.bundle, rescale(bundled.encoder, scale), bundled.decoder)
    recognizer = divided.on_onnxruntime(tmp_path)
    ours = [recognizer.decode(sound) for sound in sounds]
    recognizer.close()
    assert apart(ours, expected) < EXACT
    for found, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found.log_probabilities, wanted.log_probabilities, atol=EXACT)


def test_division_is_exact_and_of_what_goes_into_the_stream_only(tiny: Networks) -> None:
    divided = rescale(tiny.encoder, 64).tensors
    changed = {name for name, array in tiny.encoder.tensors.items() if not np.array_equal(array, divided[name])}
    ends = ("linear_out.weight", "linear_out.bias", "fsmn_block.kernel", "w_2.weight", "w_2.bias")
    assert changed == {name for name in divided if name.endswith(ends)}
    assert len(changed) == 5 * 6  # in each block, the first among them
    for name in changed:
        np.testing.assert_array_equal(divided[name] * np.float32(64), tiny.encoder.tensors[name])
    for name, array in rescale(tiny.decoder, 64).tensors.items():
        assert array is tiny.decoder.tensors[name]


def test_the_kernels_are_divided_with_the_one_that_is_folded_in(tiny: Networks) -> None:
    weight = weights_from("tiny").vectors["encoder.encoders.1.self_attn.fsmn_block.weight"]
    kernel = rescale(tiny.encoder, 8).tensors["encoder.encoders.1.self_attn.fsmn_block.kernel"]
    np.testing.assert_array_equal(kernel[:, 0, 0, 5], (weight[:, 0, 5] + 1) / 8)
    np.testing.assert_array_equal(kernel[:, 0, 0, 4], weight[:, 0, 4] / 8)


# Calibration


def test_the_scale_is_the_smallest_that_is_enough(
    trained: tuple[Bundle, Weights], bundled: Networks, sounds: list[Samples], tmp_path: Path
) -> None:
    usual = calibrate(bundled.bundle, *bundled.graphs, sounds[:2], tmp_path, threads=1)
    assert usual.scale == 1
    assert not usual.inner
    loud = networks_of(trained[0], louder(trained[1], 2**20))
    found = calibrate(loud.bundle, *loud.graphs, sounds[:2], tmp_path, threads=1)
    assert found.largest == pytest.approx(usual.largest * 2**20, rel=1e-3)
    assert found.where == usual.where
    assert LARGEST / 2 <= found.largest / found.scale < LARGEST
    left = calibrate(loud.bundle, *loud.calibrated(found).graphs, sounds[:2], tmp_path, threads=1)
    assert left.scale == 1
    assert left.largest == pytest.approx(found.largest / found.scale, rel=1e-3)
    assert list(tmp_path.iterdir()) == []


class Recording(HalfNetwork):
    """A network that notes the largest value of its sums and convolutions, apart from the scores of attention."""

    def __init__(self, graph: Graph) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(graph.skeleton)
        for node in graph.skeleton.graph.node:
            weights = [name for name in node.input if name in graph.tensors]
            if (node.op_type == "Add" and not weights) or (node.op_type == "Conv" and "fsmn" in weights[0]):
                model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], FLOAT, None))
        super().__init__(Graph(model, graph.tensors))
        self.largest = 0.0

    def run(self, inputs: Any) -> Any:
        outputs = super().run(inputs)
        sums = [array for name, array in outputs.items() if name.startswith(("Add", "Conv"))]
        added = [np.abs(array).max() for array in sums if array.ndim == 3 or array.shape[2] == 1]
        self.largest = max(self.largest, *added)
        return outputs


@pytest.mark.parametrize("sign", [1, -1])
def test_calibration_finds_the_largest_value_of_the_stream(sign: float, tmp_path: Path) -> None:
    networks = networks_of(random_engine.bundle_of("tiny", tmp_path), louder(weights_from("tiny"), sign))
    sounds = [random_weights.utterance(index) for index in (2, 5)]
    found = calibrate(networks.bundle, *networks.graphs, sounds, tmp_path, threads=1)
    encoder = Recording(networks.encoder)
    recognizer = Paraformer(networks.bundle, encoder, HalfNetwork(networks.decoder), "fp32")
    for sound in (*sounds, *(make(seconds) for seconds in trial.TRIED_S for make in (trial.babble, trial.hiss))):
        recognizer.decode(sound)
    assert found.largest == pytest.approx(encoder.largest, rel=1e-4)


def test_what_no_division_helps_is_refused(trained: tuple[Bundle, Weights], tmp_path: Path) -> None:
    name = "decoder.decoders.0.src_attn.linear_k_v"
    matrices = {**trained[1].matrices, name: np.asarray(trained[1].matrices[name] * np.float32(1e5))}
    loud = networks_of(trained[0], Weights(matrices, trained[1].vectors, trained[1].config))
    with pytest.raises(EngineError, match=rf"^{name}: its activations reach .*onnx-fp32$"):
        calibrate(loud.bundle, *loud.graphs, [], tmp_path, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_recordings_of_a_bundle_are_found(sounds: list[Samples]) -> None:
    found = recordings(read_bundle(BUNDLE))
    for ours, theirs in zip(found, sounds, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_recordings_that_are_no_speech_of_ours_are_passed_over(tmp_path: Path, tiny: Networks) -> None:
    (tmp_path / "example").mkdir()
    (tmp_path / "example" / "damaged.wav").write_bytes(b"RIFF")
    write_wav(tmp_path / "example" / "long.wav", random_weights.utterance(1))
    with wave.open(str(tmp_path / "telephone.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16_000))
    found = recordings(dataclasses.replace(tiny.bundle, folder=tmp_path))
    assert [len(sound) for sound in found] == [10 * 16_000]


# What is rounded


@pytest.fixture(scope="module", params=[False, True], ids=["", "softmax"])
def softmax(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def exact(request: pytest.FixtureRequest, tiny: Networks) -> Graph:
    graph: Graph = getattr(tiny, request.param)
    return graph


@pytest.fixture(scope="module", params=[17, 13])
def graph(request: pytest.FixtureRequest, exact: Graph, softmax: bool) -> Graph:
    rounded = half(exact, softmax)
    return opset13(rounded) if request.param == 13 else rounded


def inferred(graph: Graph) -> dict[str, Any]:
    """Return the type of every tensor, as onnx infers it."""
    model = onnx.shape_inference.infer_shapes(graph.model(), check_type=True, strict_mode=True, data_prop=True)
    found = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.output)}
    found.update({value.name: value.type.tensor_type for value in model.graph.input})
    return found


def types_in(graph: Graph) -> dict[str, int]:
    constants = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in graph.tensors.items()}
    return {**constants, **{name: value.elem_type for name, value in inferred(graph).items()}}


def test_types_are_as_stated(exact: Graph, softmax: bool) -> None:
    graph = half(exact, softmax)
    types = types_in(graph)
    seen = Counter()  # type: Counter[str]
    for node in graph.skeleton.graph.node:
        kind, found = node.op_type, types[node.input[0]]
        predictor = any(name.startswith("predictor.") for name in node.input)
        summed = kind == "Add" and not any(name in graph.tensors for name in node.input)
        scores = summed and "Softmax" in {reader.op_type for reader in readers_of(graph, node.output[0])}
        if kind in ("MatMul", "Conv") and not predictor:
            wanted = FLOAT16
        elif kind == "Softmax" or scores:
            wanted = FLOAT16 if softmax else FLOAT
        elif predictor or summed or kind in ("LayerNormalization", "LogSoftmax", "ArgMax", "ReduceMax", "Sigmoid"):
            wanted = FLOAT
        else:
            continue
        seen["predictor" if predictor else "sum" if summed else kind] += 1
        assert found == wanted, node.name
    assert {"MatMul", "Conv", "Softmax", "LayerNormalization", "sum"} <= set(seen)
    assert ("predictor" in seen) == (exact.skeleton.graph.name == "encoder")


def readers_of(graph: Graph, name: str) -> list[Any]:
    return [node for node in graph.skeleton.graph.node if name in node.input]


def test_the_bias_of_the_scores_is_added_in_fp32(tiny: Networks) -> None:
    types = types_in(half(tiny.decoder, softmax=True))
    [node] = readers_of(half(tiny.decoder, softmax=True), "decoder.output_layer.bias")
    assert [types[name] for name in node.input] == [FLOAT, FLOAT]


def test_the_mask_is_added_in_fp32(tiny: Networks) -> None:
    for exact in tiny.graphs:
        graph = half(exact)
        types = types_in(graph)
        [hidden] = [node for node in graph.skeleton.graph.node if "hidden" in node.input]
        assert types[hidden.output[0]] == FLOAT
        np.testing.assert_array_equal(graph.tensors["hidden"], np.float32(-1e4))


def test_inputs_and_outputs_stay_but_for_shorter_ids(graph: Graph, exact: Graph) -> None:
    found, wanted = graph.skeleton.graph, onnx.GraphProto()
    wanted.CopyFrom(exact.skeleton.graph)
    for output in wanted.output:
        if output.name == "ids":
            output.type.tensor_type.elem_type = INT32
    assert list(found.input) == list(wanted.input)
    assert list(found.output) == list(wanted.output)
    types = types_in(graph)
    for output in found.output:
        assert types[output.name] == output.type.tensor_type.elem_type
    assert graph.skeleton.metadata_props == exact.skeleton.metadata_props


def test_each_tensor_is_cast_once_and_no_cast_is_cast_back(graph: Graph) -> None:
    nodes = graph.skeleton.graph.node
    casts = [node for node in nodes if node.op_type == "Cast"]
    assert len({(node.input[0], node.attribute[0].i) for node in casts}) == len(casts)
    types = types_in(graph)
    outputs = {output.name for output in graph.skeleton.graph.output}
    for cast in casts:
        assert types[cast.input[0]] != types[cast.output[0]]
        assert not readers_of(graph, cast.output[0]) or cast.output[0] not in outputs
        assert readers_of(graph, cast.output[0]) or cast.output[0] in outputs
        assert "Cast" not in {reader.op_type for reader in readers_of(graph, cast.output[0])}


def test_casts_are_as_few_as_can_be(tiny: Networks) -> None:
    encoder, decoder = (half(graph) for graph in tiny.graphs)
    count = [sum(node.op_type == "Cast" for node in graph.skeleton.graph.node) for graph in (encoder, decoder)]
    # Each block: in front of and behind attention, FSMN and feed-forward, and around the softmax. The mask.
    assert count[0] == 6 * 7 + 1
    # Around inner LayerNorms besides. The embedding, its mask, the last layer, the scores, and ids.
    assert count[1] == 2 * 10 + 11


def test_every_constant_is_stored_once_and_read(graph: Graph) -> None:
    read = {name for node in graph.skeleton.graph.node for name in node.input}
    assert set(graph.tensors) <= read
    assert not [name for name in graph.tensors if f"{name}.half" in graph.tensors]


# Opset 13


def test_layer_norms_written_out_give_the_same(
    bundled: Networks, sounds: list[Samples], expected: list[Decoded], tmp_path: Path
) -> None:
    recognizer = bundled.changed(opset13).on_onnxruntime(tmp_path)
    ours = [recognizer.decode(sound) for sound in sounds]
    recognizer.close()
    assert apart(ours, expected) < EXACT


def test_layer_norms_are_written_out_in_fp32(exact: Graph) -> None:
    graph = opset13(half(exact, softmax=True))
    types = types_in(graph)
    norms = [node.output[0] for node in exact.skeleton.graph.node if node.op_type == "LayerNormalization"]
    assert norms
    for norm in norms:
        parts = [node for node in graph.skeleton.graph.node if node.output[0].startswith((f"{norm}.", norm))]
        parts = [node for node in parts if node.output[0] == norm or node.output[0].rpartition(".")[0] == norm]
        assert Counter(node.op_type for node in parts if node.op_type != "Cast") == NORM_PARTS
        assert {types[name] for node in parts if node.op_type != "Cast" for name in node.input} == {FLOAT}
    assert graph.tensors["epsilon"] == np.float32(1e-12)


NORM_PARTS = Counter({"ReduceMean": 2, "Add": 2, "Mul": 2, "Sub": 1, "Sqrt": 1, "Div": 1})

# TensorRT


@dataclass(frozen=True)
class Parser:
    """What a release of onnx-tensorrt says of itself in `docs/operators.md`."""

    opsets: tuple[int, int]
    floats: frozenset[str]
    """Operators that take FP32 and FP16, of those that we use."""
    casts: frozenset[int]


USED = frozenset(
    "Add ArgMax Cast Conv Div LogSoftmax MatMul Mul ReduceMax ReduceMean Relu Reshape Sigmoid Softmax Split"  # noqa: SIM905
    " Sqrt Squeeze Sub Transpose Unsqueeze".split()
)
PARSERS = {
    "8.5": Parser((7, 17), USED, frozenset({FLOAT, FLOAT16, INT32})),
    "10.15": Parser((9, 24), USED | {"LayerNormalization"}, frozenset({FLOAT, FLOAT16, INT32, INT64})),
    "11.2": Parser((9, 24), USED | {"LayerNormalization"}, frozenset({FLOAT, FLOAT16, INT32, INT64})),
}
"""Its changelog has LayerNormalization from 8.6 on, INT64 from 9.0 on, and takes nothing back of what is here."""
ATTRIBUTES = {
    "ArgMax": {"axis", "keepdims"},
    "Cast": {"to"},
    "Conv": {"group", "kernel_shape", "pads"},
    "LayerNormalization": {"axis", "epsilon"},
    "LogSoftmax": {"axis"},
    "ReduceMax": {"axes", "keepdims"},
    "ReduceMean": {"axes", "keepdims"},
    "Softmax": {"axis"},
    "Split": {"axis"},
    "Transpose": {"perm"},
}
"""None is restricted in any of these releases. Reshape has no `allowzero`, so that 0 means: as it is."""
CONSTANT = {"Conv": (1,), "Reshape": (1,), "Split": (1,), "Squeeze": (1,), "Unsqueeze": (1,)}
"""Inputs that must be constants in some release, or else make shapes depend on data."""
FOR = [("8.5", 13), ("10.15", 17), ("10.15", 13), ("11.2", 17), ("11.2", 13)]


@pytest.mark.parametrize(("release", "opset"), FOR)
def test_tensorrt_takes_every_operator(exact: Graph, softmax: bool, release: str, opset: int) -> None:
    parser, graph = PARSERS[release], half(exact, softmax)
    graph = opset13(graph) if opset == 13 else graph
    assert [(entry.domain, entry.version) for entry in graph.skeleton.opset_import] == [("", opset)]
    assert parser.opsets[0] <= opset <= parser.opsets[1]
    types = types_in(graph)
    for node in graph.skeleton.graph.node:
        assert node.domain == ""
        assert node.op_type in parser.floats
        assert {attribute.name for attribute in node.attribute} <= ATTRIBUTES.get(node.op_type, set()), node.name
        assert not [attribute for attribute in node.attribute if attribute.HasField("g") or attribute.graphs]
        for place in CONSTANT.get(node.op_type, ()):
            assert node.input[place] in graph.tensors
        if node.op_type == "Cast":
            assert node.attribute[0].i in parser.casts
        else:
            operands = [types[name] for name in node.input if types[name] != INT64]
            assert operands in ([FLOAT] * len(operands), [FLOAT16] * len(operands)), node.name
    onnx.checker.check_model(graph.model(), full_check=True)


def test_only_the_number_of_a_token_is_an_integer(graph: Graph) -> None:
    """TensorRT 8.5 makes INT32 of it at once, later ones where it is cast: the answer is INT32 in all."""
    types = types_in(graph)
    nodes = graph.skeleton.graph.node
    integers = {name: node.op_type for node in nodes for name in node.output if types[name] in (INT32, INT64)}
    decoder = graph.skeleton.graph.name == "decoder"
    assert integers == ({"ids.wide": "ArgMax", "ids": "Cast"} if decoder else {})


def test_every_rank_is_known(graph: Graph) -> None:
    found = inferred(graph)
    for node in graph.skeleton.graph.node:
        for name in node.output:
            assert found[name].HasField("shape"), name
    assert max(len(value.shape.dim) for value in found.values()) == 4


# The backend of these tests


def test_the_backend_computes_in_fp32_as_onnxruntime_does(
    bundled: Networks, sounds: list[Samples], expected: list[Decoded]
) -> None:
    for change in (lambda graph: graph, opset13):
        recognizer = bundled.changed(change).rounded()
        assert apart([recognizer.decode(sound) for sound in sounds[:3]], expected[:3]) < EXACT


@pytest.mark.parametrize("wide_sums", [False, True], ids=["narrow sums", "wide sums"])
def test_long_sums_lose_less_where_they_are_told_to_be_in_fp32(wide_sums: bool) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 4096), ("y", 1)))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="m"), helper.make_node("Sqrt", ["m"], ["y"], name="y")]
    model = helper.make_model(helper.make_graph(nodes, "sum", [x], [y]))
    exact = Graph(model, {"w": np.full((4096, 1), 0.9, np.float32)})
    network = HalfNetwork(half(exact, wide_sums=wide_sums), narrow_sums=True)
    off = abs(float(network.run({"x": np.ones((1, 4096), np.float32)})["y"].item()) - (0.9 * 4096) ** 0.5)
    assert off < 0.02 if wide_sums else off > 0.2


def test_the_backend_lets_fp16_overflow() -> None:
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, FLOAT16, ["M", 8]) for name in ("x", "y"))
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "product", [x], [y]))
    network = HalfNetwork(Graph(model, {"weight": np.full((8, 8), 200, np.float16)}))
    [answer] = network.run({"x": np.full((1, 8), 200, np.float16)}).values()
    assert np.isposinf(answer).all()  # 320,000
    [answer] = network.run({"x": np.full((1, 8), 40, np.float16)}).values()
    np.testing.assert_array_equal(answer, np.float16(64_000))
