"""A file as a source, at the pace of a microphone or as fast as it goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

from edge_asr.audio.decode import decode
from edge_asr.audio.source import Chunker
from edge_asr.errors import AudioError
from edge_asr.types import CHUNK_S, SAMPLE_RATE, Chunk, Samples


class FileSource:
    """Plays one file; see AudioSource.

    Decoding runs in a thread of its own, one block at a time and only when one is wanted, so nothing piles up.
    """

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        realtime: bool = True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = name or f"file:{path}"
        self._path = Path(path)
        self._realtime = realtime
        self._clock = clock
        self._sleep = sleep
        self._started_at: float | None = None
        self._closed = False
        self._blocks = cast("Generator[Samples, None, None]", decode(path))
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix=f"decode {path}")

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Yield the file. At real-time pace a chunk comes when a microphone would have captured its last sample."""
        chunker = Chunker(self._captured_at)
        try:
            if self._path.exists() and not self._path.is_file() and not self._path.is_dir():
                # Reading it could block for ever, and nothing could end that.
                raise AudioError(f"{self._path}: is no regular file; pipe sound into the source `stdin` instead")
            while True:
                block = await self._next_block()
                for chunk in chunker.flush() if block is None else chunker.push(block):
                    await self._sleep(self._seconds_until_due(chunk))
                    if self._closed:
                        return
                    yield chunk
                if block is None:
                    return
        finally:
            self.close()

    def close(self) -> None:
        """End the iteration, close the file and join the thread: at most for the time of one block's decoding."""
        if not self._closed:
            self._closed = True
            self._decoder.submit(self._blocks.close)
            self._decoder.shutdown(wait=True)

    async def _next_block(self) -> Samples | None:
        """Return the next block of the file; None at its end or when the source was closed."""
        if self._closed:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._decoder, next, self._blocks, None)

    def _seconds_until_due(self, chunk: Chunk) -> float:
        """Return how long to hold a chunk back: against the schedule, so that late wake-ups do not add up."""
        return max(0.0, chunk.captured_at + CHUNK_S - self._clock()) if self._realtime else 0.0

    def _captured_at(self, index: int) -> float:
        """Return when a microphone that started with the first block would have captured the sample at `index`."""
        if not self._realtime:
            return self._clock() - CHUNK_S
        if self._started_at is None:
            self._started_at = self._clock()
        return self._started_at + index / SAMPLE_RATE
