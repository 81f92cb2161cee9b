"""Raw PCM on standard input as a source: 16-bit little endian, 16 kHz, mono, at the pace it comes."""

from __future__ import annotations

import array
import asyncio
import fcntl
import io
import logging
import os
import select
import stat
import sys
import termios
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np

from edge_asr.audio.source import Chunker
from edge_asr.audio.timeline import lost_chunk
from edge_asr.errors import AudioError
from edge_asr.types import CHUNK_S, Chunk, Samples

log = logging.getLogger(__name__)

READ_BYTES = 32_000
"""At most this much is taken at once: one second. What is not taken waits in the pipe, so nothing piles up here."""
_BYTES_PER_SAMPLE = 2


class StdinSource:
    """Plays what arrives on a stream; see AudioSource. Raises AudioError where standard input is closed.

    A stream with a file descriptor (a pipe, a socket, a file) is read unbuffered and may block; one without, such as
    `io.BytesIO`, must not. The stream stays open.
    """

    def __init__(
        self, stream: IO[bytes] | None = None, name: str = "stdin", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._stream = _standard_input(name) if stream is None else stream
        self._clock = clock
        self._arrived_at = 0.0
        self._odd = b""
        self._taking = threading.Lock()
        self._taken = 0  # bytes, in all
        self._heard_from = 0
        self._closed = False
        self._stop_read, self._stop_write = os.pipe()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Yield the sound; a chunk counts as captured when its last sample arrived. Raises AudioError on a terminal."""
        chunker = Chunker(lambda _: self._arrived_at - CHUNK_S)
        try:
            if self._stream.isatty():
                raise AudioError(f"{self.name} is a terminal; pipe sound in: arecord -t raw -f S16_LE -r 16000 -c 1 |")
            while True:
                samples = await self._next_samples()
                for chunk in chunker.flush() if samples is None else chunker.push(samples):
                    if self._closed:
                        return
                    yield chunk if chunk.index >= self._heard_from else lost_chunk(chunk.index, chunk.captured_at)
                if samples is None:
                    return
        except OSError as error:
            raise AudioError(f"{self.name}: {error.strerror}; check what is piped in") from error
        finally:
            self.close()

    def close(self) -> None:
        """End the iteration, also when it waits for data, and join the thread."""
        if not self._closed:
            self._closed = True
            os.close(self._stop_write)  # wakes the poll
            self._reader.shutdown(wait=True)
            os.close(self._stop_read)

    def forget(self) -> None:
        """Let what has come in until now never be heard: its chunks are `lost`. A file has not come in, it is there."""
        if self._closed:
            return
        with self._taking:
            self._heard_from = -(-(self._taken + _unread(self._stream)) // _BYTES_PER_SAMPLE)

    async def _next_samples(self) -> Samples | None:
        """Return what has arrived, `[n]` float32; None at the end or when the source was closed."""
        if self._closed:
            return None
        data = await asyncio.get_running_loop().run_in_executor(self._reader, self._read)
        if not data:
            if self._odd and not self._closed:
                log.warning("%s: ends in half a sample; is it 16-bit PCM?", self.name)
            return None
        data = self._odd + data
        whole = len(data) - len(data) % _BYTES_PER_SAMPLE
        self._odd = data[whole:]
        samples: Samples = np.frombuffer(data[:whole], "<i2").astype(np.float32)
        samples /= 32768
        return samples

    def _read(self) -> bytes:
        """Wait for data and take what is there; empty at the end of the stream or when the source was closed."""
        descriptor = _descriptor(self._stream)
        if descriptor is not None:
            poll = select.poll()  # unlike epoll it takes regular files too
            poll.register(descriptor, select.POLLIN)
            poll.register(self._stop_read, select.POLLIN)
            if self._stop_read in [ready for ready, _ in poll.poll()]:
                return b""
        with self._taking:
            data = self._stream.read(READ_BYTES) if descriptor is None else os.read(descriptor, READ_BYTES)
            self._taken += len(data)
        if data:
            self._arrived_at = self._clock()
        return data


def _descriptor(stream: IO[bytes]) -> int | None:
    try:
        return stream.fileno()
    except io.UnsupportedOperation:
        return None


def _unread(stream: IO[bytes]) -> int:
    """Return how many bytes have been sent to a pipe or socket and not been read; 0 for anything else."""
    descriptor = _descriptor(stream)
    mode = 0 if descriptor is None else os.fstat(descriptor).st_mode
    count = array.array("i", [0])
    if descriptor is not None and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]


def _standard_input(name: str) -> IO[bytes]:
    if sys.stdin is None:
        raise AudioError(f"{name}: standard input is closed; pipe sound in")
    return sys.stdin.buffer
