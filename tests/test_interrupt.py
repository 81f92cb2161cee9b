"""Interrupting onnxruntime: a run ends early, the next is as good as ever, and nobody else is hit."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from bundled import load_whole, sound_of
from mosquitto import PATIENCE_S
from random_engine import recognizer_of, weights_from

from edge_asr.errors import EngineError, InterruptedRunError
from edge_asr.ladder import Ladder, Rung
from edge_asr.recognizer.bundle import INT8
from edge_asr.recognizer.network import Arrays, Interruptible, Network, interruptible
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.requests import PATIENCE, Priority, Request
from edge_asr.recognizer.scheduler import Scheduler
from edge_asr.types import SAMPLE_RATE, Recognition, Samples

LONG_S = 60
"""Long enough to be interrupted while it is computed."""


def noise(length: float, seed: int = 0) -> Samples:
    samples = np.random.default_rng(seed).standard_normal(round(length * SAMPLE_RATE)) * 0.1
    return samples.astype(np.float32)


@pytest.fixture
def recognizer(tmp_path: Path) -> Paraformer:
    return recognizer_of(weights_from("tiny"), "tiny", tmp_path)


class Watched:
    """A network that tells when it begins to compute."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.metadata = network.metadata
        self.begun = threading.Event()
        [self._interruptible] = interruptible(network)

    def run(self, inputs: Arrays) -> Arrays:
        self.begun.set()
        return self._network.run(inputs)

    def interrupt(self) -> None:
        self._interruptible.interrupt()

    def resume(self) -> None:
        self._interruptible.resume()

    def close(self) -> None:
        self._network.close()


def interrupted(recognizer: Paraformer, samples: Samples) -> BaseException | None:
    """Return what a recognition raises that is interrupted as soon as the encoder has begun."""
    watched = recognizer._encoder
    assert isinstance(watched, Watched)
    watched.begun.clear()
    raised: list[BaseException] = []

    def recognize() -> None:
        try:
            recognizer.recognize(samples)
        except InterruptedRunError as error:
            raised.append(error)

    thread = threading.Thread(target=recognize, name="recognising")
    thread.start()
    assert watched.begun.wait(PATIENCE_S)
    recognizer.interrupt()
    thread.join(PATIENCE_S)
    recognizer.resume()
    return raised[0] if raised else None


def same(found: Recognition, expected: Recognition) -> bool:
    return (found.text, found.tokens, found.confidence) == (expected.text, expected.tokens, expected.confidence)


def test_a_run_of_onnxruntime_is_interrupted_and_the_next_is_as_good_as_ever(recognizer: Paraformer) -> None:
    recognizer._encoder = Watched(recognizer._encoder)
    short, long = noise(1), noise(LONG_S)
    expected = recognizer.recognize(short)
    assert expected.text
    for _ in range(5):
        error = interrupted(recognizer, long)
        assert isinstance(error, InterruptedRunError)
        assert not isinstance(error, EngineError), "nothing is wrong with the engine"
        assert same(recognizer.recognize(short), expected)


def test_an_interrupted_recogniser_begins_nothing_until_it_is_resumed(recognizer: Paraformer) -> None:
    expected = recognizer.recognize(noise(1))
    recognizer.interrupt()
    for _ in range(2):
        with pytest.raises(InterruptedRunError):
            recognizer.recognize(noise(1))
    recognizer.resume()
    assert same(recognizer.recognize(noise(1)), expected)


