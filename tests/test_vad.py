"""Silero's detector: against the same network fed in one go, on the bundled recordings and on people."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnxruntime
import pytest
from bundled import SHARED_DATA, chunks_of, sound_of, transcripts

from edge_asr.audio.decode import read
from edge_asr.speech.vad import MODEL, SileroDetector
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Chunk, Samples


def probabilities(samples: Samples) -> list[float]:
    detector = SileroDetector()
    return [detector(chunk) for chunk in chunks_of(samples)]


def reference(samples: Samples) -> list[float]:
    """Follow the network by hand: each chunk with the 64 samples before it, the state handed on."""
    session = onnxruntime.InferenceSession(str(MODEL), providers=["CPUExecutionProvider"])
    padded = np.concatenate([np.zeros(64, np.float32), samples, np.zeros(-len(samples) % CHUNK_SAMPLES, np.float32)])
    state = np.zeros((2, 1, 128), np.float32)
    found = []
    for start in range(0, len(padded) - 64, CHUNK_SAMPLES):
        window = padded[None, start : start + 64 + CHUNK_SAMPLES]
        given = {"input": window, "state": state, "sr": np.array(SAMPLE_RATE, np.int64)}
        probability, state = session.run(None, given)
        found.append(float(probability[0, 0]))
    return found


def noise(seconds: float, level: float) -> Samples:
    return (np.random.default_rng(0).standard_normal(round(seconds * SAMPLE_RATE)) * level).astype(np.float32)


@pytest.mark.parametrize("name", transcripts())
def test_the_speech_of_a_bundled_recording_is_near_one(name: str) -> None:
    found = probabilities(sound_of(name))
    assert max(found) > 0.95
    assert np.mean(np.array(found) > 0.5) > 0.4


@pytest.mark.parametrize("level", [0, 1e-4, 1e-2], ids=["digital silence", "very soft noise", "noise"])
def test_silence_is_near_zero(level: float) -> None:
    assert max(probabilities(noise(5, level))) < 0.3


def test_what_follows_speech_is_silence_again() -> None:
    found = probabilities(np.concatenate([sound_of("01.wav"), np.zeros(SAMPLE_RATE, np.float32)]))
    assert max(found[-20:]) < 0.1


@pytest.mark.parametrize("name", ["01.wav", "07.wav"])
def test_chunks_one_by_one_give_what_the_network_gives_by_hand(name: str) -> None:
    samples = sound_of(name)
    np.testing.assert_allclose(probabilities(samples), reference(samples), atol=1e-6)


def test_the_state_of_the_stream_is_carried_on() -> None:
    chunks = list(chunks_of(sound_of("01.wav")))
    spoken = len(chunks) // 2
    following, fresh = SileroDetector(), SileroDetector()
    for chunk in chunks[:spoken]:
        following(chunk)
    assert abs(following(chunks[spoken]) - fresh(chunks[spoken])) > 1e-3


def test_after_a_reset_a_stream_is_heard_as_a_new_one() -> None:
    chunks = list(chunks_of(sound_of("01.wav")))
    detector = SileroDetector()
    for chunk in chunks[: len(chunks) // 2]:
        detector(chunk)
    detector.reset()
    assert [detector(chunk) for chunk in chunks] == probabilities(sound_of("01.wav"))


def test_detectors_do_not_disturb_each_other() -> None:
    first, second = SileroDetector(), SileroDetector()
    speech, silence = sound_of("02.wav"), noise(10, 1e-3)
    both = [(first(a), second(b)) for a, b in zip(chunks_of(speech), chunks_of(silence), strict=False)]
    assert [a for a, _ in both] == probabilities(speech)
    assert [b for _, b in both] == probabilities(silence)[: len(both)]


def test_a_chunk_is_left_as_it_was() -> None:
    samples = sound_of("01.wav")[:CHUNK_SAMPLES].copy()
    before = samples.copy()
    detector = SileroDetector()
    detector(Chunk(samples, 0, 0.0))
    detector(Chunk(samples, CHUNK_SAMPLES, 0.0))
    np.testing.assert_array_equal(samples, before)


def share_of_speech(recordings: Iterable[Samples]) -> list[float]:
    return [float(np.mean(np.array(probabilities(samples)) > 0.5)) for samples in recordings]


def test_people_are_heard() -> None:
    folder = SHARED_DATA / "speech" / "aishell_sample_zh" / "commands"
    if not folder.is_dir():
        pytest.skip(f"recordings of people are absent: {folder}")
    paths = sorted(folder.glob("*.wav"))[::6]
    assert min(share_of_speech(read(path) for path in paths)) > 0.2
