"""The place in time of what a microphone gives: drift, gaps, levels and resampling, all simulated."""

from __future__ import annotations

import logging
import time

import numpy as np
import numpy.typing as npt
import pytest

from edge_asr.audio.drift import SampleClock
from edge_asr.audio.levels import Levels
from edge_asr.audio.messages import Sound
from edge_asr.audio.resample import ToMono16k
from edge_asr.audio.timeline import Timeline
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, SAMPLE_RATE, Chunk

log = logging.getLogger(__name__)

DAY_S = 24 * 3600
BLOCK = 512


def sine(rate: int, seconds: float, hertz: float = 440.0) -> npt.NDArray[np.int16]:
    return np.round(12_000 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.int16)


# The clock


@pytest.mark.parametrize("ppm", [100.0, -100.0])
def test_over_a_day_a_device_that_runs_wrong_keeps_its_times(ppm: float) -> None:
    random = np.random.default_rng(5)
    clock, rate = SampleClock(16_000), 16_000 / (1 + ppm * 1e-6)
    worst = 0.0
    for second in range(DAY_S):
        frame = 16_000 * second
        truth = 1000 + frame / rate
        late = random.exponential(0.004) + (random.random() < 0.05) * random.uniform(0, 1)
        clock.observe(frame, truth + late)
        worst = max(worst, abs(clock.time_of(frame) - truth)) if second > 10 else 0.0
    assert worst <= 0.020
    assert clock.ppm == pytest.approx(ppm, abs=5)


@pytest.mark.slow
@pytest.mark.parametrize(("ppm", "seed"), [(100.0, 1), (-100.0, 2)])
def test_over_a_day_of_blocks_the_end_of_every_chunk_is_known_to_20_ms(ppm: float, seed: int) -> None:
    random, timeline, began_at = np.random.default_rng(seed), opened(), 1000.0
    true_s = BLOCK / SAMPLE_RATE * (1 + ppm * 1e-6)
    blocks = round(DAY_S / true_s)
    late = random.exponential(0.004, blocks) + (random.random(blocks) < 0.01) * random.uniform(0, 0.5, blocks)
    silence, worst, number = np.zeros(BLOCK, np.int16), 0.0, 0
    for number in range(blocks):
        (chunk,) = push(timeline, silence, began_at + number * true_s + late[number])
        assert chunk.index == number * CHUNK_SAMPLES
        worst = max(worst, abs(chunk.captured_at + CHUNK_S - (began_at + (number + 1) * true_s)))
    log.warning("%+.0f ppm for %.1f h: times wrong by up to %.1f ms", ppm, blocks * true_s / 3600, worst * 1e3)
    assert worst <= 0.020
    assert (timeline.gaps, timeline.overruns) == (0, 0)
    assert timeline.drift_ppm == pytest.approx(ppm, abs=5)


def test_a_device_that_warms_up_is_followed() -> None:
    clock, truth = SampleClock(48_000), 50.0
    for second in range(2 * 3600):
        clock.observe(48_000 * second, truth)
        assert abs(clock.time_of(48_000 * second) - truth) <= 0.020
        truth += 1 + 1e-6 * (50 * np.tanh(second / 1800))


def test_drift_is_told_after_minutes_and_remembered_over_a_replug() -> None:
    clock = SampleClock(16_000)
    for second in range(60):
        clock.observe(16_000 * second, second * 1.00008)
    assert clock.ppm is None
    for second in range(60, 300):
        clock.observe(16_000 * second, second * 1.00008)
    assert clock.ppm == pytest.approx(80, abs=1)
    again = SampleClock(16_000, clock.ppm)
    again.observe(0, 500.0)
    assert again.time_of(16_000 * 60) == pytest.approx(560.0 + 60 * 80e-6, abs=1e-4)


def test_sound_that_was_lost_unnoticed_moves_the_clock_within_a_bucket_or_two() -> None:
    clock = SampleClock(16_000)
    for second in range(400):
        clock.observe(16_000 * second, second + (0.3 if second >= 200 else 0.0))
    assert clock.time_of(16_000 * 399) == pytest.approx(399.3, abs=0.001)
    assert clock.ppm == pytest.approx(0, abs=1)


