"""What is wrong with the sound itself: clipped, or nothing but zeros."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WINDOW_S = 10.0
CLIPPED_SHARE = 0.001
"""From this share of full-scale samples in a window on, a microphone clips."""
SILENT_S = 10.0
"""After so long of nothing but zeros a microphone is dead: a working one always hears some noise."""
FULL_SCALE = np.iinfo(np.int16)

Frames = npt.NDArray[np.int16]


class Levels:
    """Watches `[frames, channels]` of signed 16-bit samples at `rate`."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._frames = self._clipped = self._samples = 0
        self.clipped_share = 0.0
        """Share of samples at full scale in the last 10 s that are complete."""
        self.silent_s = 0.0
        """Seconds of nothing but zeros until now."""

    def add(self, frames: Frames) -> None:
        """Take the next block."""
        low, high = frames.min(), frames.max()
        self.silent_s = self.silent_s + len(frames) / self._rate if low == high == 0 else 0.0
        if low == FULL_SCALE.min or high == FULL_SCALE.max:
            self._clipped += int(np.count_nonzero((frames == FULL_SCALE.min) | (frames == FULL_SCALE.max)))
        self._frames += len(frames)
        self._samples += frames.size
        if self._frames >= WINDOW_S * self._rate:
            self.clipped_share = self._clipped / self._samples
            self._frames = self._clipped = self._samples = 0

    @property
    def complaint(self) -> str:
        """What is wrong and the remedy; empty where nothing is."""
        if self.silent_s >= SILENT_S:
            return "nothing but digital silence; is it muted, or is this the wrong device?"
        if self.clipped_share >= CLIPPED_SHARE:
            return f"clipping: {self.clipped_share:.1%} of the samples are at full scale; lower its gain (alsamixer)"
        return ""
