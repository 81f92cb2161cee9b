"""A bounded queue of blocks between PortAudio's thread, which never waits, and a reader, which may."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from edge_asr.audio.messages import Buffer


@dataclass(slots=True)
class Slot:
    """What is known of a block beside its samples."""

    size: int = 0
    """Bytes."""
    captured_at: float = 0.0
    """Monotonic seconds of the first frame."""
    overflowed: bool = False
    """The device lost sound just before the block."""
    dropped: int = 0
    """Blocks that the ring had to drop just before the block."""


class BlockRing:
    """Holds up to `blocks` blocks of up to `block_bytes` bytes, in memory taken at once; when full, the oldest goes."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self._memory = memoryview(bytearray(blocks * block_bytes))
        self._block_bytes = block_bytes
        self._slots = [Slot() for _ in range(blocks)]
        self._first = self._count = self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, block: Buffer, captured_at: float, overflowed: bool) -> None:
        """Copy a block in; for the time of a copy it may wait for the reader."""
        with self._changed:
            if self._count == len(self._slots):
                self._drop_oldest()
            position = (self._first + self._count) % len(self._slots)
            start, slot = position * self._block_bytes, self._slots[position]
            slot.size, slot.captured_at = len(block), captured_at
            slot.overflowed, slot.dropped = overflowed, self._dropped
            self._dropped = 0
            self._memory[start : start + len(block)] = block
            self._count += 1
            self._changed.notify()

    def take(self, into: bytearray, timeout: float) -> Slot | None:
        """Move the oldest block to the start of `into`; None where none came in time, or none is left to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._count or self._closed, timeout)
            if not self._count:
                return None
            slot, start = self._slots[self._first], self._first * self._block_bytes
            into[: slot.size] = self._memory[start : start + slot.size]
            self._first = (self._first + 1) % len(self._slots)
            self._count -= 1
            return Slot(slot.size, slot.captured_at, slot.overflowed, slot.dropped)

    def close(self) -> None:
        """Say that nothing more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def closed(self) -> bool:
        """Whether nothing more will come."""
        return self._closed

    def _drop_oldest(self) -> None:
        oldest = self._slots[self._first]
        self._first = (self._first + 1) % len(self._slots)
        self._count -= 1
        following = self._slots[self._first] if self._count else None
        if following is None:
            self._dropped += oldest.dropped + 1
        else:
            following.dropped += oldest.dropped + 1
            following.overflowed |= oldest.overflowed