def test_a_step_of_the_wall_clock_is_not_even_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def times() -> list[float]:
        timeline = opened()
        return [
            chunk.captured_at for second in range(60) for chunk in push(timeline, np.ones(BLOCK, np.int16), second / 31)
        ]

    before = times()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 5 * 3600)
    assert times() == before


# The timeline


def opened(rate: int = SAMPLE_RATE, channels: int = 1, channel: int | None = None) -> Timeline:
    timeline = Timeline(channel)
    timeline.begin(rate, channels)
    return timeline


def push(
    timeline: Timeline, frames: npt.NDArray[np.int16], at: float, overflowed: bool = False, dropped: int = 0
) -> list[Chunk]:
    return list(timeline.push(Sound(frames.tobytes(), at, overflowed, dropped)))


def test_blocks_of_a_chunk_pass_unchanged_with_their_times() -> None:
    timeline, random = opened(), np.random.default_rng(1)
    for number in range(50):
        block = random.integers(-32768, 32768, BLOCK).astype(np.int16)
        (chunk,) = push(timeline, block, 7.0 + number * CHUNK_S)
        np.testing.assert_array_equal(chunk.samples, block / 32768)
        assert (chunk.index, chunk.lost) == (number * CHUNK_SAMPLES, False)
        assert chunk.captured_at == pytest.approx(7.0 + number * CHUNK_S, abs=1e-9)
    assert (timeline.gaps, timeline.lost_s, timeline.overruns) == (0, 0.0, 0)


def test_a_device_that_was_away_leaves_a_gap_as_long_as_it_was_away() -> None:
    timeline = opened()
    for number in range(10):
        push(timeline, np.ones(BLOCK, np.int16), number * CHUNK_S)
    (lost,) = timeline.interrupt()
    assert lost.lost
    assert lost.index == 10 * 512
    assert lost.captured_at == pytest.approx(10 * CHUNK_S)
    assert not lost.samples.any()
    assert list(timeline.interrupt()) == []
    timeline.begin(SAMPLE_RATE, 1)
    (chunk,) = push(timeline, np.ones(BLOCK, np.int16), 100.0)
    assert chunk.captured_at == 100.0
    assert chunk.index / SAMPLE_RATE == pytest.approx(100.0, abs=1e-3)
    assert timeline.gaps == 1
    assert timeline.lost_s == pytest.approx(100 - 10 * CHUNK_S, abs=1e-3)


def test_a_mute_is_a_gap_in_time_but_no_loss() -> None:
    timeline = opened()
    push(timeline, np.ones(BLOCK, np.int16), 0.0)
    assert [chunk.lost for chunk in timeline.interrupt(counted=False)] == [True]
    timeline.begin(SAMPLE_RATE, 1)
    (chunk,) = push(timeline, np.ones(BLOCK, np.int16), 10.0)
    assert chunk.index == 160_000
    assert (timeline.gaps, timeline.lost_s) == (0, 0.0)


def test_before_its_first_sound_nothing_can_be_lost() -> None:
    timeline = opened()
    assert list(timeline.interrupt()) == []
    (chunk,) = push(timeline, np.ones(BLOCK, np.int16), 30.0)
    assert (chunk.index, timeline.gaps) == (0, 0)


def test_an_overrun_is_as_long_as_the_time_says() -> None:
    timeline = opened()
    for number in range(10):
        push(timeline, np.ones(BLOCK, np.int16), number * CHUNK_S)
    lost, chunk = push(timeline, np.ones(BLOCK, np.int16), 10 * CHUNK_S + 0.2, overflowed=True)
    assert (lost.lost, chunk.lost) == (True, False)
    assert chunk.index == 10 * 512 + 3200
    assert (timeline.overruns, timeline.gaps) == (1, 1)
    assert timeline.lost_s == pytest.approx(0.2, abs=1e-3)
    (following,) = push(timeline, np.ones(BLOCK, np.int16), 11 * CHUNK_S + 0.2)
    assert following.index == chunk.index + CHUNK_SAMPLES


