"""Networks on TensorRT, on the fakes of every release: the same answers as onnxruntime's, and nothing taken twice."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_engine import bundle_of, recognizer_of
from random_weights import utterance
from small_plans import (
    ALL,
    OPTIONS,
    PLAIN,
    RELEASE,
    frames,
    loaded,
    metadata,
    recognizing,
    tokens,
    weights,
    write_plans,
)
from tensorrt_fakes import RELEASES, fake_tensorrt

from edge_asr.errors import EngineError, TooLargeError
from edge_asr.recognizer import tensorrt_plan
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.tensorrt_network import TensorRtOptions
from edge_asr.types import SAMPLE_RATE, Recognition, Samples

SECOND = SAMPLE_RATE
SOUNDS = [utterance(7)[: 2 * SECOND], utterance(1)[: 5 * SECOND], utterance(3)[: 3 * SECOND]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Paraformer:
    return recognizer_of(weights(), "tiny", tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def expected(reference: Paraformer) -> list[Recognition]:
    found = [reference.recognize(sound) for sound in SOUNDS]
    assert min(len(one.tokens) for one in found) > 3
    return found


def same(found: Recognition, wanted: Recognition) -> bool:
    pieces = [(token.text, token.start_ms, token.end_ms) for token in wanted.tokens]
    assert found.confidence == pytest.approx(wanted.confidence, abs=1e-4)
    return found.text == wanted.text and [(one.text, one.start_ms, one.end_ms) for one in found.tokens] == pieces


# The same answers


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=str)
@pytest.mark.parametrize("release", RELEASES)
def test_a_recogniser_on_plans_hears_what_onnxruntime_hears(
    release: str, options: TensorRtOptions, tmp_path: Path, expected: list[Recognition]
) -> None:
    paths = write_plans(tmp_path, release)
    with fake_tensorrt(release) as gpu, recognizing(paths, options) as recognizer:
        for _ in range(2):
            for sound, wanted in zip(SOUNDS, expected, strict=True):
                assert same(recognizer.recognize(sound), wanted)
        batch = [SOUNDS[0], SOUNDS[2], SOUNDS[0]]
        found = recognizer.recognize_batch(batch)
        assert all(same(*pair) for pair in zip(found, [expected[0], expected[2], expected[0]], strict=True))
        assert recognizer.decode(SOUNDS[0]).ids.dtype == np.int64
        assert bool(gpu.counts["graph launches"]) == (options.cuda_graphs and release != "8.5")
        assert gpu.counts["copies of pageable memory"] == 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_networks_answer_as_onnxruntime_does(options: TensorRtOptions, tmp_path: Path, reference: Paraformer) -> None:
    paths = write_plans(tmp_path)
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


def test_answers_are_copies_that_the_next_run_leaves_alone(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, _):
        first = encoder.run(frames(20))["alphas"]
        before = first.copy()
        encoder.run(frames(20, seed=1))
        np.testing.assert_array_equal(first, before)


def test_metadata_is_what_was_given(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, _):
        assert encoder.metadata == metadata()


# What stays on the GPU


def test_enc_is_read_by_the_decoder_without_a_copy(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE) as gpu, loaded(paths) as (encoder, decoder):
        enc = encoder.run(frames(20))["enc"]
        assert (enc.shape, enc.dtype) == ((1, 20, weights().width), np.float32)
        gpu.view(enc.address, 20 * weights().width * 4).view(np.float32)[:] = 0.5
        before = decoder.run(tokens(enc, 4))["logp"]
        gpu.view(enc.address, 20 * weights().width * 4).view(np.float32)[:] = -0.5
        assert (decoder.run(tokens(enc, 4))["logp"] != before).any(), "it reads what lies there"


def test_enc_of_an_earlier_run_is_refused(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
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


def test_enc_of_anything_else_is_refused(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, decoder), loaded(paths) as (other, _):
        mine = encoder.run(frames(20))["enc"]
        for enc in (other.run(frames(20))["enc"], mine.numpy()):
            with pytest.raises(EngineError, match="of the encoder that was loaded with it"):
                decoder.run(tokens(enc, 4))
        with pytest.raises(EngineError, match="does not go with the other inputs"):
            decoder.run({**tokens(mine, 4), "emb_mask": np.ones((1, 5), np.float32)})


# Sizes


def test_what_no_profile_is_for_is_refused(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE), loaded(paths) as (encoder, decoder):
        for count, batch in ((161, 1), (65, 2), (8, 5)):
            with pytest.raises(TooLargeError) as raised:
                encoder.run(frames(count, batch))
            assert f"{paths[0]}: {batch} x {count} frames are too many" in str(raised.value)
            assert "it takes at most: 1 x 64 frames; 1 x 160 frames; 4 x 64 frames" in str(raised.value)
        with pytest.raises(TooLargeError, match="1 x 20 frames, 161 tokens are too many"):
            decoder.run(tokens(encoder.run(frames(20))["enc"], 161))
        decoder.run(tokens(encoder.run(frames(20))["enc"], 4))


def test_a_batch_that_is_too_large_is_recognised_in_parts(tmp_path: Path, expected: list[Recognition]) -> None:
    paths = write_plans(tmp_path)
    numbers = [0, 2, 0, 2, 0, 1, 0, 2, 0]  # more than four, and one that is too long for any batch
    with fake_tensorrt(RELEASE), recognizing(paths) as recognizer:
        found = recognizer.recognize_batch([SOUNDS[number] for number in numbers])
        assert all(same(*pair) for pair in zip(found, [expected[number] for number in numbers], strict=True))
        with pytest.raises(TooLargeError):
            recognizer.recognize(utterance(1)[: 12 * SECOND])
        with pytest.raises(TooLargeError):
            recognizer.recognize_batch([SOUNDS[0], utterance(1)[: 12 * SECOND]])


def test_contexts_and_memory_for_batches_are_made_when_they_are_needed(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE) as gpu, loaded(paths) as (encoder, _):
        taken = gpu.counts["allocations"]
        assert gpu.live["execution contexts"] == 4, "of each network, for both profiles"
        for count, batch, contexts in ((20, 1, 5), (24, 1, 5), (17, 1, 5), (64, 1, 5), (160, 1, 5), (9, 1, 6)):
            encoder.run(frames(count, batch))
            assert (gpu.live["execution contexts"], gpu.counts["allocations"]) == (contexts, taken)
        encoder.run(frames(20, 2))
        # The inputs and alphas on both sides, enc on the GPU, and what is computed on the way.
        assert (gpu.live["execution contexts"], gpu.counts["allocations"]) == (7, taken + 8)
        encoder.run(frames(30, 3))
        assert (gpu.live["execution contexts"], gpu.counts["allocations"]) == (7, taken + 8)


@pytest.mark.parametrize("release", RELEASES)
def test_memory_for_batches_is_not_taken_for_single_utterances(release: str, tmp_path: Path) -> None:
    paths = write_plans(tmp_path, release)
    with fake_tensorrt(release) as gpu, loaded(paths) as (encoder, decoder):
        alone = gpu.used
        decoder.run(tokens(encoder.run(frames(20, 2))["enc"], 4))
        known = release != "8.5"
        engines = [network._plan._engine for network in (encoder, decoder)]
        sizes = [max(engine._activation_size(index) for engine in engines) for index in range(3)]
        del engines
        assert sizes[2] > max(sizes[:2])
        assert len(encoder.device._activations) == (2 if known else 1), "8.5 tells one size for all profiles"
        assert encoder.device.activations(True).size == (max(sizes[:2]) if known else sizes[2])
        assert encoder.device.activations(False).size == sizes[2]
        assert gpu.used > alone


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=str)
@pytest.mark.parametrize("release", RELEASES)
def test_lengths_that_change_are_arranged_for_once(release: str, options: TensorRtOptions, tmp_path: Path) -> None:
    paths = write_plans(tmp_path, release)
    with fake_tensorrt(release) as gpu, loaded(paths, options) as (encoder, decoder):
        lengths = (9, 20, 33, 65, 100)

        def run() -> int:
            before = gpu.counts["first runs of shapes"]
            for count in lengths:
                decoder.run(tokens(encoder.run(frames(count))["enc"], 3))
            return int(gpu.counts["first runs of shapes"] - before)

        assert run() == 2 * len(lengths)
        # Before 10 a profile has one context, so that each change costs.
        assert run() == (2 * len(lengths) if release == "8.5" else 0)


@pytest.mark.parametrize("release", RELEASES)
def test_what_is_filled_up_is_finite_whatever_lay_there(release: str, tmp_path: Path, reference: Paraformer) -> None:
    paths = write_plans(tmp_path, release)
    with fake_tensorrt(release) as gpu, loaded(paths, ALL) as (encoder, decoder):
        for count in (20, 70, 9, 20):
            held = gpu.allocations[encoder._buffers[True].addresses["enc"]].data
            held.view(np.float32)[:] = np.nan
            inputs = frames(count)
            enc, wanted = encoder.run(inputs)["enc"], reference._encoder.run(inputs)["enc"]
            assert enc.whole[1] > count, "it lies there filled up"
            whole = gpu.view(enc.address, 4 * int(np.prod(enc.whole))).view(np.float32)
            assert np.isfinite(whole).all()
            decoded = decoder.run(tokens(enc, 5))
            known = reference._decoder.run({**tokens(enc, 5), "enc": wanted})
            np.testing.assert_array_equal(decoded["ids"], known["ids"])
            np.testing.assert_allclose(decoded["logp"], known["logp"], atol=2e-5)


@pytest.mark.parametrize("rounds", [20, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [PLAIN, ALL], ids=str)
def test_a_thousand_runs_take_nothing_more(rounds: int, options: TensorRtOptions, tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE) as gpu, loaded(paths, options) as (encoder, decoder):
        inputs = frames(9), frames(9, 2)

        def run() -> tuple[Any, ...]:
            for each in inputs:
                decoder.run(tokens(encoder.run(each)["enc"], 2))
            return gpu.counts["allocations"], sorted(gpu.live.items()), gpu.leaks(), gpu.used

        run()
        before = run()
        assert [run() for _ in range(rounds)] == [before] * rounds
        assert gpu.counts["executions"] == (rounds + 2) * 4 + 4, "and what it was warmed up with"


# CUDA graphs


def test_launches_are_recorded_once_for_each_bucket(tmp_path: Path) -> None:
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE) as gpu, loaded(paths, TensorRtOptions(cuda_graphs=True)) as (encoder, decoder):
        assert gpu.live["executable graphs"] == 4, "one for each profile, of each network"
        for count in (9, 16, 12, 65, 90):
            decoder.run(tokens(encoder.run(frames(count))["enc"], 3))
        assert gpu.live["executable graphs"] == 8, "for 16 and 96 frames"
        assert gpu.live["graphs"] == 0
        assert gpu.counts["graph launches"] == 6
        encoder.run(frames(9, 2))
        assert gpu.live["executable graphs"] == 8, "batches are launched"


def test_before_10_nothing_is_recorded_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_plans(tmp_path, "8.5")
    with fake_tensorrt("8.5") as gpu, loaded(paths, ALL) as (encoder, decoder):
        for count in (9, 20, 9, 20):
            decoder.run(tokens(encoder.run(frames(count))["enc"], 3))
        assert gpu.counts["graph launches"] == gpu.live["executable graphs"] == 0
        assert gpu.live["execution contexts"] == 4
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"{path}: no CUDA graphs, which need TensorRT 10 or newer" for path in paths
    ]


def test_the_context_that_was_needed_least_recently_goes_first_with_its_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_plan, "MOST_RUNNERS", 2)
    paths = write_plans(tmp_path)
    with fake_tensorrt(RELEASE) as gpu, loaded(paths, TensorRtOptions(cuda_graphs=True)) as (encoder, _):
        for count, launches in ((8, 0), (16, 0), (8, 1), (24, 1), (8, 2), (16, 2), (24, 2)):
            encoder.run(frames(count))
            assert (count, gpu.counts["graph launches"]) == (count, launches)
            assert gpu.live["executable graphs"] == gpu.live["execution contexts"] == 4


@pytest.mark.parametrize("release", RELEASES[1:])
def test_graphs_that_take_turns_answer_right(release: str, tmp_path: Path, reference: Paraformer) -> None:
    paths = write_plans(tmp_path, release)
    with fake_tensorrt(release) as gpu, loaded(paths, TensorRtOptions(cuda_graphs=True)) as (encoder, _):
        for seed, count in enumerate((9, 20, 9, 70, 20, 9)):
            inputs = frames(count, seed=seed)
            found, wanted = encoder.run(inputs), reference._encoder.run(inputs)
            np.testing.assert_allclose(found["alphas"], wanted["alphas"], atol=2e-5)
            np.testing.assert_allclose(found["enc"].numpy(), wanted["enc"], atol=2e-5)
        assert gpu.counts["graph launches"] == 3


def broken_capture(gpu: Any, stream: int, graph: Any) -> int:
    """Do what cudaStreamEndCapture does after a call that cannot be recorded."""
    gpu.stream(stream).capture = None
    return 901


@pytest.mark.parametrize("why", ["missing", "memory", "capture"])
def test_where_nothing_can_be_recorded_it_is_launched_as_ever(
    why: str, tmp_path: Path, expected: list[Recognition], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    paths = write_plans(tmp_path)
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


def test_a_second_of_silence_is_nothing(tmp_path: Path, reference: Paraformer) -> None:
    paths = write_plans(tmp_path)
    silence: Samples = np.zeros(SECOND, np.float32)
    with fake_tensorrt(RELEASE), recognizing(paths) as recognizer:
        assert recognizer.recognize(silence).text == reference.recognize(silence).text
