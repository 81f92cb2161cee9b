"""Where sound ends, in made-up sounds."""

from __future__ import annotations

import numpy as np
import pytest
from bundled import sound_of, transcripts
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_asr.speech.energy import FRAME, end_of_sound
from edge_asr.types import SAMPLE_RATE, Samples


def noise(samples: int, decibels: float) -> Samples:
    """White noise of so many decibels below full scale."""
    rng = np.random.default_rng(samples)
    return (rng.standard_normal(samples) * 10 ** (decibels / 20)).astype(np.float32)


def tone(samples: int, decibels: float) -> Samples:
    time = np.arange(samples) / SAMPLE_RATE
    wave: Samples = (np.sqrt(2) * 10 ** (decibels / 20) * np.sin(2 * np.pi * 300 * time)).astype(np.float32)
    return wave


def sounds(*parts: Samples) -> Samples:
    return np.concatenate(parts)


@pytest.mark.parametrize("floor", [-90.0, -60.0, -40.0])
@pytest.mark.parametrize("frames", [50, 51, 77])
def test_sound_ends_with_the_last_10_ms_above_the_floor(floor: float, frames: int) -> None:
    heard = sounds(noise(3200, floor), tone(frames * FRAME, -20), noise(4800, floor))
    assert end_of_sound(heard) == 3200 + frames * FRAME


def test_sound_may_end_within_a_frame() -> None:
    heard = sounds(np.zeros(3200, np.float32), tone(1600 + 80, -20), np.zeros(4000, np.float32))
    assert end_of_sound(heard) == 3200 + 1600 + FRAME


def test_the_last_of_several_sounds_counts() -> None:
    heard = sounds(noise(3200, -70), tone(3200, -20), noise(3200, -70), tone(1600, -30), noise(3200, -70))
    assert end_of_sound(heard) == 3200 * 3 + 1600


def test_an_echo_35_db_below_the_loudest_does_not_count() -> None:
    quiet = np.zeros(3200, np.float32)
    assert end_of_sound(sounds(quiet, tone(3200, -10), tone(1600, -50), quiet)) == 6400
    assert end_of_sound(sounds(quiet, tone(3200, -10), tone(1600, -40), quiet)) == 8000


def test_what_is_less_than_5_db_above_the_floor_does_not_count() -> None:
    floor = tone(3200, -50)
    assert end_of_sound(sounds(floor, tone(3200, -30), tone(1600, -46), floor)) == 6400
    assert end_of_sound(sounds(floor, tone(3200, -30), tone(1600, -44), floor)) == 8000


def test_a_click_of_10_ms_does_not_count() -> None:
    quiet = noise(3200, -70)
    assert end_of_sound(sounds(quiet, tone(3200, -20), quiet, tone(FRAME, -20), quiet)) == 6400
    assert end_of_sound(sounds(quiet, tone(3200, -20), quiet, tone(2 * FRAME, -20), quiet)) == 9600 + 2 * FRAME


@pytest.mark.parametrize("name", transcripts())
@pytest.mark.parametrize("below_db", [40, 30])
def test_noise_moves_the_end_of_speech_by_20_ms_at_most(name: str, below_db: int) -> None:
    heard = sounds(np.zeros(4800, np.float32), sound_of(name), np.zeros(4800, np.float32))
    level = 20 * np.log10(np.sqrt(np.square(sound_of(name)).mean()))
    assert abs(end_of_sound(heard + noise(len(heard), level - below_db)) - end_of_sound(heard)) <= 2 * FRAME


@pytest.mark.parametrize(
    "steady",
    [np.zeros(8000, np.float32), np.full(8000, 0.1, np.float32), noise(8000, -30), np.zeros(100, np.float32)],
    ids=["digital silence", "constant", "noise", "under 10 ms"],
)
def test_sound_that_does_not_change_ends_at_its_end(steady: Samples) -> None:
    assert end_of_sound(steady) == len(steady)


def test_nothing_ends_at_once() -> None:
    assert end_of_sound(np.zeros(0, np.float32)) == 0


@pytest.mark.parametrize("name", transcripts())
@pytest.mark.parametrize("silence", [1, 3, 10])
def test_silence_after_a_recording_does_not_move_the_end_of_its_speech(name: str, silence: int) -> None:
    heard = sound_of(name)
    heard = heard[: len(heard) // FRAME * FRAME]
    end = end_of_sound(heard)
    assert end_of_sound(sounds(heard, np.zeros(silence * FRAME, np.float32))) == end
    assert 0.3 * len(heard) < end <= len(heard)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2000), st.floats(-100, 0)), max_size=6))
def test_the_end_is_the_end_of_a_frame_or_of_the_sound(parts: list[tuple[int, float]]) -> None:
    heard = sounds(np.zeros(0, np.float32), *(noise(samples, decibels) for samples, decibels in parts))
    end = end_of_sound(heard)
    assert end == len(heard) or (end % FRAME == 0 and 0 < end < len(heard))
