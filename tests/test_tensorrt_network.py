"""Networks on TensorRT, on the fakes of every release: the same answers as onnxruntime's, and nothing left behind."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_engine import bundle_of, recognizer_of, weights_from
from random_weights import utterance
from tensorrt_fakes import RELEASES, fake_tensorrt

from edge_asr.engine.graph import Graph, decoder_graph, encoder_graph
from edge_asr.engine.precision import opset13
from edge_asr.errors import BrokenEngineError, EngineError, NotFiniteError, TooLargeError
from edge_asr.recognizer import tensorrt_network
from edge_asr.recognizer.cuda import FREE_MEMORY
from edge_asr.recognizer.features import WIDTH
from edge_asr.recognizer.manifest import REMEDY
from edge_asr.recognizer.network import Arrays, DeviceArray
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.tensorrt_network import (
    MOST_GRAPHS,
    TensorRtNetwork,
    TensorRtOptions,
    load_networks,
    machine,
    unavailable,
)
from edge_asr.types import SAMPLE_RATE, Recognition, Samples

Shapes = tuple[tuple[int, ...], ...]
Profile = tuple[tuple[int, int], tuple[int, int]]

RELEASE = "10.3"
PROFILES: Sequence[Profile] = (((1, 1), (8, 64)), ((1, 1), (64, 160)), ((1, 4), (1, 64)))
"""Least and most utterances, least and most frames."""
SECOND = SAMPLE_RATE
SOUNDS = [utterance(7)[: 2 * SECOND], utterance(1)[: 5 * SECOND], utterance(3)[: 3 * SECOND]]
OPTIONS = [
    TensorRtOptions(cuda_graphs=graphs, mapped_memory=mapped) for graphs in (False, True) for mapped in (False, True)
]
PLAIN, ALL = OPTIONS[0], OPTIONS[3]
Plans = tuple[Path, Path]


@functools.cache
def weights() -> Any:
    return weights_from("tiny")


@functools.cache
def metadata() -> Mapping[str, str]:
    scale, tail, vocabulary = weights().input_scale, weights().config.tail, weights().vocabulary
    return {"input_scale": repr(scale), "tail": repr(tail), "vocabulary": str(vocabulary), "batches": "true"}


@functools.cache
def graphs(old: bool) -> tuple[bytes, bytes]:
    """Return encoder and decoder as ONNX; `old`: as TensorRT 8.5 takes them."""
    networks: tuple[Graph, ...] = (encoder_graph(weights(), metadata()), decoder_graph(weights()))
    encoder, decoder = ((opset13(graph) if old else graph).model().SerializeToString() for graph in networks)
    return encoder, decoder


@functools.cache
def plan_bytes(release: str) -> tuple[bytes, bytes]:
    """Build both plans with the fake of a release."""
    with fake_tensorrt(release):
        encoder, decoder = (build(graph) for graph in graphs(release == "8.5"))
    return encoder, decoder


def build(graph: bytes, profiles: Sequence[Profile] = PROFILES) -> bytes:
    trt = importlib.import_module("tensorrt")
    log = trt.Logger(trt.Logger.Severity.ERROR)
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << flags.EXPLICIT_BATCH.value if hasattr(flags, "EXPLICIT_BATCH") else 0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(graph), parser.get_error(0)
    config = builder.create_builder_config()
    for batch, frames in profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            least, most = (shape_of(tensor, batch[i], frames[i], (1, frames[1])[i]) for i in (0, 1))
            profile.set_shape(tensor.name, least, most, most)
        config.add_optimization_profile(profile)
    return bytes(memoryview(builder.build_serialized_network(network, config)))


def shape_of(tensor: Any, batch: int, frames: int, tokens: int) -> tuple[int, ...]:
    sizes = {"cif": (batch, tokens, frames), "emb_mask": (batch, tokens)}
    return sizes.get(tensor.name, (batch, frames, *tuple(tensor.shape)[2:]))


@pytest.fixture
def plans(tmp_path: Path) -> Callable[[str], Plans]:
    """Write both plans of a release; return their paths."""

    def write(release: str = RELEASE) -> Plans:
        paths = tmp_path / "encoder.plan", tmp_path / "decoder.plan"
        for path, content in zip(paths, plan_bytes(release), strict=True):
            path.write_bytes(content)
        return paths

    return write


@contextmanager
def loaded(plans: Plans, options: TensorRtOptions | None = None) -> Iterator[tuple[TensorRtNetwork, TensorRtNetwork]]:
    networks = load_networks(*plans, metadata(), options or TensorRtOptions())
    try:
        yield networks
    finally:
        for network in networks:
            network.close()


@contextmanager
def recognizing(plans: Plans, options: TensorRtOptions | None = None) -> Iterator[Paraformer]:
    with loaded(plans, options) as networks:
        yield Paraformer(bundle_of("tiny", plans[0].parent), *networks, engine="tensorrt-fp16")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Paraformer:
    return recognizer_of(weights(), "tiny", tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def expected(reference: Paraformer) -> list[Recognition]:
    found = [reference.recognize(sound) for sound in SOUNDS]
    assert min(len(one.tokens) for one in found) > 3
    return found


def frames(count: int, batch: int = 1, seed: int = 0) -> Arrays:
    """Return inputs of an encoder."""
    x = np.random.default_rng(seed).standard_normal((batch, count, WIDTH)).astype(np.float32)
    return {"x": x, "mask": np.ones((batch, count), np.float32)}


def tokens(enc: DeviceArray, count: int) -> Arrays:
    """Return inputs of a decoder, for the output of an encoder."""
    batch, length = enc.shape[:2]
    cif = np.random.default_rng(1).random((batch, count, length)).astype(np.float32) / length
    ones = {"enc_mask": np.ones((batch, length), np.float32), "emb_mask": np.ones((batch, count), np.float32)}
    return {"enc": enc, "cif": cif, **ones}


def same(found: Recognition, wanted: Recognition) -> bool:
    pieces = [(token.text, token.start_ms, token.end_ms) for token in wanted.tokens]
    assert found.confidence == pytest.approx(wanted.confidence, abs=1e-4)
    return found.text == wanted.text and [(one.text, one.start_ms, one.end_ms) for one in found.tokens] == pieces


# The same answers


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=str)
@pytest.mark.parametrize("release", RELEASES)
def test_a_recogniser_on_plans_hears_what_onnxruntime_hears(
    release: str, options: TensorRtOptions, plans: Callable[[str], Plans], expected: list[Recognition]
) -> None:
    paths = plans(release)
    with fake_tensorrt(release) as gpu, recognizing(paths, options) as recognizer:
        for _ in range(2):
            for sound, wanted in zip(SOUNDS, expected, strict=True):
                assert same(recognizer.recognize(sound), wanted)
        batch = [SOUNDS[0], SOUNDS[2], SOUNDS[0]]
        found = recognizer.recognize_batch(batch)
        assert all(same(*pair) for pair in zip(found, [expected[0], expected[2], expected[0]], strict=True))
        assert recognizer.decode(SOUNDS[0]).ids.dtype == np.int64
        assert bool(gpu.counts["graph launches"]) == options.cuda_graphs
        assert gpu.counts["copies of pageable memory"] == 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_networks_answer_as_onnxruntime_does(
    options: TensorRtOptions, plans: Callable[[], Plans], reference: Paraformer
) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE), loaded(paths, options) as (encoder, decoder):
        # The shortest are filled up, to what the profile or the graph is for: that must not be seen.
        for count, length, batch in ((3, 1, 1), (8, 8, 1), (63, 9, 1), (3, 2, 1), (130, 60, 1), (5, 3, 3), (64, 64, 4)):
            inputs = frames(count, batch)
            found, wanted = encoder.run(inputs), reference._encoder.run(inputs)
            np.testing.assert_allclose(found["enc"].numpy(), wanted["enc"], atol=2e-5)
            np.testing.assert_allclose(found["alphas"], wanted["alphas"], atol=2e-5)
            asked = tokens(found["enc"], length)
            decoded = decoder.run(asked)
            known = reference._decoder.run({**asked, "enc": wanted["enc"]})
            np.testing.assert_array_equal(decoded["ids"], known["ids"])
            np.testing.assert_allclose(decoded["logp"], known["logp"], atol=2e-5)
            assert decoded["ids"].shape == (batch, length)


def test_answers_are_copies_that_the_next_run_leaves_alone(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, _):
        first = encoder.run(frames(20))["alphas"]
        before = first.copy()
        encoder.run(frames(20, seed=1))
        np.testing.assert_array_equal(first, before)


def test_metadata_is_what_was_given(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, _):
        assert encoder.metadata == metadata()


# What stays on the GPU


def test_enc_is_read_by_the_decoder_without_a_copy(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE) as gpu, loaded(paths) as (encoder, decoder):
        enc = encoder.run(frames(20))["enc"]
        assert (enc.shape, enc.dtype) == ((1, 20, weights().width), np.float32)
        gpu.view(enc.address, 20 * weights().width * 4).view(np.float32)[:] = 0.5
        before = decoder.run(tokens(enc, 4))["logp"]
        gpu.view(enc.address, 20 * weights().width * 4).view(np.float32)[:] = -0.5
        assert (decoder.run(tokens(enc, 4))["logp"] != before).any(), "it reads what lies there"


def test_enc_of_an_earlier_run_is_refused(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, decoder):
        old = encoder.run(frames(20))["enc"]
        new = encoder.run(frames(20))["enc"]
        with pytest.raises(EngineError, match="has run again"):
            decoder.run(tokens(old, 4))
        with pytest.raises(EngineError, match="has run again"):
            old.numpy()
        encoder.close()
        with pytest.raises(EngineError, match="was closed"):
            new.numpy()


def test_enc_of_anything_else_is_refused(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, decoder), loaded(paths) as (other, _):
        mine = encoder.run(frames(20))["enc"]
        for enc in (other.run(frames(20))["enc"], mine.numpy()):
            with pytest.raises(EngineError, match="of the encoder that was loaded with it"):
                decoder.run(tokens(enc, 4))
        with pytest.raises(EngineError, match="does not go with the other inputs"):
            decoder.run({**tokens(mine, 4), "emb_mask": np.ones((1, 5), np.float32)})


# Sizes


def test_what_no_profile_is_for_is_refused(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, decoder):
        for count, batch in ((161, 1), (65, 2), (8, 5)):
            with pytest.raises(TooLargeError) as raised:
                encoder.run(frames(count, batch))
            assert f"{paths[0]}: {batch} x {count} frames are too many" in str(raised.value)
            assert "it takes at most: 1 x 64 frames; 1 x 160 frames; 4 x 64 frames" in str(raised.value)
        with pytest.raises(TooLargeError, match="1 x 20 frames, 161 tokens are too many"):
            decoder.run(tokens(encoder.run(frames(20))["enc"], 161))
        decoder.run(tokens(encoder.run(frames(20))["enc"], 4))


def test_a_batch_that_is_too_large_is_recognised_in_parts(
    plans: Callable[[], Plans], expected: list[Recognition]
) -> None:
    paths = plans()
    numbers = [0, 2, 0, 2, 0, 1, 0, 2, 0]  # more than four, and one that is too long for any batch
    with fake_tensorrt(RELEASE), recognizing(paths) as recognizer:
        found = recognizer.recognize_batch([SOUNDS[number] for number in numbers])
        assert all(same(*pair) for pair in zip(found, [expected[number] for number in numbers], strict=True))
        with pytest.raises(TooLargeError):
            recognizer.recognize(utterance(1)[: 12 * SECOND])
        with pytest.raises(TooLargeError):
            recognizer.recognize_batch([SOUNDS[0], utterance(1)[: 12 * SECOND]])


def test_contexts_and_memory_for_batches_are_made_when_they_are_needed(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE) as gpu, loaded(paths) as (encoder, _):
        taken = gpu.counts["allocations"]
        assert gpu.live["execution contexts"] == 0
        for count, batch, contexts in ((20, 1, 1), (100, 1, 2), (64, 1, 2)):
            encoder.run(frames(count, batch))
            assert (gpu.live["execution contexts"], gpu.counts["allocations"]) == (contexts, taken)
        encoder.run(frames(20, 2))
        assert gpu.live["execution contexts"] == 3
        # The inputs and alphas on both sides, enc on the GPU.
        assert gpu.counts["allocations"] == taken + 7


@pytest.mark.parametrize("rounds", [20, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_thousand_runs_take_nothing_more(rounds: int, options: TensorRtOptions, plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE) as gpu, loaded(paths, options) as (encoder, decoder):
        inputs = frames(9), frames(9, 2)

        def run() -> tuple[Any, ...]:
            for each in inputs:
                decoder.run(tokens(encoder.run(each)["enc"], 2))
            return gpu.counts["allocations"], sorted(gpu.live.items()), gpu.leaks(), gpu.used

        run()
        before = run()
        assert [run() for _ in range(rounds)] == [before] * rounds
        assert gpu.counts["executions"] == (rounds + 2) * 4


# CUDA graphs


def test_launches_are_recorded_once_for_each_bucket(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE) as gpu, loaded(paths, TensorRtOptions(cuda_graphs=True)) as (encoder, decoder):
        for count in (9, 16, 12, 65, 90):
            decoder.run(tokens(encoder.run(frames(count))["enc"], 3))
        assert gpu.live["executable graphs"] == 4, "for 16 and 96 frames, of each network"
        assert gpu.live["graphs"] == 0
        assert gpu.counts["graph launches"] == 6
        encoder.run(frames(9, 2))
        assert gpu.live["executable graphs"] == 4, "batches are launched"


def test_the_graph_that_was_needed_least_recently_goes_first(
    plans: Callable[[], Plans], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST_GRAPHS > 12
    monkeypatch.setattr(tensorrt_network, "MOST_GRAPHS", 2)
    paths = plans()
    with fake_tensorrt(RELEASE) as gpu, loaded(paths, TensorRtOptions(cuda_graphs=True)) as (encoder, _):
        for count, launches in ((8, 0), (16, 0), (8, 1), (24, 1), (8, 2), (16, 2), (24, 2)):
            encoder.run(frames(count))
            assert (count, gpu.counts["graph launches"]) == (count, launches)
            assert gpu.live["executable graphs"] <= 2


def broken_capture(gpu: Any, stream: int, graph: Any) -> int:
    """Do what cudaStreamEndCapture does after a call that cannot be recorded."""
    gpu.stream(stream).capture = None
    return 901


@pytest.mark.parametrize("why", ["missing", "memory", "capture"])
def test_where_nothing_can_be_recorded_it_is_launched_as_ever(
    why: str, plans: Callable[[], Plans], expected: list[Recognition], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    paths = plans()
    settings: dict[str, Any] = {"cudart": "missing"} if why == "missing" else {}
    with fake_tensorrt(RELEASE, **settings) as gpu, loaded(paths, TensorRtOptions(cuda_graphs=True)) as networks:
        if why == "memory":
            gpu.out_of_memory_at = gpu.counts["allocations"] + 1
        if why == "capture":
            monkeypatch.setattr(importlib.import_module("fake_gpu.cudart"), "_end_capture", broken_capture)
        recognizer = Paraformer(bundle_of("tiny", paths[0].parent), *networks, engine="tensorrt-fp16")
        for sound, wanted in zip(SOUNDS, expected, strict=True):
            for _ in range(2):
                assert same(recognizer.recognize(sound), wanted)
        assert gpu.live["graphs"] == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    said = {"missing": "libcudart", "memory": "out of memory", "capture": "previous error during capture"}[why]
    assert 1 <= len(warnings) <= 2
    assert len(set(warnings)) == 1
    assert said in warnings[0]


# What goes wrong while loading


def damage(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "decoder"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(damage(path.read_bytes())), "Magic tag does not match"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(plan_bytes("10.13")[path.name != "encoder.plan"]), "Version tag does not match"),
    ],
    ids=["flipped", "empty", "missing", "of another TensorRT"],
)
def test_a_plan_that_cannot_be_loaded_is_one_line_with_the_remedy(
    which: int, harm: Callable[[Path], Any], said: str, plans: Callable[[], Plans]
) -> None:
    paths = plans()
    plan_bytes("10.13")
    harm(paths[which])
    with fake_tensorrt(RELEASE), pytest.raises(EngineError) as raised:
        load_networks(*paths, metadata(), TensorRtOptions())
    line = str(raised.value)
    assert line.startswith(f"{paths[which]}: ")
    assert said in line
    assert line.endswith(REMEDY)
    assert "\n" not in line


def test_a_plan_for_another_gpu_is_refused(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE, sm="7.2"), pytest.raises(EngineError, match=r"incompatible device.*build-engine again"):
        load_networks(*paths, metadata(), TensorRtOptions())


def test_a_plan_of_something_else_is_refused(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE):
        graph = encoder_graph(weights(), metadata()).model()
        graph.graph.input[1].name = "lengths"
        for node in graph.graph.node:
            node.input[:] = ["lengths" if name == "mask" else name for name in node.input]
        paths[0].write_bytes(build(graph.SerializeToString()))
        with pytest.raises(EngineError, match=r"no plan of edge-asr \('lengths'\).*build-engine again"):
            load_networks(*paths, metadata(), TensorRtOptions())


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=str)
@pytest.mark.parametrize("release", ["8.5", "11.4"])
def test_out_of_memory_anywhere_leaves_nothing_behind(
    release: str, options: TensorRtOptions, plans: Callable[[str], Plans]
) -> None:
    paths = plans(release)
    with fake_tensorrt(release) as gpu:
        with loaded(paths, options):
            needed = gpu.counts["allocations"]
        assert needed >= 10
        for number in range(1, needed + 1):
            gpu.out_of_memory_at = gpu.counts["allocations"] + number
            with pytest.raises(EngineError, match=FREE_MEMORY) as raised:
                load_networks(*paths, metadata(), options)
            assert not isinstance(raised.value, BrokenEngineError)
            assert gpu.leaks() == [], "not even while the error is kept"


def test_what_is_lacking_is_named(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE) as gpu:
        with loaded(paths):
            engines = sum(one.size for one in gpu.allocations.values() if one.kind == "engine")
        gpu.free = engines + 100_000
        with pytest.raises(
            EngineError, match=r"the GPU has no [\d.]+ MB left for what the networks compute on the way"
        ):
            load_networks(*paths, metadata(), TensorRtOptions())


def test_out_of_memory_for_a_batch_leaves_the_rest_at_work(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE) as gpu, loaded(paths) as (encoder, _):
        alone = encoder.run(frames(20))["alphas"]
        held = len(gpu.allocations)
        for number in range(1, 8):
            gpu.out_of_memory_at = gpu.counts["allocations"] + number
            with pytest.raises(EngineError, match=r"left for|locked in memory"):
                encoder.run(frames(20, 2))
            assert len(gpu.allocations) == held
        np.testing.assert_array_equal(encoder.run(frames(20))["alphas"], alone)
        encoder.run(frames(20, 2))


def test_a_context_that_cannot_be_made_is_an_error_of_one_run(
    plans: Callable[[], Plans], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, _):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("tensorrt").ICudaEngine, "_context", lambda self, managed: None)
            with pytest.raises(EngineError, match="cannot make an execution context"):
                encoder.run(frames(20))
        encoder.run(frames(20))


@pytest.mark.parametrize(
    ("method", "answer", "said"),
    [
        ("set_input_shape", False, r"refuses x \(1, 20, 560\)"),
        ("set_tensor_address", False, "refuses the address of"),
        ("infer_shapes", ["mask"], "cannot tell the shapes"),
        ("infer_shapes", RuntimeError("infer_shapes error code: -1"), "cannot tell the shapes"),
        ("get_tensor_shape", (1, -1), "would answer"),
        ("execute_async_v3", False, "cannot run it"),
        ("set_optimization_profile_async", False, "cannot choose profile 0"),
        ("set_optimization_profile_async", RuntimeError("Error in set optimization profile async."), "cannot choose"),
    ],
)
def test_every_answer_of_tensorrt_is_looked_at(
    method: str, answer: Any, said: str, plans: Callable[[], Plans], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(context: Any, *arguments: Any) -> Any:
        context._logger.log(importlib.import_module("tensorrt").ILogger.Severity.ERROR, "this is\nwhy")
        if isinstance(answer, Exception):
            raise type(answer)(*answer.args)
        return answer

    paths = plans()
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, _):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("tensorrt")._runtime.IExecutionContext, method, refuse)
            with pytest.raises(EngineError, match=rf"{said}.*\(this is why\); {REMEDY}") as raised:
                encoder.run(frames(20))
            assert not isinstance(raised.value, BrokenEngineError)
            del raised  # its traceback holds the context, in the frame of refuse()
        encoder.run(frames(20))


# What goes wrong while running


def run_next(encoder: TensorRtNetwork, decoder: TensorRtNetwork, number: int, enc: DeviceArray) -> DeviceArray:
    """Run the encoder when the number is odd, else the decoder."""
    if number % 2:
        found: DeviceArray = encoder.run(frames(20))["enc"]
        return found
    decoder.run(tokens(enc, 4))
    return enc


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_after_an_error_of_the_gpu_nothing_can_be_computed(
    failing: int, options: TensorRtOptions, plans: Callable[[], Plans]
) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE, fail_at=failing), loaded(paths, options) as (encoder, decoder):
        enc: Any = None
        for number in range(1, failing):
            enc = run_next(encoder, decoder, number, enc)
        for number in (failing, failing, 1, 1):
            with pytest.raises(BrokenEngineError, match=r"launch failure.*restart edge-asr"):
                run_next(encoder, decoder, number, enc)


def test_numbers_that_are_not_finite_have_an_error_of_their_own(plans: Callable[[], Plans]) -> None:
    paths = plans()
    for failing in (3, 4):  # after the second of noise at the beginning: of the encoder, of the decoder
        with fake_tensorrt(RELEASE, nan_at=failing), recognizing(paths) as recognizer, pytest.raises(NotFiniteError):
            recognizer.recognize(SOUNDS[0])


# Threads, and the end


def test_any_thread_may_load_run_and_close(plans: Callable[[], Plans], expected: list[Recognition]) -> None:
    paths = plans()
    found: list[Any] = []

    def on_a_thread(work: Callable[[], Any]) -> Any:
        thread = threading.Thread(target=lambda: found.append(work()))
        thread.start()
        thread.join()
        return found.pop()

    with fake_tensorrt(RELEASE) as gpu:
        networks = on_a_thread(lambda: load_networks(*paths, metadata(), TensorRtOptions(cuda_graphs=True)))
        bundle = bundle_of("tiny", paths[0].parent)
        recognizer = on_a_thread(lambda: Paraformer(bundle, networks[0], networks[1], engine="tensorrt-fp16"))
        assert same(on_a_thread(lambda: recognizer.recognize(SOUNDS[0])), expected[0])
        assert same(recognizer.recognize(SOUNDS[0]), expected[0])
        assert not any(gpu.stacks.values()), "no thread keeps the context"
        on_a_thread(recognizer.close)
        assert gpu.leaks() == []


def test_closing_twice_does_no_harm_and_what_is_closed_does_not_run(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, decoder):
        enc = encoder.run(frames(20))["enc"]
        for _ in range(2):
            decoder.close()
        with pytest.raises(EngineError, match="is closed"):
            decoder.run(tokens(enc, 4))
        encoder.run(frames(20))


def test_another_pair_is_loaded_beside_the_first_and_outlives_it(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE) as gpu, loaded(paths) as (first, _):
        wanted = first.run(frames(20))["alphas"]
        for _ in range(10):
            with loaded(paths, TensorRtOptions(cuda_graphs=True)) as (second, _):
                np.testing.assert_array_equal(second.run(frames(20))["alphas"], wanted)
            np.testing.assert_array_equal(first.run(frames(20))["alphas"], wanted)
            assert gpu.live["primary contexts"] == 1


def test_the_context_of_others_stays_as_it_is(plans: Callable[[], Plans]) -> None:
    paths = plans()
    with fake_tensorrt(RELEASE):
        driver = importlib.import_module("pycuda.driver")
        driver.init()
        other = driver.Device(0).make_context()
        with loaded(paths) as (encoder, _):
            encoder.run(frames(20))
            assert driver.Context.get_current() is other
        assert driver.Context.get_current() is other
        other.detach()


def test_what_tensorrt_says_is_for_the_log_at_debug(
    plans: Callable[[], Plans], caplog: pytest.LogCaptureFixture
) -> None:
    paths = plans()
    caplog.set_level(logging.DEBUG, "edge_asr")
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, _):
        trt = importlib.import_module("tensorrt")
        log = encoder._plan.log
        assert isinstance(log, trt.ILogger)
        log.log(trt.ILogger.Severity.WARNING, "look here")
        log.log(trt.ILogger.Severity.INFO, "by the way")
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert (logging.DEBUG, "TensorRT: look here") in said
    assert "by the way" not in str(said)


# Machines


@pytest.mark.parametrize(
    ("release", "settings", "number", "said"),
    [
        ("broken", {}, 0, r"TensorRT is not installed, or cannot be loaded \(libnvdla_compiler.so"),
        (RELEASE, {"gpu": "nodriver"}, 0, r"pycuda cannot be loaded \(libcuda.so.1"),
        (RELEASE, {"gpu": "none"}, 0, "CUDA finds no GPU .*no CUDA-capable device"),
        (RELEASE, {}, 3, r"there is no GPU 3 \(engine.gpu\), only 1"),
    ],
)
def test_what_is_lacking_is_told_in_a_line(
    release: str, settings: dict[str, Any], number: int, said: str, tmp_path: Path
) -> None:
    with fake_tensorrt(release, clean=False, **settings):
        why = unavailable(number)
        assert why is not None
        assert "\n" not in why
        with pytest.raises(EngineError, match=said):
            load_networks(tmp_path, tmp_path, {}, TensorRtOptions(gpu=number))
        with pytest.raises(EngineError, match=said):
            machine(number)


@pytest.mark.parametrize(
    ("module", "made", "said"),
    [
        ("tensorrt", None, "TensorRT is not installed"),
        ("tensorrt", types.ModuleType("tensorrt"), "TensorRT is not installed, or cannot be loaded"),
        ("tensorrt", types.SimpleNamespace(__version__="8.4.3.1"), "TensorRT 8.4.3.1 is too old"),
        ("pycuda.driver", None, "pycuda cannot be loaded"),
    ],
)
def test_what_is_not_installed_half_there_or_too_old_is_told(
    module: str, made: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_tensorrt(RELEASE):
        monkeypatch.setitem(sys.modules, module, made)
        assert str(unavailable()).startswith(said)
        monkeypatch.undo()


def test_the_machine_says_what_plans_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tegra = tmp_path / "nv_tegra_release"
    tegra.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081\n# KERNEL_VARIANT: oot\n")
    monkeypatch.setattr(tensorrt_network, "LEGACY_TEGRA", tegra)
    with fake_tensorrt("10.3", sm="8.7", memory="1000000,8000000", name="Orin"):
        found = machine()
    assert (found.tensorrt, found.cuda, found.driver, found.gpu, found.sm) == ("10.3.0", "12.6", "12.6", "Orin", "8.7")
    assert (found.free_bytes, found.total_bytes) == (1_000_000, 8_000_000)
    assert found.l4t == "# R36 (release), REVISION: 4.3, GCID: 38968081"
    tegra.unlink()
    with fake_tensorrt("11.4"):
        assert (machine().l4t, machine().cuda) == (None, "13.2")


def test_a_second_of_silence_is_nothing(plans: Callable[[], Plans], reference: Paraformer) -> None:
    paths = plans()
    silence: Samples = np.zeros(SECOND, np.float32)
    with fake_tensorrt(RELEASE), recognizing(paths) as recognizer:
        assert recognizer.recognize(silence).text == reference.recognize(silence).text
