"""The detector that goes by the level of the room, over probabilities and sounds that are made up, and over speech."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from bundled import chunks_of, sound_of, transcripts

from edge_asr.speech.segmenter import Ended, Rules, Segmenter
from edge_asr.speech.vad import GOES_ON, HANGOVER, LEVELS, SileroDetector, SteadyDetector
from edge_asr.types import CHUNK_SAMPLES, SAMPLE_RATE, Chunk, Samples

ROOM_DB, SPEECH_DB, SOFT_DB = -60.0, -20.0, -45.0
GOING_ON = 0.425
"""Between the thresholds for starting (0.5) and for going on (0.35)."""


class Told:
    """A detector that says what it is told."""

    def __init__(self, probabilities: Sequence[float]) -> None:
        self._probabilities = iter(probabilities)
        self.resets = 0

    def __call__(self, chunk: Chunk) -> float:
        return next(self._probabilities)

    def reset(self) -> None:
        self.resets += 1


def steadied(heard: Sequence[tuple[float, float]], threshold: float = 0.5) -> list[float]:
    """Return what becomes of (level in dB, probability), after 1 s of the room and five chunks of speech."""
    everything = [*[(ROOM_DB, 0.0)] * 31, *[(SPEECH_DB, 1.0)] * 5, *heard]
    detector = SteadyDetector(Told([probability for _, probability in everything]), threshold)
    found = [
        detector(Chunk(np.full(CHUNK_SAMPLES, 10 ** (level / 20), np.float32), k * CHUNK_SAMPLES, 0.0))
        for k, (level, _) in enumerate(everything)
    ]
    return [round(probability, 3) for probability in found[36:]]


def test_speech_ends_two_chunks_after_its_sound_whatever_the_detector_still_hears() -> None:
    assert steadied([(ROOM_DB, 1.0), (ROOM_DB, 0.9), (ROOM_DB, 0.6), (ROOM_DB, 0.4)]) == [1.0, 0.9, 0.0, 0.0]
    assert HANGOVER == 2


def test_sound_above_the_room_is_what_the_detector_says() -> None:
    assert steadied([(SOFT_DB, 0.9), (SOFT_DB, 0.6), (SOFT_DB, 0.2), (SOFT_DB, 0.1)]) == [0.9, 0.6, 0.2, 0.1]


def test_a_soft_sound_that_rises_soon_after_speech_is_speech_that_goes_on() -> None:
    pause = [(ROOM_DB, 0.0)] * 10
    assert steadied([*pause, (SOFT_DB, 0.1), (SOFT_DB + 6, 0.2), (SPEECH_DB, 1.0)])[10:] == [GOING_ON, GOING_ON, 1.0]


def test_an_echo_which_is_as_loud_does_not_go_on() -> None:
    falls = [(SOFT_DB - k, 0.3 - k / 100) for k in range(5)]
    assert steadied(falls) == [0.3, 0.29, 0.28, 0.27, 0.26]
    assert steadied([(SOFT_DB, 0.1), (SOFT_DB - 1, 0.12), (SOFT_DB - 2, 0.14)]) == [0.1, 0.12, 0.14]


@pytest.mark.parametrize(("wait", "goes_on"), [(GOES_ON - 1, True), (GOES_ON + 5, False)])
def test_a_soft_sound_long_after_speech_is_none(wait: int, goes_on: bool) -> None:
    assert steadied([*[(ROOM_DB, 0.0)] * wait, (SOFT_DB, 0.2)])[-1] == (GOING_ON if goes_on else 0.2)


def test_noise_that_the_detector_takes_for_none_does_not_go_on() -> None:
    assert steadied([*[(ROOM_DB, 0.0)] * 3, (SOFT_DB, 0.05)])[-1] == 0.05


def test_what_goes_on_would_not_start_whatever_the_threshold() -> None:
    assert steadied([*[(ROOM_DB, 0.0)] * 3, (SOFT_DB, 0.1)], threshold=0.3)[-1] == 0.225


def test_speech_that_hardly_stands_out_of_the_noise_is_left_alone() -> None:
    loud_room = [*[(-40.0, 0.1)] * LEVELS, *[(SPEECH_DB, 1.0)] * 5, *[(-40.0, 1.0)] * 4]
    assert steadied(loud_room)[-4:] == [1.0] * 4


def test_a_room_that_has_become_quieter_is_known_at_once_and_a_louder_one_after_10_s() -> None:
    assert steadied([(-80.0, 1.0), *[(ROOM_DB, 1.0)] * 4])[1:] == [1.0] * 4
    fan = [(-50.0, 0.0)] * LEVELS
    assert steadied([*fan, *[(SPEECH_DB, 1.0)] * 3, *[(-50.0, 1.0)] * 3])[-3:] == [1.0, 1.0, 0.0]
    assert steadied([*fan[:100], *[(SPEECH_DB, 1.0)] * 3, *[(-50.0, 1.0)] * 3])[-3:] == [1.0, 1.0, 1.0]


def test_a_new_beginning_reaches_the_detector_and_forgets_the_speech_before() -> None:
    told = Told([0.0] * 31 + [1.0] * 5 + [0.2])
    detector = SteadyDetector(told)
    levels = [ROOM_DB] * 31 + [SPEECH_DB] * 5 + [SOFT_DB]
    chunks = [Chunk(np.full(CHUNK_SAMPLES, 10 ** (level / 20), np.float32), 0, 0.0) for level in levels]
    for chunk in chunks[:-1]:
        detector(chunk)
    detector.reset()
    assert (told.resets, detector(chunks[-1])) == (1, 0.2)


def noisy(name: str, below_db: float) -> Samples:
    sound = np.concatenate([np.zeros(SAMPLE_RATE, np.float32), sound_of(name), np.zeros(SAMPLE_RATE, np.float32)])
    level = np.sqrt(np.square(sound_of(name)).mean()) * 10 ** (-below_db / 20)
    return np.asarray(sound + level * np.random.default_rng(0).standard_normal(len(sound)), np.float32)


@pytest.mark.parametrize("name", transcripts())
@pytest.mark.parametrize("below_db", [40, 20])
def test_a_recording_is_one_segment_that_ends_no_later_than_by_the_detector_alone(name: str, below_db: float) -> None:
    ends = []
    for detector in (SileroDetector(), SteadyDetector(SileroDetector())):
        segmenter, found = Segmenter(Rules(endpoint=12)), []
        for number, chunk in enumerate(chunks_of(noisy(name, below_db))):
            found += [number for event in segmenter.step(detector(chunk)) if isinstance(event, Ended)]
        assert len(found) == 1
        ends.append(found[0])
    assert ends[0] - 5 <= ends[1] <= ends[0]
