"""Engines with random weights answer any sound, or refuse it: nothing crashes, in fp32 or int8."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from random_engine import recognizer_of, weights_from
from random_weights import utterance

from edge_asr.engine.quantize import quantize
from edge_asr.engine.weights import PREDICTOR_OUTPUT, Weights
from edge_asr.errors import EngineError
from edge_asr.recognizer.bundle import FP32, INT8
from edge_asr.recognizer.network import Arrays
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.types import SAMPLE_RATE, Samples

ENGINES = (FP32, INT8)


@pytest.fixture(scope="module", params=ENGINES)
def weights(request: pytest.FixtureRequest) -> Weights:
    drawn = weights_from("tiny")
    return quantize(drawn) if request.param == INT8 else drawn


@pytest.fixture(scope="module")
def recognizer(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paraformer]:
    loaded = recognizer_of(weights, "tiny", tmp_path_factory.mktemp("tiny"))
    yield loaded
    loaded.close()


def sound(samples: int) -> Samples:
    """Return a stretch of an utterance of 30 s, repeated where it is too short."""
    return np.resize(utterance(1), samples)


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_what_is_too_short_for_a_frame_is_empty(recognizer: Paraformer, samples: int) -> None:
    decoded = recognizer.decode(sound(samples))
    assert (len(decoded.ids), len(decoded.log_probabilities), len(decoded.alphas)) == (0, 0, 0)
    assert recognizer.recognize(sound(samples)).tokens == ()


@pytest.mark.parametrize(
    ("samples", "rows"),
    [(400, 1), (401, 1), (1_359, 1), (1_360, 2), (SAMPLE_RATE, 17), (30 * SAMPLE_RATE, 500), (31 * SAMPLE_RATE, 517)],
)
def test_from_one_frame_to_31_seconds_are_answered(recognizer: Paraformer, samples: int, rows: int) -> None:
    decoded = recognizer.decode(sound(samples))
    assert len(decoded.alphas) == rows
    assert len(decoded.ids) == len(decoded.log_probabilities) == int(decoded.alphas.sum(dtype=np.float64) + 0.45)
    assert (decoded.log_probabilities <= 0).all()
    assert ((decoded.ids >= 0) & (decoded.ids < len(recognizer.bundle.tokens))).all()
    assert len(recognizer.recognize(sound(samples)).tokens) <= len(decoded.ids)


ODD = {
    "silence": np.zeros(2 * SAMPLE_RATE, np.float32),
    "a square wave at full scale": np.where(np.arange(2 * SAMPLE_RATE) // 40 % 2, 1, -1).astype(np.float32),
    "a constant": np.ones(SAMPLE_RATE, np.float32),
    "the smallest numbers": np.full(SAMPLE_RATE, np.finfo(np.float32).smallest_subnormal),
    "a click": np.eye(1, SAMPLE_RATE, 5_000, dtype=np.float32)[0],
    "a hundred times full scale": np.float32(100) * sound(SAMPLE_RATE),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_sounds_are_answered(recognizer: Paraformer, name: str) -> None:
    decoded = recognizer.decode(ODD[name])
    assert np.isfinite(decoded.alphas).all()
    assert np.isfinite(decoded.log_probabilities).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
@pytest.mark.parametrize("where", [slice(None), slice(8_000, 8_001)], ids=["everywhere", "once"])
def test_what_is_not_finite_is_refused_or_empty(recognizer: Paraformer, value: float, where: slice) -> None:
    samples = sound(SAMPLE_RATE).copy()
    samples[where] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the features
        try:
            found = recognizer.decode(samples)
        except EngineError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert np.isfinite(found.log_probabilities).all()
    again = recognizer.recognize(sound(SAMPLE_RATE))
    assert again.confidence is not None
    assert np.isfinite(again.confidence)


def test_without_a_token_the_decoder_is_not_asked(
    weights: Weights, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = {**weights.vectors, f"{PREDICTOR_OUTPUT}.bias": np.array([-30], np.float32)}
    silent = dataclasses.replace(weights, vectors=quiet)
    recognizer = recognizer_of(silent, "tiny", tmp_path_factory.mktemp("silent"))

    def refuse(inputs: Arrays) -> Arrays:
        raise AssertionError("the decoder was asked")

    monkeypatch.setattr(recognizer._decoder, "run", refuse)
    decoded = recognizer.decode(sound(2 * SAMPLE_RATE))
    assert (len(decoded.ids), len(decoded.alphas)) == (0, 33)
    recognition = recognizer.recognize(sound(2 * SAMPLE_RATE))
    assert (recognition.text, recognition.tokens, recognition.confidence) == ("", (), None)
    batch = [sound(0), sound(400), sound(SAMPLE_RATE)]
    assert [found.tokens for found in recognizer.recognize_batch(batch)] == [(), (), ()]
    recognizer.close()


def test_as_many_tokens_as_frames_are_answered(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> None:
    loud = {**weights.vectors, f"{PREDICTOR_OUTPUT}.bias": np.array([30], np.float32)}
    recognizer = recognizer_of(dataclasses.replace(weights, vectors=loud), "tiny", tmp_path_factory.mktemp("loud"))
    decoded = recognizer.decode(sound(30 * SAMPLE_RATE))
    assert len(decoded.ids) == len(decoded.alphas) == 500
    recognizer.close()


def test_batches_with_nothing_in_them_are_answered(recognizer: Paraformer) -> None:
    assert recognizer.recognize_batch([]) == []
    assert [found.tokens for found in recognizer.recognize_batch([sound(0), sound(399)])] == [(), ()]
    mixed = recognizer.recognize_batch([sound(0), sound(SAMPLE_RATE), sound(400)])
    assert mixed[0].tokens == ()
    assert mixed[1].tokens
