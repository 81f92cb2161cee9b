"""Features as Paraformer was trained on: log-mel filterbank, low frame rate, CMVN (FunASR's WavFrontend).

The filterbank is kaldi's, in numpy: kaldi-native-fbank takes samples one Python float at a time, which costs four times
as much. It is the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

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

FRAME = SAMPLE_RATE * 25 // 1000
SHIFT = SAMPLE_RATE * 10 // 1000
SPECTRUM = 512
"""Points of a frame's Fourier transform; the frame is padded with zeros."""
LOWEST_HZ = 20.0
PRE_EMPHASIS = np.float32(0.97)
FULL_SCALE = np.float32(32768)
"""Kaldi counts in 16-bit units."""
FLOOR = np.finfo(np.float32).eps
BLOCK = 60
"""Frames computed at a time. The arrays for more are so large that they come fresh from the kernel each time, which
costs more than computing them."""
BANDS = (0, 32, 64, 128, 256)
"""Where the spectrum is cut for its product with the mel weights. A bin counts for two neighbouring triangles only, so
the pieces are a third of the work; and they are so small that BLAS wakes no threads, which would spin beside
onnxruntime's."""


class FeatureExtractor:
    """Samples -> features `[T, 560]`, T = ceil(frames / 6), one row a 60 ms."""

    def __init__(self, neg_mean: Features, inv_stddev: Features) -> None:
        """`neg_mean` and `inv_stddev` are the bundle's CMVN, `[560]` each."""
        self._neg_mean = neg_mean
        self._inv_stddev = inv_stddev
        self._window = np.hamming(FRAME).astype(np.float32)
        self._bands = list(_bands(mel_weights()))

    def __call__(self, samples: Samples) -> Features:
        """Return `[T, 560]` float32 for `[n]` samples (full scale +-1); T is 0 for less than 25 ms."""
        frames = self._filterbank(samples)
        if not len(frames):
            return np.zeros((0, WIDTH), np.float32)
        features = stack_frames(frames)
        features += self._neg_mean
        features *= self._inv_stddev
        return features

    def _filterbank(self, samples: Samples) -> Features:
        """Return `[frames, 80]` log-mel energies as kaldi computes them, with `snip_edges` and without dither."""
        if len(samples) < FRAME:
            return np.zeros((0, BINS), np.float32)
        scaled = samples * FULL_SCALE
        emphasised = scaled.copy()
        emphasised[1:] -= PRE_EMPHASIS * scaled[:-1]
        frames, emphasised_frames = (_framed(signal) for signal in (scaled, emphasised))
        energies = np.empty((len(frames), BINS), np.float32)
        for start in range(0, len(frames), BLOCK):
            block = slice(start, start + BLOCK)
            self._sum_bins(self._powers(frames[block], emphasised_frames[block]), energies[block])
        np.maximum(energies, FLOOR, out=energies)
        np.log(energies, out=energies)
        return energies

    def _sum_bins(self, powers: Features, energies: Features) -> None:
        """Write the energies `[F, 80]` of a power spectrum `[F, 256]`."""
        energies[:] = 0
        for bins, triangles, weights in self._bands:
            energies[:, triangles] += powers[:, bins] @ weights

    def _powers(self, frames: Features, emphasised: Features) -> Features:
        """Return the power spectrum `[F, 256]` of frames `[F, 400]`: constant part off, pre-emphasis, window."""
        # Kaldi takes a frame's mean off before it emphasises; of that mean a share of 1 - 0.97 is left to take off.
        mean = frames.mean(axis=1, keepdims=True)
        windowed = emphasised - (1 - PRE_EMPHASIS) * mean
        windowed[:, :1] = (1 - PRE_EMPHASIS) * (frames[:, :1] - mean)
        windowed *= self._window
        spectrum = np.fft.rfft(windowed, SPECTRUM)[:, : SPECTRUM // 2]
        powers: Features = np.square(spectrum.real, dtype=np.float32)
        powers += np.square(spectrum.imag, dtype=np.float32)
        return powers


def _framed(signal: Samples) -> Features:
    """Return `[frames, 400]`, a view: a frame each 10 ms."""
    return np.lib.stride_tricks.sliding_window_view(signal, FRAME)[::SHIFT]


def mel_weights() -> Features:
    """Return `[256, 80]`: triangles over the bins of the spectrum, equally wide in mel from 20 to 8000 Hz.

    In single precision, as kaldi computes them: over 500 frames the difference would move the end of a token.
    """
    lowest, highest = _mel(np.array([LOWEST_HZ, SAMPLE_RATE / 2], np.float32))
    step = np.float32((highest - lowest) / np.float32(BINS + 1))
    number = np.arange(BINS, dtype=np.float32)
    left, centre, right = (lowest + (number + np.float32(shift)) * step for shift in range(3))
    bins = _mel(np.arange(SPECTRUM // 2, dtype=np.float32) * np.float32(SAMPLE_RATE / SPECTRUM))[:, None]
    triangles = np.where(bins <= centre, (bins - left) / (centre - left), (right - bins) / (right - centre))
    weights: Features = np.where((bins > left) & (bins < right), triangles, np.float32(0)).astype(np.float32)
    return weights


def _bands(weights: Features) -> Iterator[tuple[slice, slice, Features]]:
    """Yield for each band its bins, the triangles that they count for, and the weights between them."""
    for start, end in pairwise(BANDS):
        triangles = np.flatnonzero(weights[start:end].any(axis=0))
        columns = slice(int(triangles[0]), int(triangles[-1]) + 1)
        yield slice(start, end), columns, np.ascontiguousarray(weights[start:end, columns])


def _mel(hertz: Features) -> Features:
    # The logarithm is rounded once, from double precision; numpy's of single precision is not always the nearest.
    logarithm = np.log((np.float32(1) + hertz / np.float32(700)).astype(np.float64))
    mel: Features = np.float32(1127) * logarithm.astype(np.float32)
    return mel


def stack_frames(frames: Features) -> Features:
    """Return `[ceil(F / 6), 560]` for `[F, 80]`: 7 frames every 6, 3 copies of the first before, the last repeated."""
    rows = -(-len(frames) // STEP)
    index = np.arange(rows)[:, None] * STEP + np.arange(STACK) - STACK // 2
    stacked: Features = frames[np.clip(index, 0, len(frames) - 1)].reshape(rows, WIDTH)
    return stacked
