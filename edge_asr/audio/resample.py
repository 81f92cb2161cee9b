"""Sound of a device, at any rate and with any number of channels, to 16 kHz mono, block by block."""

from __future__ import annotations

import numpy as np
import soxr

from edge_asr.audio.levels import Frames
from edge_asr.types import SAMPLE_RATE, Samples

TINY = 1e-9
"""Of full scale: -180 dB, which no converter resolves."""


class ToMono16k:
    """Converts one stream; what a block ends with goes on in the next."""

    def __init__(self, rate: int, channel: int | None) -> None:
        """`channel` counts from 0; None is the mean of all."""
        self._channel = channel
        # soxr's mode for variable rates: it keeps 13 ms of 48 kHz back, where the other keeps up to 40.
        self._resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", vr=True)

    def push(self, frames: Frames) -> Samples:
        """Return what follows from `[n, channels]` signed 16-bit samples: `[m]` float32, full scale +-1."""
        mono: Samples
        if frames.shape[1] == 1:
            mono = frames[:, 0].astype(np.float32)
        elif self._channel is None:
            mono = frames.mean(axis=1, dtype=np.float32)
        else:
            mono = frames[:, self._channel].astype(np.float32)
        mono *= np.float32(1 / 32768)
        if self._resampler is None:
            return mono
        resampled: Samples = np.clip(self._resampler.resample_chunk(mono), -1, 1)
        resampled[np.abs(resampled) < TINY] = 0  # its filters ring for ever, in numbers that processors are slow with
        return resampled
