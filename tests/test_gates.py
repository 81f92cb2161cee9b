"""What is published and what is not, from samples to sinks: the real detector, the real model, a list as sink."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import numpy as np
import numpy.typing as npt
import pytest
from bundled import bundle_of, chunks_of, load, sound_of, transcripts
from prometheus_client import REGISTRY

from edge_asr.answers import Gates, Labels
from edge_asr.app import choose_gates
from edge_asr.budget import LatencyBudget
from edge_asr.config import GatesConfig
from edge_asr.pipeline import Listener, Pace
from edge_asr.recognizer.scheduler import Scheduler
from edge_asr.speech.segmenter import Rules, Segmenter
from edge_asr.speech.vad import SileroDetector, SteadyDetector
from edge_asr.types import (
    SAMPLE_RATE,
    Chunk,
    Marks,
    Partial,
    Recognition,
    Samples,
    Segment,
    SegmentId,
    Token,
    Transcript,
)

Sound = npt.NDArray[np.float64]

BUNDLE = bundle_of("onnx-fp32")
GATES = choose_gates(GatesConfig(), BUNDLE)
"""What the appliance goes by: the thresholds of the bundle's card."""
OFF = Gates()
SECONDS = 20


class Played:
    """A source that plays samples as fast as they are taken."""

    name = "played"

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    async def chunks(self) -> AsyncIterator[Chunk]:
        for chunk in chunks_of(self._samples):
            yield chunk

    def close(self) -> None:
        self._samples = self._samples[:0]


class Collector:
    """A sink that keeps what it is offered."""

    def __init__(self) -> None:
        self.transcripts: list[Transcript] = []

    def offer(self, transcript: Transcript) -> None:
        self.transcripts.append(transcript)

    def offer_partial(self, partial: Partial) -> None:
        pass


async def published(samples: Samples, gates: Gates, live: bool = False) -> list[Transcript]:
    """Return what a listener offers of a sound."""
    sink = Collector()
    scheduler = Scheduler(lambda: load("onnx-fp32"))
    await scheduler.start()
    labels = Labels("test", "played", BUNDLE.name)
    source, segmenter = Played(samples), Segmenter(Rules())
    await Listener(
        source,
        SteadyDetector(SileroDetector()),
        segmenter,
        scheduler,
        [sink],
        labels,
        gates,
        Pace(live),
        LatencyBudget(300),
    ).run()
    await scheduler.close()
    return sink.transcripts


def full_scale(sound: Sound) -> Samples:
    return np.clip(sound, -1, 1).astype(np.float32)


def white(seconds: float, decibels: float) -> Sound:
    return np.random.default_rng(0).standard_normal(round(seconds * SAMPLE_RATE)) * 10 ** (decibels / 20)


def pink(seconds: float, decibels: float) -> Sound:
    """Noise whose power falls with 1 / f."""
    size = round(seconds * SAMPLE_RATE)
    spectrum = np.fft.rfft(np.random.default_rng(1).standard_normal(size))
    sound = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 20)), size)
    scaled: Sound = sound / np.std(sound) * 10 ** (decibels / 20)
    return scaled


def tone(hertz: float, level: float) -> Sound:
    return level * np.sin(2 * np.pi * hertz * np.arange(SECONDS * SAMPLE_RATE) / SAMPLE_RATE)


def slams(decay_s: float, cutoff: float, level: float) -> Sound:
    """Eight door slams: bursts of noise without what is above `cutoff` Hz, decaying exponentially."""
    every = SECONDS * SAMPLE_RATE // 8
    sound = white(SECONDS, -80)
    frequencies = np.fft.rfftfreq(SAMPLE_RATE, 1 / SAMPLE_RATE)
    decay = np.exp(-np.arange(SAMPLE_RATE) / SAMPLE_RATE / decay_s)
    for number in range(8):
        noise = np.random.default_rng(number).standard_normal(SAMPLE_RATE)
        burst = np.fft.irfft(np.fft.rfft(noise) / (1 + (frequencies / cutoff) ** 2), SAMPLE_RATE)
        start = number * every + SAMPLE_RATE // 2
        sound[start : start + SAMPLE_RATE] += burst / np.abs(burst).max() * decay * level
    return sound


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: np.zeros(SECONDS * SAMPLE_RATE), id="digital silence"),
        *(
            pytest.param(lambda noise=noise, level=level: noise(SECONDS, level), id=f"{noise.__name__} {level} dB")
            for noise in (white, pink)
            for level in (-60, -40, -25, -10)
        ),
        pytest.param(lambda: tone(440, 0.3), id="440 Hz"),
        pytest.param(lambda: tone(440, 0.99), id="440 Hz, loud"),
        *(
            pytest.param(
                lambda decay=decay, cutoff=cutoff, level=level: slams(decay, cutoff, level),
                id=f"slams of {decay} s below {cutoff} Hz at {level}",
            )
            for decay in (0.03, 0.08, 0.2)
            for cutoff in (150, 1000, 4000)
            for level in (0.1, 0.5, 1.0)
        ),
    ],
)
async def test_nothing_is_published_where_nobody_speaks(make: Callable[[], Sound]) -> None:
    assert [transcript.text for transcript in await published(full_scale(make()), GATES)] == []


