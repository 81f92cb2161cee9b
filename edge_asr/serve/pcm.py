"""Raw sound of clients, as it comes in, to 16 kHz mono float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import soxr

from edge_asr.types import SAMPLE_RATE, Samples

RATES = (8_000, 192_000)
"""Samples per second that are taken."""
CHANNELS = 8
WIDTHS = (1, 2, 3, 4)
"""Bytes of a sample: unsigned for 1, signed little endian for the others."""


class PcmStream:
    """Turns bytes, cut anywhere, into samples. Raises ValueError for a kind of sound that it does not take."""

    def __init__(self, rate: int = SAMPLE_RATE, width: int = 2, channels: int = 1) -> None:
        if not RATES[0] <= rate <= RATES[1]:
            raise ValueError(f"{rate} samples per second; should be {RATES[0]} to {RATES[1]}")
        if width not in WIDTHS:
            raise ValueError(f"{width} bytes a sample; should be 1 to {WIDTHS[-1]}")
        if not 1 <= channels <= CHANNELS:
            raise ValueError(f"{channels} channels; should be 1 to {CHANNELS}")
        self.kind = rate, width, channels
        self._frame = width * channels
        self._rest = b""
        self._resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")

    def push(self, data: bytes) -> Samples:
        """Return the samples that the bytes complete, `[n]` float32, full scale +-1."""
        data = self._rest + data
        whole = len(data) - len(data) % self._frame
        self._rest = data[whole:]
        return self._resampled(self._mono(data[:whole]), last=False)

    def flush(self) -> Samples:
        """Return what is left at the end; half a sample is dropped."""
        self._rest = b""
        return self._resampled(np.zeros(0, np.float32), last=True)

    def _mono(self, data: bytes) -> Samples:
        _, width, channels = self.kind
        samples = _floats(data, width)
        if channels > 1:
            samples = samples.reshape(-1, channels).mean(axis=1, dtype=np.float32)
        return samples

    def _resampled(self, samples: Samples, *, last: bool) -> Samples:
        if self._resampler is None:
            return samples
        resampled: Samples = np.clip(self._resampler.resample_chunk(samples, last=last), -1, 1)
        return resampled


def _floats(data: bytes, width: int) -> Samples:
    raw: npt.NDArray[np.generic]
    if width == 1:
        samples: Samples = np.frombuffer(data, np.uint8).astype(np.float32)
        samples -= 128
    elif width == 3:  # as the upper bytes of four
        raw = np.zeros((len(data) // 3, 4), np.uint8)
        raw[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = (raw.reshape(-1).view("<i4") >> 8).astype(np.float32)
    else:
        samples = np.frombuffer(data, f"<i{width}").astype(np.float32)
    samples *= np.float32(2.0 ** (1 - 8 * width))
    return samples
