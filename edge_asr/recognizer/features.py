"""Features as Paraformer was trained on: log-mel filterbank, low frame rate, CMVN (FunASR's WavFrontend)."""

from __future__ import annotations

import kaldi_native_fbank as knf
import numpy as np
import numpy.typing as npt

from edge_asr.types import SAMPLE_RATE, Samples

Features = npt.NDArray[np.float32]

BINS = 80
STACK = 7
"""Frames in a row."""
STEP = 6
"""Frames from one row to the next: 60 ms."""
WIDTH = BINS * STACK


class FeatureExtractor:
    """Samples -> features `[T, 560]`, T = ceil(frames / 6), one row a 60 ms."""

    def __init__(self, neg_mean: Features, inv_stddev: Features) -> None:
        """`neg_mean` and `inv_stddev` are the bundle's CMVN, `[560]` each."""
        self._neg_mean = neg_mean
        self._inv_stddev = inv_stddev
        self._options = knf.FbankOptions()
        frame = self._options.frame_opts
        frame.samp_freq = SAMPLE_RATE
        frame.frame_length_ms, frame.frame_shift_ms = 25.0, 10.0
        frame.window_type = "hamming"
        frame.snip_edges = True
        frame.dither = 0.0
        self._options.mel_opts.num_bins = BINS
        self._options.energy_floor = 0.0

    def __call__(self, samples: Samples) -> Features:
        """Return `[T, 560]` float32 for `[n]` samples (full scale +-1); T is 0 for less than 25 ms."""
        frames = self._filterbank(samples)
        if not len(frames):
            return np.zeros((0, WIDTH), np.float32)
        features: Features = (stack_frames(frames) + self._neg_mean) * self._inv_stddev
        return features

    def _filterbank(self, samples: Samples) -> Features:
        """Return `[frames, 80]` log-mel energies; kaldi counts in 16-bit units."""
        bank = knf.OnlineFbank(self._options)
        # A memoryview's elements are Python floats at once; an array's cost a third more of the whole filterbank.
        bank.accept_waveform(SAMPLE_RATE, (samples * np.float32(32768)).data)
        bank.input_finished()
        frames = np.empty((bank.num_frames_ready, BINS), np.float32)
        for index in range(len(frames)):
            frames[index] = bank.get_frame(index)
        return frames


def stack_frames(frames: Features) -> Features:
    """Return `[ceil(F / 6), 560]` for `[F, 80]`: 7 frames every 6, 3 copies of the first before, the last repeated."""
    rows = -(-len(frames) // STEP)
    index = np.arange(rows)[:, None] * STEP + np.arange(STACK) - STACK // 2
    stacked: Features = frames[np.clip(index, 0, len(frames) - 1)].reshape(rows, WIDTH)
    return stacked
