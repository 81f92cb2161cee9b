"""When requests come, by the hour of the day and in bursts, and how long their recordings are."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DAY_S = 86_400.0
HOUR_S = 3_600.0
PEAK_H = 19.0
"""The hour of the peak."""
LEVELS = (0.1, 0.5)
"""Requests in the night (23 to 7) and in the day beside the peak, of the mean of the day."""
LENGTH_S, LENGTH_SPREAD, LONGEST_S = 3.3, 0.5, 30.0
"""Mean length of a recording, as in docs/server-load.md; deviation of its logarithm, an assumption; the longest."""
GAP_S = 4.0
"""Between two requests of a burst, at the mean."""
BINS_S = 60.0
"""The rate of arrivals is constant for so long."""


def flat(hours: Array) -> Array:
    """Return the rate beside the peak, of the mean of the day: within an hour it rises in the morning, and falls."""
    return np.asarray(np.interp(hours % 24, (6.5, 7.5, 22.5, 23.5), (LEVELS[0], LEVELS[1], LEVELS[1], LEVELS[0])))


def level(hours: Array, peak: float) -> Array:
    """Return the rate at hours of the day, of the mean of the day: a night, a day, and an evening of `peak`."""
    if peak <= 1:
        return np.ones_like(hours)
    grid = np.arange(0, 24, 1 / 60)
    mean = float(flat(grid).mean())

    def bump(at: Array, width: float) -> Array:
        return np.asarray((peak - LEVELS[1]) * np.exp(-((((at % 24) - PEAK_H) / width) ** 2) / 2))

    lowest, highest = 0.01, 50.0
    for _ in range(60):  # how wide the peak is follows from how much of the day has to be in it
        width = (lowest + highest) / 2
        lowest, highest = (lowest, width) if mean + bump(grid, width).mean() > 1 else (width, highest)
    return np.asarray(flat(hours) + bump(hours, width), dtype=np.float64)


def arrivals(
    rng: np.random.Generator,
    per_day: float,
    peak: float = 10.0,
    burst: float = 2.0,
    hours: tuple[float, float] = (0, 24),
) -> Array:
    """Return when requests come, in seconds of the day, in order: bursts of `burst` at the mean, by the hour."""
    starts = np.arange(hours[0] * HOUR_S, hours[1] * HOUR_S, BINS_S)
    wanted = per_day / DAY_S * BINS_S * level((starts + BINS_S / 2) / HOUR_S, peak) / burst
    counts = rng.poisson(wanted)
    began = np.repeat(starts, counts) + rng.random(int(counts.sum())) * BINS_S
    sizes = rng.geometric(1 / burst, len(began)) if burst > 1 else np.ones(len(began), dtype=np.int64)
    gaps = rng.exponential(GAP_S, int(sizes.sum()))
    firsts = np.cumsum(sizes) - sizes
    gaps[firsts] = 0
    total = np.cumsum(gaps)
    times = np.repeat(began, sizes) + total - np.repeat(total[firsts], sizes)
    return np.sort(times)


def lengths(rng: np.random.Generator, count: int, spread: float = LENGTH_SPREAD) -> Array:
    """Return seconds of audio of so many recordings: log-normal."""
    found = rng.lognormal(math.log(LENGTH_S) - spread**2 / 2, spread, count)
    return np.asarray(np.minimum(found, LONGEST_S), dtype=np.float64)


def clients(rng: np.random.Generator, number: int, every_s: float, seconds: float) -> Array:
    """Return when the clients of bench/load.py ask, in order: each at its own times, half to one and a half of it."""
    found: list[float] = []
    for _ in range(number):
        at = rng.random() * every_s
        while at < seconds:
            found.append(at)
            at += rng.uniform(0.5, 1.5) * every_s
    return np.sort(np.asarray(found, dtype=np.float64))