def test_blocks_that_the_ring_dropped_are_a_gap_of_as_many() -> None:
    timeline = opened()
    push(timeline, np.ones(BLOCK, np.int16), 0.0)
    lost, chunk = push(timeline, np.ones(BLOCK, np.int16), 6 * CHUNK_S, dropped=5)
    assert lost.lost
    assert chunk.index == 6 * 512
    assert chunk.captured_at == pytest.approx(6 * CHUNK_S)


def test_an_overflow_that_lost_nothing_is_no_gap() -> None:
    timeline = opened()
    push(timeline, np.ones(BLOCK, np.int16), 0.0, overflowed=True)
    (chunk,) = push(timeline, np.ones(BLOCK, np.int16), CHUNK_S, overflowed=True)
    assert (chunk.index, timeline.gaps, timeline.overruns) == (512, 0, 0)


# Rates and channels


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000, 96_000])
def test_any_rate_becomes_ours_without_a_seam(rate: int) -> None:
    timeline, frames = opened(rate), sine(rate, 3.0)
    step = round(rate * 0.032)
    chunks = [
        chunk
        for start in range(0, len(frames), step)
        for chunk in push(timeline, frames[start : start + step], start / rate)
    ]
    got = np.concatenate([chunk.samples for chunk in chunks])
    assert 3.0 - len(got) / SAMPLE_RATE <= CHUNK_S + 0.032  # what is kept back: little, for it is latency
    middle, at = got[800:-800], 2 * np.pi * 440 * np.arange(len(got) - 1600) / SAMPLE_RATE
    waves = np.stack([np.sin(at), np.cos(at)], axis=1)
    fitted, *_ = np.linalg.lstsq(waves, middle, rcond=None)
    assert np.hypot(*fitted) == pytest.approx(12_000 / 32768, rel=1e-3)
    assert np.abs(middle - waves @ fitted).max() <= 1e-3
    for chunk in chunks:
        assert chunk.captured_at == pytest.approx(chunk.index / SAMPLE_RATE, abs=1e-3)


def test_a_channel_is_taken_alone_and_without_a_choice_all_are_averaged() -> None:
    frames = np.tile(np.array([[0, 8192, 16384]], np.int16), (BLOCK, 1))
    assert set(ToMono16k(16_000, 1).push(frames).tolist()) == {0.25}
    assert set(ToMono16k(16_000, None).push(frames).tolist()) == {0.25}
    assert set(ToMono16k(16_000, 2).push(frames).tolist()) == {0.5}


def test_silence_after_sound_becomes_zeros_again() -> None:
    convert = ToMono16k(44_100, None)
    convert.push(sine(44_100, 0.1)[:, np.newaxis])
    for _ in range(10):
        silent = convert.push(np.zeros((1411, 1), np.int16))
    assert len(silent)
    assert not silent.any()


# Levels


def test_clipping_is_a_share_of_the_samples() -> None:
    levels = Levels(16_000)
    loud = np.clip(3 * sine(16_000, 1.0).astype(np.int32), -32768, 32767).astype(np.int16)[:, np.newaxis]
    for _ in range(10):
        levels.add(loud)
    assert levels.clipped_share == pytest.approx(np.mean(np.abs(loud.astype(int)) >= 32767), abs=0.01)
    assert "clipping: " in levels.complaint
    for _ in range(10):
        levels.add(sine(16_000, 1.0)[:, np.newaxis])
    assert (levels.clipped_share, levels.complaint) == (0.0, "")


def test_digital_silence_is_told_after_ten_seconds_and_ends_with_any_noise() -> None:
    levels, block = Levels(16_000), np.zeros((1600, 2), np.int16)
    for _ in range(99):
        levels.add(block)
    assert levels.complaint == ""
    levels.add(block)
    levels.add(block)
    assert "nothing but digital silence" in levels.complaint
    block[7, 1] = 1
    levels.add(block)
    assert (levels.silent_s, levels.complaint) == (0.0, "")
