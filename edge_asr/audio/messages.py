"""What the process that records tells the one that listens: a header, then a payload."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Buffer = bytes | bytearray | memoryview

HEADER = struct.Struct("<c?IId")
SOUND, REPORT = b"S", b"R"


@dataclass(frozen=True, slots=True)
class Sound:
    """Consecutive frames of interleaved signed 16-bit samples."""

    data: bytes
    captured_at: float
    """Monotonic seconds of the first frame."""
    overflowed: bool
    """The device lost sound just before."""
    dropped: int
    """Blocks of this size that were dropped just before, because nobody took them."""


@dataclass(frozen=True, slots=True)
class Report:
    """How the recording goes: `open`, `waiting` for the device, or `failed` for good."""

    state: str
    why: str = ""
    rate: int = 0
    """Frames per second of the stream, while it is open."""
    channels: int = 0
    device: str = ""
    """PortAudio's name of the device, while it is open."""


def pack_header(size: int, captured_at: float, overflowed: bool, dropped: int) -> bytes:
    """Return what goes before `size` bytes of sound."""
    return HEADER.pack(SOUND, overflowed, size, dropped, captured_at)


def pack_report(report: Report) -> bytes:
    """Return a report as a whole message."""
    fields: dict[str, Any] = {name: getattr(report, name) for name in report.__slots__}
    payload = json.dumps(fields).encode()
    return HEADER.pack(REPORT, False, len(payload), 0, 0.0) + payload


class MessageReader:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Sound | Report]:
        """Yield the messages that `data` completes. Take all before the next call."""
        self._rest += data
        while len(self._rest) >= HEADER.size:
            kind, overflowed, size, dropped, captured_at = HEADER.unpack_from(self._rest)
            if len(self._rest) < HEADER.size + size:
                return
            payload = bytes(self._rest[HEADER.size : HEADER.size + size])
            del self._rest[: HEADER.size + size]
            if kind == SOUND:
                yield Sound(payload, captured_at, overflowed, dropped)
            else:
                yield Report(**json.loads(payload))