@pytest.mark.parametrize("live", [False, True], ids=["as fast as it goes", "live"])
async def test_every_bundled_recording_is_published(live: bool) -> None:
    silence = np.zeros(SAMPLE_RATE, np.float32)
    texts = transcripts()
    sound = np.concatenate([part for name in texts for part in (sound_of(name), silence)])
    found = await published(sound, GATES, live)
    assert [transcript.text for transcript in found] == list(texts.values())
    assert [transcript.decoded_at_pause for transcript in found] == [live] * len(texts)
    assert [transcript.started_at is not None for transcript in found] == [live] * len(texts)
    offsets = [transcript.offset_s for transcript in found]
    assert offsets == sorted(offsets, key=lambda offset: offset or 0)


async def test_speech_is_published_among_noise_and_slams() -> None:
    slam = slams(0.08, 1000, 0.5)[: 2 * SAMPLE_RATE]
    speech = sound_of("01.wav")
    sound = np.concatenate([full_scale(pink(3, -55)), full_scale(slam), speech, full_scale(slam)])
    found = await published(sound, GATES)
    assert [transcript.text for transcript in found] == [transcripts()["01.wav"]]


# Each gate by itself


def segment(seconds: float = 2.0, speech_ratio: float = 0.5) -> Segment:
    samples = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    return Segment(SegmentId("id"), 0, samples, 0, speech_ratio, None, Marks(0.0, 0.0))


def recognition(tokens: int = 3, confidence: float | None = 0.5) -> Recognition:
    return Recognition("好" * tokens, tuple(Token("好", None, None, 0.5) for _ in range(tokens)), confidence)


@pytest.mark.parametrize("gates", [OFF, Gates(0.1, 0.1, 20)], ids=["off", "on"])
def test_empty_text_is_never_published(gates: Gates) -> None:
    assert gates.refuse(segment(), recognition(0, None)) == "empty"


@pytest.mark.parametrize(
    ("gates", "confidence", "refused"),
    [
        (0.4, 0.39, True),
        (0.4, 0.4, False),
        (0.4, 1.0, False),
        (0.4, None, True),
        (0.0, 0.001, False),
        (0.0, None, False),
    ],
)
def test_a_transcript_below_the_confidence_is_dropped(gates: float, confidence: float | None, refused: bool) -> None:
    gate = Gates(min_confidence=gates).refuse(segment(), recognition(confidence=confidence))
    assert gate == ("confidence" if refused else None)


@pytest.mark.parametrize(
    ("gates", "ratio", "refused"), [(0.3, 0.29, True), (0.3, 0.3, False), (0.3, 1.0, False), (0.0, 0.001, False)]
)
def test_a_segment_with_too_little_speech_is_dropped(gates: float, ratio: float, refused: bool) -> None:
    gate = Gates(min_speech_ratio=gates).refuse(segment(speech_ratio=ratio), recognition())
    assert gate == ("speech_ratio" if refused else None)


@pytest.mark.parametrize(
    ("gates", "tokens", "refused"), [(8, 8, False), (8, 9, True), (8, 100, True), (0, 1000, False)]
)
def test_more_tokens_than_can_be_spoken_are_dropped(gates: float, tokens: int, refused: bool) -> None:
    """Of the 2 s, one is speech."""
    assert Gates(max_tokens_per_s=gates).refuse(segment(2.0, 0.5), recognition(tokens)) == ("rate" if refused else None)


def test_hardly_any_speech_counts_as_a_tenth_of_a_second() -> None:
    gates = Gates(max_tokens_per_s=10)
    assert gates.refuse(segment(1.0, 0.01), recognition(1)) is None
    assert gates.refuse(segment(1.0, 0.01), recognition(2)) == "rate"


def test_gates_that_are_off_let_everything_through() -> None:
    assert OFF.refuse(segment(0.3, 0.0), recognition(100, 1e-6)) is None


@pytest.mark.parametrize(
    ("gates", "name"),
    [
        (Gates(min_confidence=0.9999), "confidence"),
        (Gates(min_speech_ratio=0.99), "speech_ratio"),
        (Gates(max_tokens_per_s=0.5), "rate"),
    ],
    ids=["confidence", "speech ratio", "rate"],
)
async def test_a_gate_keeps_a_real_recording_back_and_is_counted(gates: Gates, name: str) -> None:
    before = dropped(name)
    assert await published(sound_of("01.wav"), gates) == []
    assert dropped(name) == before + 1


@pytest.mark.parametrize(("least", "count"), [(0.75, 1), (0.9999, 0)])
async def test_a_short_text_must_stay_what_it_is(least: float, count: int) -> None:
    before = dropped("steadiness")
    assert len(await published(sound_of("03.wav"), Gates(min_steadiness=least))) == count
    assert dropped("steadiness") == before + 1 - count
    assert len(await published(sound_of("01.wav"), Gates(min_steadiness=least))) == 1, "it is long"


def dropped(gate: str) -> float:
    """Return how many segments a gate has dropped so far."""
    return REGISTRY.get_sample_value("edge_asr_gated_total", {"gate": gate}) or 0.0