def test_between_encoder_and_decoder_it_is_interrupted_as_well(
    recognizer: Paraformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def check_finite(values: object) -> None:
        calls.append(values)
        recognizer.interrupt()

    monkeypatch.setattr(recognizer, "_check_finite", check_finite)
    with pytest.raises(InterruptedRunError):
        recognizer.recognize(noise(1))
    assert len(calls) == 1


def test_a_graph_that_runs_whole_is_interrupted_as_well() -> None:
    whole = load_whole(INT8)
    expected = whole.recognize(sound_of("01.wav"))
    whole.interrupt()
    with pytest.raises(InterruptedRunError):
        whole.recognize(sound_of("01.wav"))
    whole.resume()
    assert same(whole.recognize(sound_of("01.wav")), expected)
    whole.close()


def test_a_ladder_passes_an_interruption_on_and_does_not_step_down(
    recognizer: Paraformer, caplog: pytest.LogCaptureFixture
) -> None:
    def other() -> Paraformer:
        raise AssertionError("nobody asks a lesser engine")

    ladder = Ladder([Rung("onnx-cuda", lambda: recognizer), Rung("onnx-int8", other)])
    assert isinstance(ladder, Interruptible)
    ladder.interrupt()
    with pytest.raises(InterruptedRunError):
        ladder.recognize(noise(1))
    with pytest.raises(InterruptedRunError):
        ladder.recognize_batch([noise(1), noise(1)])
    ladder.resume()
    assert ladder.recognize(noise(1)).text
    assert (ladder.why, [record for record in caplog.records if record.levelno >= logging.WARNING]) == ("", [])


def test_a_sound_that_was_cut_is_what_its_pieces_are(recognizer: Paraformer) -> None:
    request = Request(noise(40, seed=3), Priority.NETWORK)
    for _ in range(3 * PATIENCE):
        request.interrupted()
    pieces = list(request.pieces)
    assert len(pieces) == 4, "the first half of the first half was cut again"
    assert np.array_equal(np.concatenate([piece.samples for piece in pieces]), request.samples)
    alone = [recognizer.recognize(piece.samples) for piece in pieces]
    taken = [request.take(recognition, 1.0) for recognition in alone]
    whole = taken.pop()
    assert taken == [None] * 3
    assert whole is not None
    assert [token.text for token in whole.tokens] == [token.text for one in alone for token in one.tokens]
    assert whole.text == " ".join(one.text for one in alone if one.text)
    starts = [token.start_ms for token in whole.tokens if token.start_ms is not None]
    assert len(starts) == len(whole.tokens) > 10
    assert starts == sorted(starts)
    assert starts[-1] > 30_000, "they count from the start of the whole"
    assert whole.confidence is not None
    logarithms = [np.log(token.confidence) for token in whole.tokens]
    assert np.log(whole.confidence) == pytest.approx(np.mean(logarithms), rel=1e-4)


async def test_no_interruption_ever_hits_another_request(recognizer: Paraformer) -> None:
    scheduler = Scheduler(lambda: recognizer)
    short, long = noise(0.5, seed=1), noise(12, seed=2)
    expected_short, expected_long = recognizer.recognize(short), recognizer.recognize(long)
    await scheduler.start()
    enough = threading.Event()
    wrong: list[object] = []
    jobs: list[Recognition] = []

    def ask_for_much() -> None:
        while not enough.is_set():
            jobs.append(scheduler.submit(long, Priority.NETWORK).result(PATIENCE_S))

    def check(answer: Future[Recognition], expected: Recognition) -> None:
        try:
            if not same(answer.result(PATIENCE_S), expected):
                wrong.append(answer.result())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test tells
            wrong.append(error)

    threads = [threading.Thread(target=ask_for_much, name=f"asking {number}") for number in range(2)]
    for thread in threads:
        thread.start()
    for number in range(10_000):
        answer = scheduler.submit(short, Priority.MICROPHONE, time.monotonic())
        if number % 3 == 0:
            partial = scheduler.submit(long, Priority.PARTIAL)
            partial.add_done_callback(lambda done: None if done.cancelled() else check(done, expected_long))
        check(answer, expected_short)
        if number >= 300 and any("cut" in job.enforced for job in jobs):
            break
    enough.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    await scheduler.close(PATIENCE_S)
    assert wrong == []
    assert all(same(job, expected_long) for job in jobs if "cut" not in job.enforced)
    assert any("cut" in job.enforced for job in jobs)
