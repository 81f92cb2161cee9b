"""The beginning of a WAV file that somebody streams: what kind of sound follows, and where. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass

PCM = (1, 0xFFFE)
"""Plain samples, by either of its names."""
LONGEST = 65_536
"""Bytes in which the samples must have begun."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where the samples begin, in bytes, and what they are: samples per second, bytes a sample, channels."""

    place: int
    kind: tuple[int, int, int] | None
    """None: nothing tells."""


RAW = Beginning(0, None)
"""Samples without anything before them."""


def beginning(data: bytes) -> Beginning | None:
    """Return where samples begin in the first bytes of a stream; None: it takes more to tell.

    Raises ValueError for a WAV file that holds something else than samples, or hides them.
    """
    if data[:4] != b"RIFF"[: len(data)] or data[8:12] != b"WAVE"[: max(0, len(data) - 8)]:
        return RAW
    place, kind = 12, None
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        if name == b"data":
            return Beginning(place + 8, kind)
        if name == b"fmt " and place + 24 <= len(data):
            kind = _kind(*struct.unpack_from("<HHIIHH", data, place + 8))
        place += 8 + size + size % 2
    if len(data) > LONGEST:
        raise ValueError(f"no samples in the first {LONGEST} bytes of the WAV file")
    return None


def _kind(encoding: int, channels: int, rate: int, _bytes_per_s: int, _block: int, bits: int) -> tuple[int, int, int]:
    if encoding not in PCM or bits % 8:
        raise ValueError(f"encoding {encoding} of {bits} bits; should be whole bytes of plain PCM")
    return rate, bits // 8, channels
