"""Sound that somebody hands over piece by piece, such as a client of the network, as a source."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable

from edge_asr.audio.source import Chunker
from edge_asr.errors import StreamEndedError
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, SAMPLE_RATE, Chunk, Samples

AHEAD_S = 5.0
"""Seconds of sound that may wait to be heard; then whoever pushes waits."""
BLOCK_SAMPLES = SAMPLE_RATE // 4
"""What is heard before others get their turn."""


class PushedSource:
    """Plays what is pushed, at the pace that it comes; see AudioSource. For the thread of one event loop."""

    def __init__(self, name: str, first: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """`first`: the index of the first sample."""
        self.name = name
        self.next_index = first
        """That of the sample after those which were heard."""
        self._clock = clock
        self._waiting: deque[tuple[Samples, float]] = deque()
        self._waiting_samples = 0
        self._room, self._news = asyncio.Event(), asyncio.Event()
        self._ended = self._closed = False

    async def push(self, samples: Samples) -> None:
        """Take `[n]` float32 samples; waits while too much waits to be heard. Raises StreamEndedError."""
        arrived_at = self._clock()
        for start in range(0, len(samples), BLOCK_SAMPLES):
            while self._waiting_samples >= AHEAD_S * SAMPLE_RATE and not self._closed:
                self._room.clear()
                await self._room.wait()
            if self._closed or self._ended:
                raise StreamEndedError("the stream has ended; open another one")
            block = samples[start : start + BLOCK_SAMPLES]
            self._waiting.append((block, arrived_at))
            self._waiting_samples += len(block)
            self._news.set()

    def end(self) -> None:
        """Say that nothing more comes: what has come is heard to the end."""
        self._ended = True
        self._news.set()

    def close(self) -> None:
        """End the iteration; what was not heard yet is dropped."""
        self._closed = True
        self._waiting.clear()
        self._waiting_samples = 0
        self._news.set()
        self._room.set()

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Yield the sound; a chunk counts as captured when its last sample arrived."""
        arrived_at = self._clock()
        chunker = Chunker(lambda _: arrived_at - CHUNK_S, self.next_index)
        while (block := await self._next()) is not None:
            samples, arrived_at = block
            for chunk in chunker.push(samples):
                self.next_index = chunk.index + CHUNK_SAMPLES
                yield chunk
            await asyncio.sleep(0)  # one that sends all at once does not hold the others up
        for chunk in () if self._closed else chunker.flush():
            self.next_index = chunk.index + CHUNK_SAMPLES
            yield chunk

    async def _next(self) -> tuple[Samples, float] | None:
        """Return the next block with the moment it came; None at the end."""
        while not (self._waiting or self._ended or self._closed):
            self._news.clear()
            await self._news.wait()
        if not self._waiting:
            return None
        block = self._waiting.popleft()
        self._waiting_samples -= len(block[0])
        self._room.set()
        return block
