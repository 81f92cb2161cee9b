"""The clock of a sound device against the monotonic one: when a frame was captured, and how fast the device runs."""

from __future__ import annotations

from collections import deque

import numpy as np

BUCKET_S = 10.0
"""Observations of so long become one point: their median, which late wake-ups do not move."""
POINTS = 60
"""Points that the line is fitted to: ten minutes."""
MIN_POINTS = 12
"""Below this, two minutes, the device is taken to run as it did before."""
STEP_S = 0.05
"""A point further than this from the line is no drift: sound was lost, and a new line begins."""


class SampleClock:
    """A line through when frames were captured, robust against some that are told far too late.

    Frames are counted from the start of a stream; the times are monotonic seconds, so steps of the wall clock are
    unknown here.
    """

    def __init__(self, rate: float, ppm: float | None = None) -> None:
        """`ppm`: how much longer than it should the device took for a second before, in millionths, if known."""
        self._rate = rate
        self._slope = (ppm or 0.0) * 1e-6
        self._known = ppm is not None
        self._bucket: list[float] = []
        self._bucket_start = 0.0
        self._points: deque[tuple[float, float]] = deque(maxlen=POINTS)
        self._base: tuple[float, float] = (0.0, 0.0)

    @property
    def ppm(self) -> float | None:
        """How many millionths more than a second the device takes for a second of samples; None until known."""
        return self._slope * 1e6 if self._known else None

    def observe(self, frame: int, captured_at: float) -> None:
        """Take note that `frame` was captured at `captured_at`, as far as is known."""
        nominal = frame / self._rate
        if not self._bucket:
            self._bucket_start = nominal
        self._bucket.append(captured_at - nominal)
        if nominal - self._bucket_start >= BUCKET_S:
            self._close_bucket((self._bucket_start + nominal) / 2)
        elif not self._points:
            self._base = (nominal, float(np.median(self._bucket)))

    def time_of(self, frame: float) -> float:
        """Return when `frame` was captured. The clock must have observed something."""
        nominal = frame / self._rate
        at, offset = self._base
        return nominal + offset + self._slope * (nominal - at)

    def _close_bucket(self, middle: float) -> None:
        offset = float(np.median(self._bucket))
        self._bucket.clear()
        if self._points and abs(offset - (self.time_of(middle * self._rate) - middle)) > STEP_S:
            self._points.clear()
        self._points.append((middle, offset))
        at, offsets = np.array(self._points).T
        if len(self._points) >= MIN_POINTS:
            first, second = np.triu_indices(len(at), 1)
            self._slope = float(np.median((offsets[second] - offsets[first]) / (at[second] - at[first])))
            self._known = True
        self._base = (middle, float(np.median(offsets - self._slope * (at - middle))))
